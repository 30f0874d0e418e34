"""A thousand templates, each with a time limit: harmless ones render as transformers does, endless ones are refused."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from recipe import sandbox
from recipe.config import UserError
from recipe.evaluation.judge.prompts import load_judge_prompts
from recipe.sandbox import RenderError, render
from recipe.templates import Template, load_template, saved_template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 1 < 2 & 3?\n", "input": "\ud83d é"},
    {"role": "assistant", "content": "<think>a</think>Yes."},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}

# expressions from which harmless templates are made: each renders, or is refused, in no time
ATOMS = [
    "messages", "messages[0]", "m.content", "m['role']", "m.input", "bos_token", "eos_token", "add_generation_prompt",
    "missing", "missing.deeper", "none", "true", "1", "3.5", "'text'", "[1, 2, 3]", "{'a': 1}", "loop.index",
    "loop.last", "range(3)", "namespace(x=1).x", "dict(a=2)", "joiner(', ')()", "cycler('a', 'b').next()", "tools",
    "raise_exception('refused')", "strftime_now('%Y')", "m.content.__class__", "''.__class__.__mro__",
    "messages|length",
]  # fmt: skip
FILTERS = [
    "trim", "upper", "length", "list", "join('-')", "tojson", "tojson(indent=2)", "string", "first", "last",
    "default(0)",
    "replace('a', 'b')", "center(20)", "indent(4)", "wordwrap(10)", "reverse", "sort", "unique|list", "batch(2)|list",
    "map(attribute='role')|join", "selectattr('role', 'equalto', 'user')|list", "int", "float", "round", "abs", "e",
    "format(1)", "truncate(5)", "title", "wordcount", "items|list", "dictsort", "pprint", "xmlattr", "sum",
]  # fmt: skip
METHODS = ["strip()", "split('<')", "split()[0]", "startswith('a')", "get('role')", "items()", "lower()", "append(1)"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "if"]

# what takes all time or all memory, each with a number to vary it
ENDLESS = [
    "{{% for a in range({n}) %}}{{% for b in range({n}) %}}{{% set c = 1 %}}{{% endfor %}}{{% endfor %}}",
    "{{{{ 'x' * 10**1{d} }}}}",
    "{{{{ [0] * 10**1{d} }}}}",
    "{{{{ '%9{d}00000000d' % 1 }}}}",
    "{{{{ '%*d' % (9{d}00000000, 1) }}}}",
    "{{{{ '{{:9{d}00000000}}'.format(1) }}}}",
    "{{{{ '%09{d}0000000f'|format(1.0) }}}}",
    "{{{{ (9 ** 9{d}) ** 99999 }}}}",
    "{{{{ 'x'|center(9{d}00000000) }}}}",
    "{{{{ 'x'.zfill(9{d}00000000) }}}}",
    "{{{{ 'x'.ljust(9{d}00000000) }}}}",
    "{{{{ 'a\\nb'|indent(9{d}00000000) }}}}",
    "{{{{ messages|tojson(indent=9{d}00000000) }}}}",
    "{{{{ ('x' * 9{d}000).replace('x', 'y' * 900000) }}}}",
    "{{{{ (['x' * 9{d}000] * 99999)|join }}}}",
    "{{{{ ([['x' * 9{d}000] * 999] * 999)|string }}}}",
    "{{% macro m(n) %}}{{% if n %}}{{{{ m(n - 1) }}}}{{{{ m(n - 1) }}}}{{% endif %}}{{% endmacro %}}{{{{ m({d}00) }}}}",
    "{{% for a in [[]] recursive %}}{{% for i in range({n}) %}}{{{{ loop([1, 2]) }}}}{{% endfor %}}{{% endfor %}}",
    "{{% set ns = namespace(x='ab{d}') %}}{{% for i in range({n}) %}}{{% set ns.x = ns.x + ns.x %}}{{% endfor %}}",
    "{{% set n = namespace(x=[{d}]) %}}{{% for i in range(99) %}}{{% set n.x = [n.x]*2 %}}{{% endfor %}}{{{{ n.x }}}}",
    "{{% for c in 'x' * 9{d}0000 %}}{{% for d in 'x' * 900000 %}}{{% endfor %}}{{% endfor %}}",
    "{{{{ lipsum(n=9{d}00000) }}}}",
    "{{{{ range({n})|map('string')|map('center', 99999)|list|length }}}}",
    "{{{{ 'y' * 9{d}00000 }}}}",
]  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """Little time for each text, as it is used up so often here."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)


