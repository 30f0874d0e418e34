"""Renders records as prompts, with the Jinja chat template that is saved with the tokenizer.

Training, evaluation and `apply_chat_template` of the saved tokenizer all render this one template. Templates of other
models (ChatML, Llama, Gemma, ...) know nothing of a record's input: there it stands in the content of the message.
A template is a program of somebody else: it is rendered in a bounded process, see `recipe.sandbox`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recipe.config import UserError
from recipe.sandbox import RenderError, render

OWN = "tokenizer"  # the name of the template that a tokenizer brings
BUILT_IN = Path(__file__).with_name("chat_templates")
SAMPLE = {"instruction": "the-instruction", "input": "the-input", "output": "the-output"}
BEGIN = "{#- This model's prompts begin with its begin-of-text token. -#}{{- bos_token }}"


def to_messages(record: Mapping[str, str | None]) -> list[dict[str, str]]:
    """The chat messages of a record's prompt; the record's input is a key of its own beside the content.

    >>> to_messages({"instruction": "Make it plural.", "input": "cat", "output": "cats"})
    [{'role': 'user', 'content': 'Make it plural.', 'input': 'cat'}]
    """
    return [{"role": "user", "content": record["instruction"] or "", "input": record.get("input") or ""}]


def message_text(record: Mapping[str, str | None]) -> str:
    """A record as the content of one message, for servers and templates that read nothing else of a message.

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

    def messages(self, record: Mapping[str, str | None]) -> list[dict[str, str]]:
        """The chat messages that this template, and `apply_chat_template` with it, renders to the record's prompt."""
        if self.input_in_content:
            return [{"role": "user", "content": message_text(record)}]
        return to_messages(record)

    def prompt(self, record: Mapping[str, str | None]) -> str:
        """The text before the response."""
        return self.prompts([record])[0]

    def prompts(self, records: Iterable[Mapping[str, str | None]]) -> list[str]:
        """`prompt` of many records.

        Raises:
            UserError: the template refuses a record, or needs more than its share of time, memory or length.
        """
        return self._render([self.messages(record) for record in records], add_generation_prompt=True)

    def conversation(self, record: Mapping[str, str | None]) -> str:
        """The whole text: prompt, response, and what the template puts behind it."""
        [text] = self._render([[*self.messages(record), {"role": "assistant", "content": record["output"] or ""}]])
        return text

    def _render(self, conversations: Sequence[list[dict[str, str]]], add_generation_prompt: bool = False) -> list[str]:
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            contexts = [{"messages": messages} for messages in conversations]
            texts = render(self.chat_template, contexts, variables | dict(self.special_tokens))
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
        template = replace(
            self, chat_template=self.chat_template.removeprefix(BEGIN), special_tokens=tokenizer.special_tokens_map
        )
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
        name_or_path: `alpaca`, `phi3`, `tokenizer` (the chat template that the tokenizer brings), or the path of a
            `.jinja` file.
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
        raise UserError(f"{subject} has no chat template of its own; give alpaca, phi3 or the path of a .jinja file")
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
    expected, rendered = template.prompt(SAMPLE) + SAMPLE["output"], template.conversation(SAMPLE)
    if not rendered.startswith(expected):
        raise UserError(
            f"template {template.source}: a whole conversation must begin with the prompt and the response\n"
            f"  prompt and response: {expected[:300]!r}\n  conversation:        {rendered[:300]!r}"
        )
