"""Renders records as prompts, with the Jinja chat template that is saved with the tokenizer.

Training, evaluation and `apply_chat_template` of the saved tokenizer all render this one template. Templates of other
models (ChatML, Llama, Gemma, ...) know nothing of a record's input: there it stands in the content of the message.
A record may be a conversation, in `messages`; its last message is the response.
A template is a program of somebody else: it is rendered in a bounded process, see `recipe.sandbox`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from recipe.config import UserError
from recipe.sandbox import RenderError, render

OWN = "tokenizer"  # the name of the template that a tokenizer brings
BUILT_IN = Path(__file__).with_name("chat_templates")
SAMPLE = {"instruction": "the-instruction", "input": "the-input", "output": "the-output"}
END_OF_TURN = "<|im_end|>"
CHATML_END = "{%- set end_of_turn = '<|im_end|>' -%}"  # as in chatml.jinja
EMPTY_REASONING = re.compile(r"\s*(?:<think>\s*</think>\s*)?")  # as Qwen 3 writes before an answer without reasoning
BEGIN = "{#- This model's prompts begin with its begin-of-text token. -#}{{- bos_token }}"


def to_messages(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The chat messages of a record's prompt; the record's input is a key of its own beside the content.

    >>> to_messages({"instruction": "Make it plural.", "input": "cat", "output": "cats"})
    [{'role': 'user', 'content': 'Make it plural.', 'input': 'cat'}]
    """
    if turns := conversation_of(record):
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns[:-1]]
    return [{"role": "user", "content": record["instruction"] or "", "input": record.get("input") or ""}]


def conversation_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record that is a conversation, from a list or JSON of it; none of another record."""
    turns = record.get("messages") or []
    return json.loads(turns) if isinstance(turns, str) else turns


def plain_messages(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The chat messages of a record's prompt, for servers and templates that read nothing but role and content."""
    if conversation_of(record):
        return to_messages(record)
    return [{"role": "user", "content": message_text(record)}]


def transcript(record: Mapping[str, Any], last: bool = True) -> str:
    """The messages before a response as one text to look at; empty if there is only a question.

    >>> roles = ("system", "user", "assistant")
    >>> transcript({"messages": [{"role": role, "content": f"the-{role}"} for role in roles]})
    'system: the-system\\n\\nuser: the-user'

    Args:
        last: with the question that is answered.
    """
    turns = to_messages(record) if conversation_of(record) else []
    shown = turns if last else turns[:-1]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in shown) if len(turns) > 1 else ""


def message_text(record: Mapping[str, Any]) -> str:
    """Instruction and input as the content of one message.

    The Alpaca template renders this text to the prompt of training.

    >>> message_text({"instruction": "Make it plural.", "input": "cat"})
    'Make it plural.\\n\\n### Input:\\ncat'
    """
    return (record["instruction"] or "") + (f"\n\n### Input:\n{record['input']}" if record.get("input") else "")


