"""Which records spell a special token, and which responses bring their own end of text: to be counted and shown."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipe.data.conversations import select_texts, text_of
from recipe.tokens import any_of, special_tokens, without_end

BATCH = 1000  # records


def find_special_text(
    records: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, list[int]]]:
    """Rows of each split by finding.

    `special_token_text`: the text spells a special token, and is trained on as the text it is. `own_end_of_text`: the
    response ends with the end-of-text token, which is learned once, as that token.
    """
    special, end = any_of(special_tokens(tokenizer)), str(tokenizer.eos_token)
    found: dict[str, dict[str, list[int]]] = {"special_token_text": {}, "own_end_of_text": {}}
    for name, split in records.items():
        spelling: list[int] = []
        ended: list[int] = []
        for batch in select_texts(split, "row").iter(BATCH):
            texts = [text_of(dict(zip(batch, fields, strict=True))) for fields in zip(*batch.values(), strict=True)]
            if not special.search("\n".join(texts)):
                continue
            for index, (row, output) in enumerate(zip(batch["row"], batch["output"], strict=True)):
                response = without_end(output, end)
                ended += [row] if response != output and end in output else []
                text = texts[index].removesuffix(output) + response
                spelling += [row] if special.search(text) else []
        found["special_token_text"][name], found["own_end_of_text"][name] = spelling, ended
    return found


def count_special_text(found: Mapping[str, Mapping[str, list[int]]]) -> dict[str, int]:
    """How many records of all splits there are of each finding."""
    return {finding: sum(map(len, by_split.values())) for finding, by_split in found.items()}


def special_text_note(found: Mapping[str, Mapping[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> str:
    """One line about what was found, for the log; empty if nothing was."""
    counts = count_special_text(found)
    notes = {
        "special_token_text": "spell a special token in their text, which stays text",
        "own_end_of_text": f"end their response with {tokenizer.eos_token}, which is learned once",
    }
    return "; ".join(f"{counts[finding]:,} records {note}" for finding, note in notes.items() if counts[finding])
