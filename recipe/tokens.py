"""Records as token ids: their text is never read as a special token, the markers of their template are.

Training, generation and likelihood take prompts and responses from here, so that they cannot differ.

Few texts spell a special token (`It is <|endoftext|> in GPT-2.`); one search over a batch finds them. They are encoded
by a copy of the tokenizer that reads special tokens as text and knows each marker of the template by another name. A
prompt stays one text there, so what the tokenizer does at its beginning and beside a marker is as always.
"""

from __future__ import annotations

import functools
import itertools
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from recipe.config import UserError
from recipe.templates import SAMPLE, Template

Record = Mapping[str, Any]
Chat = Sequence[Mapping[str, str]]
Pieces = list[tuple[str, bool]]  # of a text that spells special tokens, each with whether it is a marker
# a character to hide a spelling behind: of private use, or one that each normalizer keeps
HIDING = [chr(code) for code in (*range(0xE000, 0xF900), *range(0x2580, 0x2600))]
WHOLE_TEXT = re.compile(r"\S(?:.*\S)?", re.DOTALL)  # without blanks around it, by which a template may go


class FlatTokens(NamedTuple):
    """The tokens of many texts one after another, (tokens,) int32, and how many each text has, (texts,) int64.

    No lists: thousands of them keep Python's garbage collector busy.

    `unreadable` are the indices of texts that spell a special token which the tokenizer cannot read as text, and it:
    their tokens are not to be used. `refused` are those of prompts that the template refuses, and what it says.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    unreadable: Mapping[int, str] = types.MappingProxyType({})
    refused: Mapping[int, str] = types.MappingProxyType({})

    def lists(self) -> list[list[int]]:
        """The tokens of each text."""
        return [row.tolist() for row in np.split(self.tokens, self.lengths.cumsum())[:-1]]


class Turn(NamedTuple):
    """How a template writes the response behind its prompt.

    `end` is the special token at which generation stops; `lead` and `tail` are what stands before the response and
    between it and that token; `strips` says whether blanks at the response's beginning and at its end are removed.
    """

    end: str
    lead: str = ""
    tail: str = ""
    strips: tuple[bool, bool] = (False, False)

    def text(self, response: str, eos_token: str) -> str:
        """A response as it is learned, without its end; empty if it is nothing else."""
        text = without_end(response, eos_token, self.end)
        text = text.lstrip() if self.strips[0] else text
        text = text.rstrip() if self.strips[1] else text
        return f"{self.lead}{text}{self.tail}" if text else ""


def turn_of(template: Template, tokenizer: PreTrainedTokenizerBase) -> Turn:
    """What the template puts around the last response, found by rendering one.

    The end is the first special token behind the response; where there is none, the end-of-text token.
    """
    eos_token, output, blank = str(tokenizer.eos_token), SAMPLE["output"], " \n "
    template = template.for_tokenizer(tokenizer)
    try:
        prompt, rendered = template.prompt(SAMPLE), template.conversation(SAMPLE)
        padded = template.conversation({**SAMPLE, "output": f"{blank}{output}{blank}"})
    except UserError:  # a template of others, which may take no response at all
        return Turn(eos_token)
    before, found, behind = rendered.rpartition(output)
    if not found:
        return Turn(eos_token)
    lead = before.removeprefix(prompt)
    end = any_of(special_tokens(tokenizer)).search(behind)
    return Turn(
        end[0] if end else eos_token,
        lead if before.startswith(prompt) and lead.isspace() else "",
        behind[: end.start()] if end else "",
        (f"{blank}{output}" not in padded, f"{output}{blank}" not in padded),
    )


def prompt_ids(template: Template, tokenizer: PreTrainedTokenizerBase, records: Iterable[Record]) -> list[list[int]]:
    """The token ids of each record's prompt, as in training.

    They begin with the tokenizer's begin-of-text token if its own rule is to begin with it.

    Raises:
        UserError: the template refuses a record, or one spells a special token that this tokenizer cannot read as text.
    """
    records = list(records)
    prompts = encode_prompts(template, tokenizer, records)
    for index, said in prompts.refused.items():
        name = records[index].get("id", f"row {records[index].get('row', index)}")
        raise UserError(f"template {template.source or template.name}: {said} ({name})")
    _refuse_unreadable(prompts, [record.get("id", f"row {record.get('row', i)}") for i, record in enumerate(records)])
    return prompts.lists()


def response_ids(
    tokenizer: PreTrainedTokenizerBase, responses: Iterable[str], turn: Turn | None = None
) -> list[list[int]]:
    """The token ids of each response and of its end, as in training; without `turn` that is the end-of-text token.

    Raises:
        UserError: a response spells a special token, and this tokenizer cannot read it as text.
    """
    encoded = encode_responses(tokenizer, list(responses), turn)
    _refuse_unreadable(encoded, [f"row {index}" for index in range(len(encoded.lengths))])
    return encoded.lists()


def as_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    """Prompts as token ids: ids as they are, and texts tokenized whole, with the special tokens that they spell."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [[*prompt] for prompt in prompts]  # type: ignore[list-item]
    return _encode(tokenizer, texts).lists()