@dataclass(frozen=True)
class Template:
    """A Jinja chat template and the prompts it renders.

    >>> load_template("phi3").prompt({"instruction": "Make it plural.", "input": "cat"})
    '<|user|>\\nMake it plural.\\ncat\\n<|assistant|>\\n'
    """

    name: str
    chat_template: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... by name
    input_in_content: bool = False  # because the template reads nothing of a message but its content
    source: str = field(default="", repr=False, compare=False)  # where it is from, for messages; default: its name

    def messages(self, record: Mapping[str, Any]) -> list[dict[str, str]]:
        """The chat messages that this template, and `apply_chat_template` with it, renders to the record's prompt."""
        return plain_messages(record) if self.input_in_content else to_messages(record)

    def prompt(self, record: Mapping[str, Any]) -> str:
        """The text before the response."""
        return self.prompts([record])[0]

    def prompts(self, records: Iterable[Mapping[str, Any]]) -> list[str]:
        """`prompt` of many records.

        Raises:
            UserError: the template refuses a record, or needs more than its share of time, memory or length.
        """
        return self.render([self.messages(record) for record in records], add_generation_prompt=True)

    def conversation(self, record: Mapping[str, Any]) -> str:
        """The whole text: prompt, response, and what the template puts behind it."""
        [text] = self.render([[*self.messages(record), {"role": "assistant", "content": record["output"] or ""}]])
        return text

    def render(
        self,
        chats: Sequence[Sequence[Mapping[str, str]]],
        add_generation_prompt: bool = False,
        refused: dict[int, str] | None = None,
    ) -> list[str]:
        """The text of each list of messages; those that the template refuses are empty, and said in `refused`."""
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            contexts = [{"messages": messages} for messages in chats]
            texts = render(self.chat_template, contexts, variables | dict(self.special_tokens), refused=refused)
            "".join(texts).encode()
        except RenderError as error:
            where = f" line {error.line}" if error.line else ""
            raise UserError(f"template {self.source or self.name}{where}: {error}") from error
        except UnicodeEncodeError as error:
            said = f"it writes half a character ({error.object[error.start]!a}); remove it"
            raise UserError(f"template {self.source or self.name}: {said}") from error
        return texts

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """This template with the special tokens of a tokenizer, and with its rule about the beginning.

        If the tokenizer itself begins with its begin-of-text token (Llama, Gemma), so does each prompt, once. GPT-2's
        does not.
        """
        source = self.chat_template.removeprefix(BEGIN)
        if END_OF_TURN not in tokenizer.get_added_vocab():  # of our own chatml alone: it stops where it can
            source = source.replace(CHATML_END, CHATML_END.replace(f"'{END_OF_TURN}'", "eos_token"))
        template = replace(self, chat_template=source, special_tokens=tokenizer.special_tokens_map)
        if not begins_with_bos(tokenizer) or template.prompt(SAMPLE).lstrip().startswith(str(tokenizer.bos_token)):
            return template
        # Jinja removes blanks before a first block only where nothing stands before them
        source = re.sub(r"\A[ \t]+(?=\{[%#])", "", template.chat_template)
        return replace(template, chat_template=BEGIN + source)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own rule is to put its begin-of-text token in front."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences begin with; none if there is only one sequence.

    >>> common_prefix([[5, 6, 7], [5, 6, 8, 9], [5, 6]])
    [5, 6]
    """
    if len(sequences) < 2:
        return []
    first, last = min(sequences), max(sequences)  # in lexicographic order: what these two share, all share
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in pairs]


def load_template(name_or_path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Template:
    """A template to train with, checked on a sample record: built-in, the tokenizer's own, or a file of yours.

    Args:
        name_or_path: `alpaca`, `phi3`, `chatml`, `tokenizer` (the chat template that the tokenizer brings), or the path
            of a `.jinja` file.
        tokenizer: gives the special tokens, for templates that name them, and its rule about the beginning of a text:
            see `Template.for_tokenizer`.

    Raises:
        UserError: no such template, a Jinja error, a template that loses the instruction, the input or the response,
            or one that puts text between the prompt and the response.
    """
    if name_or_path == OWN and tokenizer is not None:
        template = saved_template(tokenizer, _subject(tokenizer))
    else:
        path = _template_path(name_or_path)
        try:
            source = path.read_text(encoding="utf-8-sig")  # editors of Windows write a BOM
        except UnicodeDecodeError as error:
            raise UserError(f"template {path}: it is not UTF-8 text ({error}); save it as UTF-8") from error
        except OSError as error:
            raise UserError(f"template {path}: {error}") from error
        template = _prepare(Template(name_or_path, source, source=str(path)), tokenizer)
    _check_response(template)
    return template


def saved_template(tokenizer: PreTrainedTokenizerBase, subject: str = "the tokenizer") -> Template:
    """The chat template that a tokenizer brings, to ask its model with; the `default` one if it has several.

    Nothing is asked of what it does to responses, since some templates of others strip or move them.

    Raises:
        UserError: it has none, or the prompt of a sample record fails or loses its instruction or its input.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{subject} has no chat template of its own; give alpaca, phi3, chatml or the path of a .jinja file"
        )
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:  # several, none of them the default
        raise UserError(f"template of {subject}: {' '.join(str(error).split())}") from error
    return _prepare(Template(OWN, source, source=f"of {subject}"), tokenizer)


def _subject(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "the tokenizer"


def _template_path(name_or_path: str) -> Path:
    built_in = BUILT_IN / f"{name_or_path}.jinja"
    path = built_in if built_in.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in BUILT_IN.glob("*.jinja")))
        raise UserError(
            f"unknown template {name_or_path!r}: give one of {names}, {OWN} (its own), or the path of a .jinja file"
        )
    return path


def _prepare(template: Template, tokenizer: PreTrainedTokenizerBase | None) -> Template:
    """The template for a tokenizer, with the input where the template shows it; refused if a field is lost."""
    if tokenizer is not None:
        template = template.for_tokenizer(tokenizer)
    if SAMPLE["input"] not in template.prompt(SAMPLE):
        template = replace(template, input_in_content=True)
    prompt = template.prompt(SAMPLE)
    for part, variable in (("instruction", "message.content"), ("input", "message.input")):
        if SAMPLE[part] not in prompt:
            raise UserError(
                f"template {template.source}: the prompt loses the record's {part}; write {{{{ {variable} }}}}"
            )
    return template


def _check_response(template: Template) -> None:
    """Refuse a template that adds text between its prompt and its response, or loses the response."""
    prompt, rendered = template.prompt(SAMPLE), template.conversation(SAMPLE)
    between = rendered.removeprefix(prompt).partition(SAMPLE["output"])[0]
    if not rendered.startswith(prompt) or SAMPLE["output"] not in rendered or not EMPTY_REASONING.fullmatch(between):
        raise UserError(
            f"template {template.source}: a whole conversation must begin with the prompt and the response\n"
            f"  prompt and response: {(prompt + SAMPLE['output'])[:300]!r}\n  conversation:        {rendered[:300]!r}"
        )
