"""Renders records as prompts, with the Jinja chat template that is saved with the tokenizer.

Training, evaluation and `apply_chat_template` of the saved tokenizer all render this one template.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from recipe.config import UserError

BUILT_IN = Path(__file__).with_name("chat_templates")
SAMPLE = {"instruction": "the-instruction", "input": "the-input", "output": "the-output"}
BEGIN = "{#- This model's prompts begin with its begin-of-text token. -#}{{- bos_token }}"


def to_messages(record: Mapping[str, str | None]) -> list[dict[str, str]]:
    """The chat messages of a record's prompt; the record's input is a key of its own beside the content.

    >>> to_messages({"instruction": "Make it plural.", "input": "cat", "output": "cats"})
    [{'role': 'user', 'content': 'Make it plural.', 'input': 'cat'}]
    """
    return [{"role": "user", "content": record["instruction"] or "", "input": record.get("input") or ""}]


@dataclass(frozen=True)
class Template:
    """A Jinja chat template and the prompts it renders.

    >>> load_template("phi3").prompt({"instruction": "Make it plural.", "input": "cat"})
    '<|user|>\\nMake it plural.\\ncat\\n<|assistant|>\\n'
    """

    name: str
    chat_template: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... by name

    def prompt(self, record: Mapping[str, str | None]) -> str:
        """The text before the response."""
        return self.prompts([record])[0]

    def prompts(self, records: Iterable[Mapping[str, str | None]]) -> list[str]:
        """`prompt` of many records."""
        conversations = [to_messages(record) for record in records]
        return _render(conversations, self.chat_template, add_generation_prompt=True, **self.special_tokens)

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
    """A built-in template (`alpaca`, `phi3`) or your own `.jinja` file, checked on a sample record.

    Args:
        tokenizer: gives the special tokens, for templates that name them, and its rule about the beginning of a text:
            see `Template.for_tokenizer`.

    Raises:
        UserError: no such template, a Jinja error, a template that loses the instruction, the input or the response,
            or one that puts text between the prompt and the response.
    """
    path = BUILT_IN / f"{name_or_path}.jinja"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in BUILT_IN.glob("*.jinja")))
        raise UserError(f"unknown template {name_or_path!r}: give one of {names} or the path of a .jinja file")
    try:
        template = Template(name_or_path, path.read_text(encoding="utf-8-sig"))  # editors of Windows write a BOM
        if tokenizer is not None:
            template = template.for_tokenizer(tokenizer)
        _check(template)
    except UnicodeDecodeError as error:
        raise UserError(f"template {path}: it is not UTF-8 text ({error}); save it as UTF-8") from error
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, OSError) as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"template {path}{f' line {line}' if line else ''}: {error}") from error
    return template


def _check(template: Template) -> None:
    """Refuse a template that loses a field of a record, or that adds text between its prompt and its response."""
    record, prompt = SAMPLE, template.prompt(SAMPLE)
    for part, variable in (("instruction", "message.content"), ("input", "message.input")):
        if record[part] not in prompt:
            raise UserError(
                f"template {template.name}: the prompt loses the record's {part}; write {{{{ {variable} }}}}"
            )
    conversation = [*to_messages(record), {"role": "assistant", "content": record["output"]}]
    [rendered] = _render([conversation], template.chat_template, **template.special_tokens)
    if not rendered.startswith(prompt + record["output"]):
        raise UserError(
            f"template {template.name}: a whole conversation must begin with the prompt and the response\n"
            f"  prompt and response: {prompt + record['output']!r}\n  conversation:        {rendered!r}"
        )


def _render(conversations: list, chat_template: str, **variables: Any) -> list[str]:
    # transformers documents only `apply_chat_template`, which needs a tokenizer; this is the function it calls
    rendered: Any = render_jinja_template(conversations, chat_template=chat_template, **variables)
    return rendered[0]