def expression(draw: random.Random, depth: int) -> str:
    if depth == 0:
        return draw.choice(ATOMS)
    inner = expression(draw, depth - 1)
    kind = draw.randrange(5)
    if kind == 0:
        return f"({inner})|{draw.choice(FILTERS)}"
    if kind == 1:
        return f"({inner}).{draw.choice(METHODS)}"
    if kind == 2:
        return f"({inner} {draw.choice(OPERATORS)} {draw.choice(ATOMS)})"
    return (
        f"[{inner}, {draw.choice(ATOMS)}]" if kind == 3 else f"({inner})[{draw.choice(['0', '1:', '-1', repr('a')])}]"
    )


def harmless(draw: random.Random) -> str:
    parts = []
    for _ in range(draw.randrange(1, 3)):
        value = expression(draw, draw.choice([0, 0, 1, 1, 2]))
        parts.append(
            draw.choice(
                [
                    f"{{{{ {value} }}}}\n",
                    f"{{% if {value} %}}\n  yes\n{{% else %}}no{{% endif %}}\n",
                    f"{{%- for m in messages %}}\n{{{{ {value} }}}}{{% if m.input %}}{{% break %}}{{% endif %}}"
                    + "{% endfor %}",
                    f"{{% set x = {value} %}}{{{{ x }}}}",
                    f"{{% generation %}}{{{{ {value} }}}}{{% endgeneration %}}",
                    f"{{% macro f(m) %}}{{{{ {value} }}}}{{% endmacro %}}{{{{ f(messages[1]) }}}}",
                    f"  {{# a comment #}}\n  {{% block b %}}{{{{ {value} }}}}{{% endblock %}}",
                ]
            )
        )
    if draw.randrange(10) == 0:
        parts.append(draw.choice(["{% if", "{{ 1 +", "{% endfor %}", "{% include 'a' %}", "{% import 'os' as os %}"]))
    return "".join(parts)


def by_transformers(source: str) -> str | None:
    try:
        return render_jinja_template([MESSAGES], chat_template=source, **VARIABLES)[0][0]
    except Exception:  # an expression may raise anything
        return None


def by_sandbox(source: str) -> str | None:
    shared = {"tools": None, "documents": None, **VARIABLES}
    try:
        return render(source, [{"messages": MESSAGES}], shared)[0]
    except RenderError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return None


def test_eight_hundred_harmless_templates_render_as_transformers_does():
    draw, rendered = random.Random(13), 0
    for number in range(800):
        source = harmless(draw)
        expected = by_transformers(source)
        got = by_sandbox(source)
        if " at 0x" in (expected or ""):  # the address of an object
            continue
        assert got == expected, (number, source)
        rendered += got is not None
    assert rendered > 250


def test_two_hundred_endless_templates_are_refused_each_in_one_line(short, tmp_path):
    draw, path = random.Random(13), tmp_path / "endless.jinja"
    for number in range(216):
        bomb = ENDLESS[number % len(ENDLESS)].format(n=draw.randrange(50_000, 99_999), d=draw.randrange(1, 9))
        path.write_text("{% for m in messages %}{{ m.content }}{{ m.input }}" + bomb + "{% endfor %}", encoding="utf-8")
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            load_template(str(path))
        assert time.monotonic() - started < 20, bomb
        message = str(error.value)
        assert message.startswith(f"template {path}") and "\n" not in message and len(message) < 1000, bomb


