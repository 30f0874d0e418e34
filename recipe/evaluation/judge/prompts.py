"""A judge's prompts: Jinja text files in `prompt_templates/` or of the user's own, and how the replies are read.

A scoring prompt sets its own scale, `{% set low = 0 %}{% set high = 100 %}`, and `{% set reason = true %}` if it asks
for a reason. It is given `instruction` (of a conversation, all messages before the response), `input` ("" if none),
`reference`, `response` and `fence`, a line that no text contains; `pairwise.jinja` is given `response_a` and
`response_b` instead of `response`. They are rendered in a bounded process, see `recipe.sandbox`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config import UserError
from recipe.evaluation.endpoints import writable
from recipe.evaluation.judge.reading import Verdict, read_verdict
from recipe.sandbox import RenderError, render, settings_of
from recipe.templates import transcript

BUILT_IN = Path(__file__).with_name("prompt_templates")
PAIRWISE = "pairwise"


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt with its scale; pairwise comparison has none."""

    name: str
    template: str
    digest: str
    scale: tuple[int, int] | None
    asks_reason: bool

    def messages(self, record: Mapping[str, Any], **responses: str) -> list[dict[str, str]]:
        """The chat messages that ask about `response`, or about `response_a` and `response_b`.

        Raises:
            UserError: a prompt of the user's cannot be rendered for this record.
        """
        instruction = transcript(record) or record["instruction"] or ""  # of a conversation all that was said
        texts = {"instruction": instruction, "input": record.get("input") or "", **responses}
        texts["reference"] = record["output"] or ""
        try:
            [content] = render(self.template, [{**texts, "fence": fence(texts.values())}], chat=False)
        except RenderError as error:  # the prompt fits the records it was tried on, but not this one
            raise UserError(f"judge prompt {self.name}: record {record.get('id')} cannot be shown: {error}") from error
        return [{"role": "user", "content": writable(content)}]

    def response_format(self) -> dict[str, Any]:
        """The JSON schema of a reply, for servers that can enforce one. The reason comes before the verdict."""
        properties: dict[str, Any] = {"reason": {"type": "string"}} if self.asks_reason else {}
        if self.scale is None:
            properties["winner"] = {"type": "string", "enum": ["A", "B", "tie"]}
        else:
            properties["score"] = {"type": "integer", "minimum": self.scale[0], "maximum": self.scale[1]}
        schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}

    def read(self, text: str, finish_reason: str | None, shown: Sequence[str] = ()) -> Verdict:
        """The verdict at the end of a reply, see `read_verdict`; a guess is never made.

        >>> [prompt] = load_judge_prompts(["score_0_100"])
        >>> [prompt.read(text, "stop").value for text in ('{"score": 85}', "85/100", "Score: **85**", "85 or 90")]
        [85, 85, 85, None]
        """
        return read_verdict(text, finish_reason, self.scale, shown)


def fence(texts: Any) -> str:
    """A run of equal signs longer than any in the texts.

    >>> fence(["a", "b ======= c"])
    '========'
    """
    return "=" * max(5, 1 + max((len(run) for text in texts for run in re.findall("=+", text)), default=0))


def load_judge_prompts(names: Sequence[str]) -> list[JudgePrompt]:
    """Built-in prompts by name (`score_0_100`, `rubric_1_5`, `pairwise`) and the user's own scoring prompts by path.

    Raises:
        UserError: no such prompt, two of one name, a Jinja error, no scale, or a prompt that leaves out a text.
    """
    if not names:
        raise UserError("--judge_prompts: name at least one, such as score_0_100")
    prompts = {}
    for name in names:
        path = _prompt_path(name)
        if path.stem in prompts:
            raise UserError(f"--judge_prompts: two are named {path.stem}; rename the file of one")
        try:
            prompts[path.stem] = _load(path)
        except RenderError as error:
            raise UserError(f"judge prompt {path}{f' line {error.line}' if error.line else ''}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"judge prompt {path}: {error}") from error
    return list(prompts.values())


def _prompt_path(name: str) -> Path:
    built_in = {path.stem: path for path in sorted(BUILT_IN.glob("*.jinja"))}
    path = built_in.get(name, Path(name))
    if not path.is_file():
        known = ", ".join(built_in)
        raise UserError(f"unknown judge prompt {name!r}: give one of {known} or the path of a .jinja file")
    if path.stem in built_in and path.parent != BUILT_IN:
        raise UserError(f"judge prompt {name}: {path.stem!r} is the name of a built-in one; rename the file")
    return path


def _load(path: Path) -> JudgePrompt:
    """Read a prompt and try it out, so that a prompt that cannot work is refused before anything is asked."""
    text = path.read_text(encoding="utf-8")
    is_pairwise = path == BUILT_IN / f"{PAIRWISE}.jinja"
    responses = ("response_a", "response_b") if is_pairwise else ("response",)
    texts = {name: f"the-{name}" for name in ("instruction", "input", "reference", *responses)}
    [rendered] = render(text, [{**texts, "fence": "====="}], chat=False)
    lost = [name for name, shown in texts.items() if shown not in rendered]
    if lost:
        raise UserError(f"judge prompt {path}: the prompt leaves out {', '.join(lost)}; write {{{{ {lost[0]} }}}}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if is_pairwise:
        return JudgePrompt(path.stem, text, digest, None, asks_reason=True)
    settings = settings_of(text, {**texts, "fence": "====="}, ["low", "high", "reason"])
    low, high = settings.get("low"), settings.get("high")
    if type(low) is not int or type(high) is not int or low >= high:
        raise UserError(
            f"judge prompt {path}: the scale is {low} to {high}; set two integers, "
            "{% set low = 0 %}{% set high = 100 %}, at the top of the file"
        )
    return JudgePrompt(path.stem, text, digest, (low, high), asks_reason=bool(settings.get("reason")))
