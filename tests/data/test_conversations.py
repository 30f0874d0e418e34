"""Conversations become what inference shows: each learned turn behind the prompt that the model's template renders."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_template_kinds import FAMILIES

from recipe.collator import DataCollatorWithSharedPrefix
from recipe.config import DataArguments, UserError
from recipe.data import load_records, load_splits
from recipe.data.duplicates import inspect_duplicates
from recipe.data.records import read_records
from recipe.templates import load_template
from recipe.tokens import prompt_ids, turn_of

TURNS = [
    "You are brief.",
    "Name a colour.",
    "Blue.",
    "Why?",
    "<think>\nThe sky.\n</think>\n\nOf the sky.",
    "And one?",
    "Red!",
]
ROLES = ["system", *itertools.islice(itertools.cycle(["user", "assistant"]), 6)]
LONG = [{"role": role, "content": text} for role, text in zip(ROLES, TURNS, strict=True)]
SHORT = LONG[1:3]
HI = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def settings(path: Path, **options) -> DataArguments:
    return DataArguments(data=str(path), **{"validation_ratio": 0, "test_ratio": 0, "template": "tokenizer", **options})


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refuse(path: Path, **options) -> list[str]:
    with pytest.raises(UserError) as error:
        load_records(settings(path, **options))
    return str(error.value).replace(str(path), "a").split("\n")


def examples(row: dict) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each example of a row."""
    ends = row.get("ends") or [len(row["input_ids"])]
    return [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in itertools.pairwise([0, *ends])]


def learned(row: dict) -> list[tuple[list[int], list[int]]]:
    """All that stands before each learned run of tokens, and the run."""
    found = []
    for tokens, labels in examples(row):
        start = 0
        for is_learned, run in itertools.groupby(labels, lambda label: label != -100):
            run = list(run)
            if is_learned:
                assert run == tokens[start : start + len(run)]
                found.append((tokens[:start], run))
            start += len(run)
    return found