def test_a_template_that_is_endless_for_one_record_is_refused_there(short):
    source = (
        "{% set m = messages[0] %}{{ m.content }}{% if m.content == 'now' %}{{ 'x' * 10**(m|length + 8) }}{% endif %}"
    )
    template = Template("mine", source, source="of model 'some/folder'")
    assert template.prompts([{"instruction": "later"}] * 3) == ["later"] * 3
    with pytest.raises(UserError, match="template of model 'some/folder': it "):
        template.prompts([{"instruction": "later"}] * 600 + [{"instruction": "now"}])
    with pytest.raises(RenderError, match=r"^it "):
        render(source, [{"messages": [{"content": text}]} for text in ["later"] * 600 + ["now"]])
    assert template.prompts([{"instruction": "later"}]) == ["later"]  # another process has taken over


def test_a_tokenizers_template_is_bounded_and_its_folder_named(short, demo_tokenizer, monkeypatch):
    monkeypatch.setattr(demo_tokenizer, "chat_template", "{{ messages[0].content }}{{ 'x' * 10**10 }}", raising=False)
    with pytest.raises(UserError, match="template of model 'a/b': it takes too much memory"):
        saved_template(demo_tokenizer, "model 'a/b'")
    with pytest.raises(UserError, match=r"template of the tokenizer '.*base': it takes too much memory"):
        load_template("tokenizer", demo_tokenizer)


def test_a_judges_prompt_is_bounded(short, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% set low = 0 %}{% set high = 9 %}{{ instruction }}{{ response }}{{ 'x' * 10**10 }}")
    with pytest.raises(UserError, match=r"judge prompt .*mine\.jinja: it takes too much memory"):
        load_judge_prompts([str(path)])


def test_many_texts_come_whole_and_in_order():
    texts = [f"{number} " + "é" * 100_000 for number in range(200)]  # more than one reply holds
    assert render("{{ text }}", [{"text": text} for text in texts]) == texts
    assert render("{{ text }}", []) == []


