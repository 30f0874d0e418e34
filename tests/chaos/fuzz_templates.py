"""Chat templates that users may hand to training: damaged ones, endless ones, and ones that are no templates."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fuzz_records import attempt
from fuzzing import ROOT, Case, damage

from recipe.config import UserError
from recipe.templates import load_template

BUILT_IN = ROOT / "recipe" / "chat_templates"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# a response of which the prompt's end is a beginning, and the input in the content
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}[assistant]{% endif %}"
REFUSED = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls itself": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "memory": "{{ 'x' * 10**10 }}",
    "memory of lists": "{{ [0] * 10**10 }}",
    "wide number": "{{ '%1000000000d' % 1 }}",
    "power": "{{ 9**9**9 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "nested lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "long sum": "{{ " + "1+" * 20_000 + "1 }}",
    "many digits": "{{ " + "9" * 5000 + " }}",
    "raises": "{{ raise_exception('no\x1b[31m' ~ 'x' * 100000) }}",
    "divides by 0": "{{ 1 / 0 }}",
    "undefined": "{{ nothing.at.all }}",
    "calls nothing": "{{ nothing() }}",
    "no filter": "{{ 1 | nothing }}",
    "no test": "{{ 1 is nothing }}",
    "no tag": "{% nothing %}",
    "includes": "{% include '/etc/passwd' %}",
    "extends": "{% extends messages %}",
    "imports": "{% from 'a' import b %}",
    "unclosed": "{% for m in messages %}",
    "unclosed text": "{{ 'x }}",
    "unclosed comment": "{# ",
    "no text": "",
    "blank": " \n",
    "constant": "hello",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "no UTF-8": "{{ messages }}\udcff",
    "UTF-16": "\udcff\udcfe{\0{\0",
    "half a character": "{{ '\\ud800' }}{{ messages[0].content }}",
    "half a character alone": "{{ '\\ud800' }}" + TURNS,
    "changes the instruction": TURNS.replace("m.content", "m.content|reverse"),
    "loses the response": "{{ messages[0].content }}[x]",
    "text between": TURNS.replace("[{{", "{% if loop.last and not add_generation_prompt %}?{% endif %}[{{"),
    "a folder": "",
}
READ = {
    "chatml": CHATML,
    "turns": TURNS,
    "carriage returns": TURNS.replace("[", "\r\n["),
    "byte order mark": "\ufeff" + TURNS,
    "null characters": TURNS.replace("[", "\0["),
    "control characters": TURNS.replace("[", "\x1b[31m["),
    "undefined is blank": "{{ nothing }}" + TURNS,
    "generation": TURNS.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
    "break": TURNS + "{% for i in range(9) %}{% break %}{% endfor %}",
    "raw": "{% raw %}{{ }}{% endraw %}" + TURNS,
    "emoji": TURNS.replace("[", "\U0001f600"),
    "comment": "{# " + "x" * 100_000 + " #}" + TURNS,
    "last lines": TURNS + "{% if not add_generation_prompt %}\n\n{% endif %}",
    "alpaca": (BUILT_IN / "alpaca.jinja").read_text(encoding="utf-8"),
    "phi3": (BUILT_IN / "phi3.jinja").read_text(encoding="utf-8"),
}
EXPRESSIONS = [
    "m", "m.content", "messages", "loop", "loop.index0", "messages[-1]", "add_generation_prompt", "bos_token", "1",
    "'x'",
    "none", "[1, 2]", "{'a': m}", "range(9)", "self", "super()", "caller()", "varargs", "cycler(1)", "lipsum()",
    "dict(a=1)",
    "namespace(a=1)", "joiner()", "strftime_now('%Y')", "strftime_now(1)", "messages|tojson(indent=99)", "m|items|list",
    "m|dictsort", "m.content|int", "m.content[::0]", "m.content[:-1]", "'%s' % m", "m.content|replace('a', 'b')", "-m",
    "m < 1", "m ** 2", "messages|sum", "messages|map('nothing')|list", "messages|groupby('role')|list", "m.pop('role')",
    "messages.append(1)", "m.content.format(m)", "m.content|format(1, 2)", "'{}'.format_map(m)", "m|xmlattr", "m|e",
    "m|attr('__class__')", "''|attr('format')", "m.content.encode()", "(messages|length) * 'x'", "m|urlize",
    "1.0|round(400)",
]  # fmt: skip
BLOCKS = [
    "{{{{ {a} }}}}", "{{% if {a} %}}{{{{ {b} }}}}{{% endif %}}", "{{% for x in {a} %}}{{{{ x }}}}{{% endfor %}}",
    "{{% set y = {a} %}}",
    "{{% set y %}}{{{{ {a} }}}}{{% endset %}}", "{{% call({a}) x() %}}{{% endcall %}}",
    "{{% filter upper %}}{{{{ {a} }}}}{{% endfilter %}}",
    "{{% macro x(a={a}) %}}{{{{ a }}}}{{% endmacro %}}{{{{ x() }}}}", "{{% with z = {a} %}}{{{{ z }}}}{{% endwith %}}",
    "{{{{ ({a}) ~ ({b}) }}}}", "{{{{ ({a}) if ({b}) }}}}", "{{% block x %}}{{{{ {a} }}}}{{% endblock %}}",
    "{{% generation %}}{{{{ {a} }}}}{{% endgeneration %}}",
]  # fmt: skip


class Maker:
    """Makes templates, from a seed; `read` is that of fuzz_records.py."""

    def __init__(self, read: Callable, seed: str) -> None:
        self.read, self.draw = read, random.Random(seed)
        self.files = [text.encode("utf-8", "surrogateescape") for text in [*READ.values(), *REFUSED.values()]]
        self.files = [content for content in self.files if len(content) < 10_000]

    def known(self) -> Case:
        refused = self.draw.random() < 0.6
        name, text = self.draw.choice([*(REFUSED if refused else READ).items()])
        return self._case(
            f"{'refused' if refused else 'read'}: {name}",
            text.encode("utf-8", "surrogateescape"),
            expected="refused" if refused else "read",
        )

    def written(self) -> Case:
        parts = [
            self.draw.choice(BLOCKS).format(a=self.draw.choice(EXPRESSIONS), b=self.draw.choice(EXPRESSIONS))
            for _ in range(self.draw.randint(1, 3))
        ]
        text = TURNS.replace("{{ m.content }}", "{{ m.content }}".join(self.draw.sample([*parts, ""], len(parts) + 1)))
        return self._case("written", text.encode())

    def damaged(self) -> Case:
        return self._case("damaged", damage(self.draw, self.draw.choice(self.files[:15]), self.files))

    def _case(self, kind: str, content: bytes, expected: str = "") -> Case:
        records = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in ("\x00", "é{{ 1 }}")]
        files = {"records.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode()}
        path = "own.jinja/x" if kind.endswith("a folder") else "own.jinja"
        settings = {"data": "records.jsonl", "template": "own.jinja", "max_length": 100_000}
        return Case(
            kind, content, partial(_attempt, partial(attempt, self.read, files | {path: content}, None, settings)),
            expected, words=("template", "own.jinja"),
        )  # fmt: skip

    def cases(self, count: int) -> list[Case]:
        kinds = [self.known, self.written, self.damaged]
        return [make() for make in self.draw.choices(kinds, [30, 35, 35], k=count)]


def _attempt(read: Callable[[Path], None], folder: Path) -> None:
    read(folder)
    template = load_template("own.jinja")
    record = {"instruction": "a", "input": "b", "output": "c"}
    if not template.conversation(record).startswith(template.prompt(record)):
        raise UserError("template own.jinja: the prompt is no beginning of the conversation")