def by_hand(tokenizer, family, messages: list[dict], last: bool = False) -> list[tuple[list[int], list[int]]]:
    """The stock tokenizer: what it renders of each history, and the turn with what ends it."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    pairs = []
    for i in turns[-1:] if last else turns:
        prompt = tokenizer.apply_chat_template(
            messages[:i], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        lead = " " if family.template == FAMILIES["Mistral"].template else ""
        response = tokenizer(lead + messages[i]["content"], add_special_tokens=False)["input_ids"]
        pairs.append((prompt, [*response, tokenizer.convert_tokens_to_ids(family.end_of_turn)]))
    return pairs


@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_is_learned_behind_what_inference_shows(name, learn, tmp_path):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}, {"messages": SHORT}, {"messages": LONG[1:]}])
    rows = load_splits(settings(path, learn=learn), tokenizer)["train"]
    for row, messages in zip(rows, (LONG, SHORT, LONG[1:]), strict=True):
        assert learned(row) == by_hand(tokenizer, family, messages, learn == "last")
        assert row["length"] == len(row["input_ids"]) == len(row["labels"]) and not row["truncated"]
        for tokens, _ in examples(row):
            assert tokens.count(tokenizer.bos_token_id) == family.begins == (tokens[0] == tokenizer.bos_token_id)
        if learn == "all":
            assert row["turns"] == sum(message["role"] == "assistant" for message in messages)
    assert ("ends" in rows.column_names) == (not family.appends and learn == "all")


def test_a_template_that_only_appends_learns_all_turns_in_one_example(tmp_path):
    """And then the row is the whole conversation, as the stock tokenizer renders it."""
    family = FAMILIES["ChatML"]
    tokenizer = family.tokenizer()
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}])
    [row] = load_splits(settings(path), tokenizer)["train"]
    whole = tokenizer.apply_chat_template(LONG, tokenize=False).removesuffix("\n")
    assert tokenizer.decode(row["input_ids"]) == whole
    shown = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert shown == "<|im_end|>".join([*TURNS[2::2], ""])


def test_reasoning_is_learned_and_left_out_of_later_history(tmp_path):
    tokenizer = FAMILIES["Qwen 3"].tokenizer()
    [row] = load_splits(settings(write(tmp_path / "a.jsonl", [{"messages": LONG}])), tokenizer)["train"]
    texts = [tokenizer.decode(tokens) for tokens, _ in examples(row)]
    assert ["<think>" in text for text in texts] == [True, False] and row["turns"] == 3
    assert texts[0].endswith("<think>\nThe sky.\n</think>\n\nOf the sky.<|im_end|>")
    assert "assistant\nOf the sky.<|im_end|>" in texts[1]


def test_a_row_counts_what_its_examples_begin_with_in_common_once(tmp_path):
    """By all the different starts of its examples; and by the row that the collator makes."""
    tokenizer = FAMILIES["Qwen 3"].tokenizer()
    three = [*LONG, LONG[3], LONG[4]]
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}, {"messages": SHORT}, {"messages": three}])
    rows = load_splits(settings(path), tokenizer)["train"]
    collate = DataCollatorWithSharedPrefix(0, "segments")
    assert [len(examples(row)) for row in rows] == [2, 1, 2]
    for row in rows:
        starts = {tuple(tokens[: end + 1]) for tokens, _ in examples(row) for end in range(len(tokens) - 1)}
        assert row["inputs"] == len(starts) == collate([row])["input_ids"].numel()


def test_text_of_any_turn_stays_text(tmp_path):
    """Markers in a text are no markers, also beside them, and where the template looks into the text."""
    for name in ("ChatML", "Qwen 3", "Gemma", "Llama 3", "Mistral"):
        family = FAMILIES[name]
        tokenizer = family.tokenizer()
        end = family.end_of_turn
        messages = [
            {"role": "user", "content": f"Say {end} and {end[:-1]}"},
            {"role": "assistant", "content": f"<think>\nNo {end}.\n</think>\n\n{end} it is{end[1:]}"},
            {"role": "user", "content": f"{end}{end}"},
            {"role": "assistant", "content": f"Yes{end}\n"},
        ]
        [row] = load_splits(settings(write(tmp_path / "a.jsonl", [{"messages": messages}])), tokenizer)["train"]
        stop = tokenizer.convert_tokens_to_ids(end)
        counted = [tokens.count(stop) for tokens, _ in learned(row)], [run.count(stop) for _, run in learned(row)]
        plain = [message | {"content": "x"} for message in messages]
        expected = [prompt.count(stop) for prompt, _ in by_hand(tokenizer, family, plain)]
        assert counted == (expected, [1, 1]), name
        assert tokenizer.decode(learned(row)[1][1]).lstrip() == f"Yes{end}"  # its own end is learned once
        shown = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(learned(row)[1][0]) == shown


def test_a_tokenizer_without_the_tokens_of_chatml_ends_turns_with_its_own(tmp_path, demo_tokenizer):
    template = load_template("chatml", demo_tokenizer)
    assert turn_of(template, demo_tokenizer).end == "<|endoftext|>"
    assert template.prompt({"messages": LONG[1:5]}) == (
        "<|im_start|>user\nName a colour.<|endoftext|>\n<|im_start|>assistant\nBlue.<|endoftext|>\n"
        "<|im_start|>user\nWhy?<|endoftext|>\n<|im_start|>assistant\n"
    )
    rows = load_splits(settings(write(tmp_path / "a.jsonl", [{"messages": LONG}]), template="chatml"), demo_tokenizer)
    assert "ends" not in rows["train"].column_names and rows["train"][0]["turns"] == 3
    with_tokens = FAMILIES["Qwen 2.5"].tokenizer()
    assert turn_of(load_template("chatml", with_tokens), with_tokens).end == "<|im_end|>"


@pytest.mark.parametrize("name", ["alpaca", "phi3", "chatml"])
def test_a_conversation_of_one_turn_has_the_tokens_of_an_instruction(name, tmp_path, demo_tokenizer):
    plain = write(tmp_path / "a.jsonl", [{"instruction": "Name a colour.", "output": "Blue."}])
    pair = write(tmp_path / "b.jsonl", [{"prompt": "Name a colour.", "completion": "Blue."}])
    chat = write(tmp_path / "c.jsonl", [{"messages": SHORT}])
    chats = write(tmp_path / "d.jsonl", [{"prompt": SHORT[:1], "completion": SHORT[1:]}])
    rows = [load_splits(settings(path, template=name), demo_tokenizer)["train"] for path in (plain, pair, chat, chats)]
    assert [row.column_names for row in rows] == [rows[0].column_names] * 4
    assert [row[0] for row in rows] == [rows[0][0]] * 4


SHAPES = {
    "messages": {"messages": HI},
    "conversations": {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    "other names": {"conversation": [{"from": "User", "value": "Hi."}, {"from": "chatgpt", "value": "Hello."}]},
    "role in conversations": {"conversations": HI},
    "from in messages": {"messages": [{"from": "human", "value": "Hi."}, {"from": "bing", "value": "Hello."}]},
    "parts": {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in HI]},
    "prompt": {"prompt": HI[:1], "completion": HI[1:]},
    "completion is text": {"prompt": HI[:1], "completion": "Hello."},
    "with a prompt beside": {"prompt": "Hi.", "prompt_id": "1", "messages": HI},
    "JSON": {"messages": json.dumps(HI)},
    "nulls": {"messages": [{**turn, "tool_calls": None, "weight": None} for turn in HI]},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_is_found_from_the_columns(shape, suffix, tmp_path):
    row, path = SHAPES[shape], tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    elif suffix == ".csv":
        cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(cells))
            writer.writeheader()
            writer.writerows([cells, cells])
    else:
        path.write_text(json.dumps([row, row]) if suffix == ".json" else f"{json.dumps(row)}\n" * 2)
    for record in load_records(settings(path))[0]["train"]:
        assert json.loads(record["messages"]) == HI
        assert (record["instruction"], record["output"]) == ("Hi.", "Hello.")


def test_a_column_of_another_name_is_named_by_a_flag(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"dialog": HI, "instruction": "x", "output": "y"}])
    assert load_records(settings(path))[0]["train"][0]["instruction"] == "x"
    assert load_records(settings(path, messages_column="dialog"))[0]["train"][0]["instruction"] == "Hi."
    path = write(tmp_path / "b.jsonl", [{"dialog": HI}])
    assert refuse(path) == [
        "a: its records are conversations, in the column 'dialog'; say so with --messages_column dialog"
    ]
    assert refuse(path, messages_column="turns") == ["a: no column 'turns' among 'dialog'"]
    path = write(tmp_path / "c.jsonl", [{"question": HI[:1], "answer": HI[1:]}])
    named = settings(path, instruction_column="question", output_column="answer")
    assert json.loads(load_records(named)[0]["train"][0]["messages"]) == HI


TOOL = {"role": "tool", "content": "3"}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}]}
BAD = [
    ([], "'messages' is empty (list []); fix it or remove the row"),
    (None, "'messages' is null or missing; write it or remove the row"),
    ("Hi.", "'messages' is 'Hi.', not JSON of a list of messages; fix it or remove the row"),
    (str(HI), None),
    (HI[:1], "'messages': no assistant turn; add one or remove the row"),
    (HI[1:], "'messages'[0] is an assistant turn before any user turn; fix it or remove the row"),
    ([HI[0], {"role": "assistant", "content": " "}], "messages[1] (assistant) is empty; write it or remove the row"),
    ([{"role": "user"}, HI[1]], "messages[0] (user) is null; write it or remove the row"),
    ([{"role": "narrator", "content": "x"}, *HI], 'messages[0] has the role "narrator"; give one of system, user '
     "(human), assistant (gpt), or remove the row"),
    ([*HI, TOOL, HI[1]], 'messages[2] has the role "tool": calls of tools and their results are not learned; remove '
     "the row"),
    ([HI[0], {**HI[1], "tool_calls": [{"id": 1}]}], "messages[1] (assistant) has 'tool_calls': calls of tools are not "
     "learned; remove the row"),
    ([IMAGE, HI[1]], "messages[0] (user) has a part of type 'image', not text; remove the row"),
    ([{"role": "user", "content": 7}, HI[1]], "messages[0] (user) is 7 (int), not text; fix it or remove the row"),
    (["Hi.", "Hello."], None),
    ([HI[0], {**HI[1], "weight": 0}], "'messages': no assistant turn that is learned; add one or remove the row"),
    ([HI[0], {**HI[1], "reasoning_content": "Hm."}], "messages[1] (assistant) has 'reasoning_content': write it into "
     "the content, between <think> marks, or remove the row"),
    ({"role": "user"}, None),
]  # fmt: skip


def test_all_that_is_wrong_is_in_one_report_by_row_and_message(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": HI}, *({"messages": value} for value, _ in BAD)])
    first, *lines = refuse(path)
    assert first.startswith(f"{len(lines)} problems") and len(lines) == len(BAD) + 1  # two messages are no objects
    said = {}
    for line in lines:
        said.setdefault(int(line.split()[2].rstrip(":")), []).append(line.partition(": ")[2])
    assert list(said) == list(range(1, len(BAD) + 1))
    for row, (_, expected) in enumerate(BAD, start=1):
        assert expected is None or said[row] == [expected]
    assert "Python's own notation" in said[4][0] and "not an object with role and content" in said[14][1]
    splits, left_out = load_records(settings(path, bad_records="drop"))
    assert len(splits["train"]) == 1 and len(left_out.bad) == len(BAD)


def test_rows_of_another_shape_are_named(tmp_path):
    plain, pair = {"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "a.jsonl", [{"messages": HI}, plain, {"messages": HI}, pair])
    mixed = "where the file's first record has 'messages'; put records of each shape into a file of their own"
    assert refuse(path)[1:] == [
        f"a row 1: has 'instruction' and 'output' {mixed}", f"a row 3: has 'prompt' and 'completion' {mixed}"
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", [plain, {"messages": HI}, pair, plain])
    assert [line.split(" where")[0] for line in refuse(path)[1:]] == [
        "a row 1: has 'messages'", "a row 2: has 'prompt' and 'completion'"
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([plain | {"messages": None}, {"messages": HI}]), path.with_suffix(".parquet"))
    [line] = refuse(path.with_suffix(".parquet"))
    assert "row 1: has 'messages' where the file's first record has 'instruction' and 'output'" in line


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_bad_first_record_does_not_lose_the_input_of_the_others(tmp_path, suffix):
    """Were its list taken for messages, all others would be conversations, which have no input."""
    good = [{"instruction": "Add.", "input": f"{number} and 1", "output": f"{number + 1}"} for number in range(3)]
    for odd in (HI[:1], [{"role": "user"}], json.dumps(HI[:1])):
        path = write(tmp_path / f"a{suffix}", [{**good[0], "instruction": odd}, *good])
        read = load_records(settings(path, bad_records="drop"))[0]["train"]
        assert read["input"][-3:] == [record["input"] for record in good] and "messages" not in read.column_names
    chats = {**good[0], "instruction": HI[:1], "output": HI[1:]}  # no text at all: messages
    path = write(tmp_path / f"b{suffix}", [{**chats, "input": ""}, *good, chats])
    said = "has the input '0 and 1' beside 'instruction', which holds messages in the file's first record"
    lines = refuse(path)[1:]
    assert len(lines) == 4 and f"row 1: {said}; put it into the messages, or remove it" in lines[0]
    read = load_records(settings(write(path, [{**chats, "input": None}] * 2)))[0]["train"]
    assert len(read) == 2 and all(read["messages"])


def test_what_a_template_refuses_is_a_bad_record(tmp_path):
    tokenizer = FAMILIES["Gemma"].tokenizer()
    twice = [LONG[1], *LONG[1:3]]
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}, {"messages": twice}, {"messages": SHORT}])
    with pytest.raises(
        UserError, match="row 1: the template refuses it: roles must alternate; fix it, remove the row, or"
    ):
        load_splits(settings(path), tokenizer)
    assert load_splits(settings(path, bad_records="drop"), tokenizer)["train"]["row"][:] == [0, 2]
    chatml = FAMILIES["ChatML"].tokenizer()  # which takes any order
    assert load_splits(settings(path), chatml)["train"]["row"][:] == [0, 1, 2]


def test_a_turn_that_a_template_leaves_out_is_said(tmp_path, demo_tokenizer):
    middle = [*LONG[1:3], {"role": "system", "content": "Be loud."}, *LONG[3:5]]
    path = write(tmp_path / "a.jsonl", [{"messages": middle}])
    with pytest.raises(UserError, match=r"row 0: the template refuses it: it leaves out messages\[2\] \(system\)"):
        load_splits(settings(path, template="alpaca"), demo_tokenizer)


def test_what_follows_the_last_answer_is_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [*HI, HI[0]]}, {"messages": HI}])
    splits, left_out = load_records(settings(path))
    assert [json.loads(text) for text in splits["train"]["messages"][:]] == [HI, HI]
    assert left_out.notes == [f"{path}: what follows the last answer is left out (1 conversations)"]


def test_turns_with_weight_0_and_those_of_a_prompt_are_history_alone(tmp_path):
    family = FAMILIES["ChatML"]
    tokenizer = family.tokenizer()
    weighed = [LONG[1], {**LONG[2], "weight": 0}, LONG[3], {**LONG[4], "weight": 1}]
    path = write(tmp_path / "a.jsonl", [{"messages": weighed}])
    prompt = write(tmp_path / "b.jsonl", [{"prompt": LONG[1:4], "completion": LONG[4:5]}])
    for each in (path, prompt):
        [row] = load_splits(settings(each), tokenizer)["train"]
        assert learned(row) == by_hand(tokenizer, family, LONG[1:5], last=True)


@pytest.mark.parametrize("overflow", ["drop", "truncate", "error"])
@pytest.mark.parametrize("name", ["ChatML", "Qwen 3"])
def test_a_limit_holds_for_each_turn_with_its_history(name, overflow, tmp_path):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}, {"messages": SHORT}])
    lengths = [len(prompt) + len(response) for prompt, response in by_hand(tokenizer, family, LONG)]
    limit = max(lengths) - 1 if lengths[2] > lengths[1] else lengths[1] - 1
    config = settings(path, max_length=limit, overflow=overflow)
    if overflow == "error":
        with pytest.raises(UserError, match=f"row 0: longer than --max_length {limit} tokens"):
            load_splits(config, tokenizer)
        return
    rows = load_splits(config, tokenizer)["train"]
    fits = [length <= limit for length in lengths]
    if overflow == "drop":
        pairs = by_hand(tokenizer, family, LONG)
        assert learned(rows[0]) == [pair for pair, does in zip(pairs, fits, strict=True) if does]
        assert rows["turns"][:] == [sum(fits), 1] and rows["turns_left_out"][:] == [3 - sum(fits), 0]
    else:
        assert rows["truncated"][:] == [True, False] and rows["turns"][:] == [3, 1]
        assert max(len(tokens) for tokens, _ in examples(rows[0])) == limit
        assert [run for _, run in learned(rows[0])] == [run for _, run in by_hand(tokenizer, family, LONG)]


@pytest.mark.parametrize("name", ["ChatML", "Qwen 3"])
def test_where_prompts_are_learned_each_token_is_learned_once(name, tmp_path):
    tokenizer = FAMILIES[name].tokenizer()
    config = settings(write(tmp_path / "a.jsonl", [{"messages": LONG}]), mask_prompt=False)
    [row] = load_splits(config, tokenizer)["train"]
    seen: list[list[int]] = []
    for tokens, labels in examples(row):
        shared = max((len(common(tokens, other)) for other in seen), default=0)
        assert labels == [-100] * shared + tokens[shared:]
        seen.append(tokens)


def common(first: list[int], second: list[int]) -> list[int]:
    return [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def test_whole_conversations_are_split_and_no_two_splits_share_one(tmp_path):
    chats = [[{"role": "user", "content": f"Say {n % 30}."}, HI[1]] for n in range(60)]
    same_end = [[{"role": "user", "content": f"I am {n}."}, HI[1], *HI] for n in range(30)]
    path = write(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats + same_end])
    splits, _ = load_records(settings(path, validation_ratio=0.2, test_ratio=0.2))
    texts = {name: set(split["messages"][:]) for name, split in splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert sum(map(len, texts.values())) == 60  # 30 equal pairs, and 30 that differ in their history alone


def talk(*texts: str, system: str = "You are brief.") -> dict:
    """A conversation about a system message and these turns."""
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *turns]}


def split_files(folder: Path, train: list[dict], test: list[dict]) -> DataArguments:
    files = {name: str(write(folder / f"{name}.jsonl", rows)) for name, rows in (("train", train), ("test", test))}
    return DataArguments(data=files, validation_ratio=0, template="tokenizer")


RIVER = ("Where is the river?", "In the north.")
LEAKS = {  # what train has of a test record: RIVER and two more turns, which leave train
    "the test record goes on": talk(*RIVER),
    "it goes on": talk(*RIVER, "How far?", "A mile.", "Is it cold?", "Yes."),
    "it goes on in another way": talk(*RIVER, "Who lives there?", "A fisher."),
    "its first answer is not learned": {
        "prompt": talk(*RIVER, "Is it deep?")["messages"],
        "completion": [{"role": "assistant", "content": "No."}],
    },
}
NO_LEAKS = {
    "the system message alone": talk("Where is the church?", "On the hill.", "How far?", "A mile."),
    "the first question alone": talk(RIVER[0], "In the south.", "How far?", "A mile."),
    "another system message": talk(*RIVER, "How far?", "A mile.", system="You are kind."),
    "a later exchange": talk("Hi.", "Hello.", "How far?", "A mile."),
}


@pytest.mark.parametrize("name", [*LEAKS, *NO_LEAKS])
def test_a_conversation_of_train_that_begins_as_one_of_test_is_a_leak(name, tmp_path):
    row, other = (LEAKS | NO_LEAKS)[name], talk("Name a fish.", "A carp.")
    if "prompt" in row:
        other = {"prompt": other["messages"][:2], "completion": other["messages"][2:]}
    files = split_files(tmp_path, [other, row], [talk(*RIVER, "How far?", "A mile.")])
    splits, left_out = load_records(files)
    leaks = name in LEAKS
    assert (splits["train"]["row"][:], left_out.duplicates) == (([0], 1) if leaks else ([0, 1], 0))
    given, _ = read_records(files)
    report, _ = inspect_duplicates(given, splits, 0, show=1)
    [across, *_] = report["splits"]
    assert (across["records_of"], across["exact"], across["same_beginning"]) == ("test", 0, int(leaks))
    if leaks:
        [pair] = across["examples"]["same_beginning"]
        assert [record["row"] for record in pair["records"]] == [0, 1]


def test_after_a_greeting_what_follows_decides(tmp_path):
    """Where conversations go on in more than three ways, that they begin alike is no leak; one step further it is."""
    hello = ("Hi!", "Hello, how can I help?")
    asked = [(f"What is {n} and {n}?", f"It is {2 * n}.") for n in range(4)]
    test = talk(*hello, *asked[0], "Thanks!", "Gladly.")
    for count, left in ((2, []), (3, [1, 2, 3])):  # three ways with test's own, and four
        train = [talk(*hello, *asked[n]) for n in range(count + 1)]  # the first is what test goes on from
        splits, left_out = load_records(split_files(tmp_path, [*train, talk("Name a fish.", "A carp.")], [test]))
        assert splits["train"]["row"][:] == [*left, count + 1] and left_out.duplicates == count + 1 - len(left)


def test_conversations_that_begin_alike_stay_in_one_split(tmp_path):
    """Unrolled turn by turn, and branched; ten of them say hello first."""
    rows = []
    for number in range(40):
        start = [*(("Hi!", "Hello.") if number % 4 == 0 else ()), f"Say {number}.", f"{number}."]
        rows += [talk(*start), talk(*start, "And now?", "No."), talk(*start, "Again!", f"{number}.", "Bye.", "Bye.")]
    path = write(tmp_path / "a.jsonl", rows)
    splits, left_out = load_records(settings(path, validation_ratio=0.2, test_ratio=0.2))
    numbers = {name: {row // 3 for row in split["row"][:]} for name, split in splits.items()}
    assert left_out.duplicates == 0 and sum(map(len, splits.values())) == 120
    assert sum(map(len, numbers.values())) == 40 and min(map(len, numbers.values())) >= 8


def test_prompts_of_evaluation_are_those_of_the_last_turn(tmp_path):
    family = FAMILIES["Llama 3"]
    tokenizer = family.tokenizer()
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}])
    [record] = load_records(settings(path))[0]["train"]
    template = replace(load_template("tokenizer", tokenizer))
    [(prompt, _)] = by_hand(tokenizer, family, LONG, last=True)
    assert prompt_ids(template, tokenizer, [record]) == [prompt]
    assert record["output"] == "Red!" and record["instruction"] == "And one?"