def test_after_a_fork_and_among_threads_no_reply_is_taken_for_another():
    assert render("{{ x }}", [{"x": 1}]) == ["1"]
    child = os.fork()
    if child == 0:
        os._exit(0 if render("{{ x }}", [{"x": n} for n in range(300)]) == [str(n) for n in range(300)] else 1)
    assert render("{{ x }}", [{"x": n} for n in range(1000)]) == [str(n) for n in range(1000)]
    assert os.waitpid(child, 0)[1] == 0
    wrong = []

    def work(number: int) -> None:
        wrong.extend(n for n in range(50) if render("{{ x }}", [{"x": [number, n]}]) != [f"[{number}, {n}]"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


def test_an_interrupt_in_the_middle_spoils_no_later_text():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            while True:
                render("{% for a in range(99999) %}{% endfor %}1", [{}] * 256)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render("{{ x }}", [{"x": 2}]) == ["2"]


def alive(processes: list[subprocess.Popen]) -> list[int]:
    return [process.pid for process in processes if process.poll() is None]


@pytest.fixture
def started(monkeypatch):
    """The helpers that are started from now on; there is none yet."""
    started, start = [], subprocess.Popen
    sandbox._stop()

    def popen(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(sandbox.subprocess, "Popen", popen)
    yield started
    sandbox._stop()
    assert alive(started) == []


def test_threads_that_render_first_at_the_same_time_share_one_helper(started):
    barrier, texts = threading.Barrier(6), {}

    def work(number: int) -> None:
        barrier.wait()
        texts[number] = render("{{ x }}", [{"x": number}] * 3)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert texts == {number: [str(number)] * 3 for number in range(6)}
    assert len(started) == 1


def test_a_thread_that_waits_while_another_is_interrupted_gets_its_texts(started):
    """What ends the helper under a thread that waits for it."""
    results, endless = [], "{% for a in range(99999) %}{% for b in range(999) %}{% endfor %}{% endfor %}"
    helper = sandbox._helper()

    def wait() -> None:
        while helper.lock.acquire(blocking=False):  # until the main thread asks
            helper.lock.release()
            time.sleep(0.001)
        try:
            results.extend(render("{{ x }}", [{"x": 1}]))
        except BaseException as error:
            results.append(error)

    def interrupt(*_):
        raise KeyboardInterrupt

    threads = [threading.Thread(target=wait) for _ in range(4)]
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        [thread.start() for thread in threads]
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            render(endless, [{}])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    [thread.join(20) for thread in threads]
    assert results == ["1"] * 4


def test_a_helper_that_is_ended_under_a_thread_is_an_error_of_one_line(started):
    results, endless = [], "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

    def work() -> None:
        with pytest.raises(RenderError) as error:
            render(endless, [{}])
        results.append(str(error.value))

    thread = threading.Thread(target=work)
    thread.start()
    while not started or not started[0].stdin:
        time.sleep(0.01)
    time.sleep(0.3)  # it is asked
    sandbox._helper().end()
    thread.join(20)
    assert len(results) == 1 and results[0].startswith("it was ended") and render("1", [{}]) == ["1"]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise ImportError('no Jinja here')", "ImportError: no Jinja here"),
        ("import sys; print('x' * 9_999 + '\\nlast line', file=sys.stderr); sys.exit(3)", "last line"),
        ("import sys; sys.exit(1)", "it ended with exit code 1"),
    ],
)
def test_a_helper_that_does_not_start_is_no_fault_of_the_template(program, words, started, monkeypatch, tmp_path):
    (tmp_path / "helper.py").write_text(program)
    monkeypatch.setattr(sandbox, "HELPER", tmp_path / "helper.py")
    monkeypatch.setattr(sandbox, "PATIENCE", 5.0)
    with pytest.raises(RenderError) as error:
        render("1", [{}])
    assert str(error.value) == f"the process that renders templates did not start: {words}"
    monkeypatch.setattr(sandbox.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(RenderError, match=r"^the process that renders templates did not start: .*no-python"):
        render("1", [{}])
    monkeypatch.undo()
    assert render("1", [{}]) == ["1"]


# stands for a template that got out of Jinja's sandbox: it does what is forbidden in the helper itself
ESCAPED = """
import os, sys
sys.path.insert(0, {folder!r})
import sandbox_process

def attempt(action):
    try:
        return repr(action())
    except OSError as error:
        return type(error).__name__ + str(error.errno)

def write(path, mode):
    with open(path, mode) as file:
        file.write("written")

def start():
    if os.geteuid() == 0 and {drop}:
        os.setresuid(65534, 65534, 65534)  # nobody
    child = os.fork()
    if child == 0:
        os._exit(0)
    return os.waitpid(child, 0)[1]

def answer(request):
    folder = request["source"]
    actions = {{
        "write": lambda: write(folder + "/new", "w"),
        "append": lambda: write(folder + "/old", "a"),
        "change": lambda: write(folder + "/old", "r+"),
        "start": start,
    }}
    did = {{name: attempt(action) for name, action in actions.items()}}
    return {{"texts": [did | {{"variables": dict(os.environ)}}]}}

sandbox_process.answer = answer
sandbox_process.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is promised, is promised for Linux")
@pytest.mark.parametrize("drop", [True, False], ids=["a user", "whoever runs the tests"])
def test_what_a_template_may_not_do_even_outside_of_jinjas_sandbox(drop, started, monkeypatch, tmp_path):
    for variable, value in {"OPENAI_API_KEY": "sk-test-0123456789abcdef", "HOME": "/home/me", "TZ": "UTC"}.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "old").write_text("as before")
    helper = tmp_path / "helper.py"
    helper.write_text(ESCAPED.format(folder=str(sandbox.HELPER.parent), drop=drop))
    monkeypatch.setattr(sandbox, "HELPER", helper)
    [did] = render(str(tmp_path), [{}])
    variables = did.pop("variables")
    too_large, again = f"OSError{errno.EFBIG}", f"BlockingIOError{errno.EAGAIN}"
    assert {did[name] for name in ("write", "append", "change")} == {too_large}
    assert did["start"] == ("0" if os.geteuid() == 0 and not drop else again)
    assert (tmp_path / "old").read_text() == "as before" and (tmp_path / "new").read_text() == ""
    assert set(variables) - {"LC_CTYPE"} <= {"PYTHONPATH", *sandbox.KEPT_VARIABLES} and variables["TZ"] == "UTC"