def without_end(response: str, *ends: str) -> str:
    """A response without the end-of-text tokens written at its end, as data made for another trainer has them.

    >>> without_end("It is </s> here.</s>\\n", "</s>")
    'It is </s> here.'
    """
    while found := next((end for end in ends for text in (response, response.rstrip()) if text.endswith(end)), ""):
        response = (response if response.endswith(found) else response.rstrip()).removesuffix(found)
    return response if response.strip() else ""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of each special token by its text: flagged ones, and those with a role such as `eos_token`."""
    flagged = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {text: index for text, index in [*flagged.items(), *named] if text}


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds each of the texts, the longest where several begin; nothing if there are none."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def encode_prompts(template: Template, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> FlatTokens:
    """`prompt_ids` as flat arrays; what is wrong with prompts is in `unreadable` and `refused`."""
    return encode_chats(template, tokenizer, [template.messages(record) for record in records])


def encode_chats(template: Template, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> FlatTokens:
    """`encode_prompts` of lists of messages, each with `content` and perhaps an `input`."""
    template, special = template.for_tokenizer(tokenizer), any_of(special_tokens(tokenizer))
    if any(message["role"] == "assistant" for chat in chats for message in chat):
        ends = str(tokenizer.eos_token), turn_of(template, tokenizer).end
        chats = [[_without_ends(message, ends) for message in chat] for chat in chats]
    refused: dict[int, str] = {}
    prompts = template.render(chats, True, refused)
    refused |= {index: said for index, chat in enumerate(chats) if (said := _lost(chat, prompts[index]))} | refused
    texts = ["\n".join(text for message in chat for text in _texts(message)) for chat in chats]
    touching = _fields_touch(template, special_tokens(tokenizer))
    spelling = _which_spell(texts, special, tokenizer)
    found = [*range(len(texts))] if touching else spelling
    if not found:
        return _encode(tokenizer, prompts)._replace(refused=refused)
    mark = _unused_character([*texts, template.chat_template], tokenizer)
    hidden: list[str] = []

    def hide(match: re.Match) -> str:
        hidden.append(match[0])
        return f"{mark}{len(hidden) - 1};"

    def render_hidden(indices: Sequence[int], pattern: re.Pattern[str]) -> list[str]:
        shown = [
            [
                {**message} | {key: pattern.sub(hide, message[key]) for key in ("content", "input") if key in message}
                for message in chats[index]
            ]
            for index in indices
        ]
        return template.render(shown, True, {})

    apart = dict(zip(found, render_hidden(found, WHOLE_TEXT if touching else special), strict=True))
    if touching:  # most records need no care: their prompts have the template's markers alone
        others = (i for i in found if special.findall(prompts[i]) != special.findall(apart[i]))
        found = sorted({*spelling, *others})
    reveal = functools.partial(re.sub, f"{mark}(\\d+);", lambda match: hidden[int(match[1])])
    # a template may look into a text, for reasoning to leave out; then only the special tokens in it are hidden
    looked_into = [index for index in found if touching and reveal(apart[index]) != prompts[index]]
    apart |= zip(looked_into, render_hidden(looked_into, special), strict=True)
    spelled = {index: _split_at_markers(apart[index], special, mark, hidden) for index in found}
    return _encode(tokenizer, prompts, spelled, mark)._replace(refused=refused)


def _texts(message: Mapping[str, str]) -> list[str]:
    return [message["content"], message.get("input", "")]


def _without_ends(message: Mapping[str, str], ends: Iterable[str]) -> Mapping[str, str]:
    if message["role"] != "assistant":
        return message
    return {**message, "content": without_end(message["content"], *ends)}


def _lost(chat: Chat, prompt: str) -> str | None:
    """What is said of a conversation of which a prompt lacks a turn; reasoning of the assistant may be left out."""
    for index, message in enumerate(chat) if len(chat) > 1 else ():
        if message["role"] != "assistant" and message["content"].strip() not in prompt:
            return f"it leaves out messages[{index}] ({message['role']})"
    return None


def _fields_touch(template: Template, special: Iterable[str]) -> bool:
    """Whether a special token could begin in a text and end beside it: in another text, or in the template."""
    fields, characters = ("\ue000", "\ue001", "\ue002"), set().union(*special)
    samples = [{"instruction": a, "input": b} for a in (fields[0], "") for b in (fields[1], "")]
    chats = [template.messages(sample) for sample in samples]
    for roles in (("user", "assistant", "user"), ("system", "user")):
        chats.append([{"role": role, "content": text} for role, text in zip(roles, fields, strict=False)])
    return any(
        prompt[place : place + 1] in characters or prompt[place : place + 1] in fields
        for prompt in template.render(chats, True, {})
        for field in fields
        if (index := prompt.find(field)) >= 0
        for place in (*([index - 1] if index else []), index + 1)
        if place < len(prompt)
    )


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str], turn: Turn | None = None
) -> FlatTokens:
    """`response_ids` as flat arrays; what cannot be read as text is in `unreadable`."""
    special, eos_token = any_of(special_tokens(tokenizer)), str(tokenizer.eos_token)
    turn = turn or Turn(eos_token)
    texts = [turn.text(response, eos_token) for response in responses]
    found = _which_spell(texts, special, tokenizer)
    mark = _unused_character(texts, tokenizer) if found else ""
    tokens, lengths, unreadable, _ = _encode(
        tokenizer, texts, {index: [(texts[index], False)] for index in found}, mark
    )
    return FlatTokens(np.insert(tokens, lengths.cumsum(), end_id(tokenizer, turn)), lengths + 1, unreadable)


def end_id(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> int:
    """The token that ends a response."""
    return special_tokens(tokenizer)[turn.end]


def _which_spell(texts: Sequence[str], special: re.Pattern[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The indices of the texts that spell a special token."""
    if any(token.special and token.normalized for token in tokenizer.added_tokens_decoder.values()):
        return [*range(len(texts))]  # such a token is looked for in the normalized text: take no chances
    if not special.search("\n".join(texts)):
        return []
    return [index for index, text in enumerate(texts) if special.search(text)]


def _unused_character(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """A character that no text has, and that the tokenizer does not remove."""
    used = set().union(*texts, *special_tokens(tokenizer))
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    normal = normalizer.normalize_str if normalizer is not None else str
    return next(mark for mark in HIDING if mark not in used and normal(f"{mark}0{mark}") != normal("0"))


def _split_at_markers(prompt: str, special: re.Pattern[str], mark: str, hidden: Sequence[str]) -> Pieces:
    """A prompt as pieces of text, with what was hidden, and of markers: special tokens that are the template's own."""
    text, pieces, start = "", [], 0
    for match in re.finditer(f"{mark}(\\d+);|{special.pattern}", prompt):
        text += prompt[start : match.start()]
        if match[1]:
            text += hidden[int(match[1])]
        else:
            pieces += [(text, False), (match[0], True)]
            text = ""
        start = match.end()
    return [*pieces, (text + prompt[start:], False)]


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spelled: Mapping[int, Pieces] | None = None,
    mark: str = "",
) -> FlatTokens:
    """Texts as tokens; those at the indices of `spelled` with their pieces of text as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # Python tokenizers have none
    ordinary = [text for index, text in enumerate(texts) if not spelled or index not in spelled]
    sequences: Iterable[Sequence[int]]
    if backend is not None and backend.truncation is None and backend.padding is None:
        backend.encode_special_tokens = False  # of the markers; the last call of the tokenizer may have set it
        # fast, because it does not compute character offsets
        encodings = backend.encode_batch_fast(ordinary, add_special_tokens=False)
        lengths, sequences = [len(encoding) for encoding in encodings], (encoding.ids for encoding in encodings)
    else:
        options = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": False}
        sequences = tokenizer(ordinary, verbose=False, **options)["input_ids"] if ordinary else []
        lengths = [len(ids) for ids in sequences]
    unreadable: dict[int, str] = {}
    if spelled:
        encode = _encode_by_copy if backend is not None else _encode_piecewise
        encoded, left = encode(tokenizer, [*spelled.values()], mark)
        unreadable = {index: text for index, text in zip(spelled, left, strict=True) if text}
        others, added = iter(sequences), dict(zip(spelled, encoded, strict=True))
        sequences = [added[index] if index in added else next(others) for index in range(len(texts))]
        lengths = [len(ids) for ids in sequences]
    tokens = np.fromiter(itertools.chain.from_iterable(sequences), dtype=np.int32, count=sum(lengths))
    return FlatTokens(tokens, np.array(lengths, dtype=np.int64), unreadable)


def _encode_by_copy(
    tokenizer: PreTrainedTokenizerBase, spelled: Sequence[Pieces], mark: str
) -> tuple[list[list[int]], list[str]]:
    """The token ids of each text, and the special token that is left in it, if there is one."""
    special = special_tokens(tokenizer)
    copy, names = _copy_with_names(tokenizer, tuple(special), len(tokenizer), mark)
    texts = ["".join(names.get(piece, piece) if marker else piece for piece, marker in each) for each in spelled]
    sequences = [encoding.ids for encoding in copy.encode_batch_fast(texts, add_special_tokens=False)]
    left = _special_left(tokenizer, sequences)  # a marker has another id here
    real = {copy.token_to_id(name): special[text] for text, name in names.items()}
    return [[real.get(index, index) for index in ids] for ids in sequences], left


@functools.lru_cache(maxsize=4)  # of this very object, while it has the same tokens: a copy takes as long as a batch
def _copy_with_names(
    tokenizer: PreTrainedTokenizerBase, special: Sequence[str], size: int, mark: str
) -> tuple[Tokenizer, dict[str, str]]:
    """A copy of a tokenizer that reads special tokens as text, and a token of its own for each that markers may be."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    added = {token.content: token for token in copy.get_added_tokens_decoder().values() if token.content in special}
    names = {text: f"{mark}{number}{mark}" for number, text in enumerate(added)}
    flags = {
        text: {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        for text, token in added.items()
    }
    copy.add_special_tokens([AddedToken(text, special=True, **flags[text]) for text in added])  # also those not flagged
    copy.add_tokens([AddedToken(names[text], special=False, **flags[text]) for text in added])
    return copy, names


def _encode_piecewise(
    tokenizer: PreTrainedTokenizerBase, spelled: Sequence[Pieces], mark: str
) -> tuple[list[list[int]], list[str]]:
    """For Python tokenizers, which themselves read the text between two special tokens apart from what is around it."""
    special = special_tokens(tokenizer)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True, verbose=False)
    parts = [[[special[piece]] if marker else encode(piece) for piece, marker in each] for each in spelled]
    texts = [
        [*itertools.chain(*(ids for ids, (_, marker) in zip(row, each, strict=True) if not marker))]
        for row, each in zip(parts, spelled, strict=True)
    ]
    return [[*itertools.chain(*row)] for row in parts], _special_left(tokenizer, texts)


def _special_left(tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]]) -> list[str]:
    """The special token that is left in each text, or nothing: in some vocabularies it is an ordinary word, too."""
    ids = special_tokens(tokenizer)
    harmless = {tokenizer.pad_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    left = {index: text for text, index in ids.items() if index not in harmless}
    return [left[min(found)] if (found := left.keys() & {*row}) else "" for row in sequences]


def not_as_text(token: str) -> str:
    """What is said of a record that is `unreadable` for this special token."""
    return f"this tokenizer cannot read {token!r} as text, only as its special token; write it in another way"


def _refuse_unreadable(encoded: FlatTokens, names: Sequence[str]) -> None:
    if encoded.unreadable:
        (first, token), *others = encoded.unreadable.items()
        further = ", ".join(str(names[index]) for index, _ in others[:5])
        raise UserError(
            f"{names[first]}: {not_as_text(token)}, remove the record{f'; so do {further}' if further else ''}, or "
            "choose another tokenizer"
        )
