"""Build the demo's instruction records: fourteen small language tasks, each asked in several ways.

A record is a dictionary in the Alpaca schema, plus the task's family::

    {"instruction": "Fix the grammar of the sentence.", "input": "He go to the park.",
     "output": "He goes to the park.", "family": "grammar"}

The four splits differ in what is new to a model that was fine-tuned on ``train``:

* ``train``         3,200 records
* ``validation``    200 records: new combinations of the words and the phrasings of ``train``
* ``test``          400 records: the same, drawn apart
* ``test_unseen``   200 records: other words (``words.UNSEEN``) asked in other phrasings, none of them in ``train``

``python -m recipe.demo.build_records`` writes them again, byte for byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from recipe.demo.words import SEEN, UNSEEN, Unit, Verb, Words, article, capitalise

RECORDS_DIR = Path(__file__).parent / "records"
SIZES = {"train": 3200, "validation": 200, "test": 400, "test_unseen": 200}

Record = dict[str, str]
Task = tuple[dict[str, str], str]  # the values that fill a phrasing, and the right answer


class Family(NamedTuple):
    """One kind of task: how to draw one, and the (instruction, input) templates that ask for it.

    A closed family has few operands (there are only so many irregular plurals), so what is new in its validation and
    test records is the operand *in that phrasing*. In every other family the operand itself is new.
    """

    name: str
    draw: Callable[[random.Random, Words], Task]
    phrasings: list[tuple[str, str]]
    unseen_phrasings: list[tuple[str, str]]
    closed: bool = False


class Clause(NamedTuple):
    """A sentence before its tense is chosen, e.g. ``Clause("the teacher", False, <take>, "the box at night")``."""

    subject: str
    plural: bool
    verb: Verb
    rest: str

    def present(self) -> str:
        return self.sentence(self.verb.base if self.plural else self.verb.third)

    def past(self) -> str:
        return self.sentence(self.verb.past)

    def future(self) -> str:
        return self.sentence(f"will {self.verb.base}")

    def negative(self, auxiliary: str) -> str:
        return self.sentence(f"{auxiliary} not {self.verb.base}")

    def question(self, auxiliary: str) -> str:
        return f"{capitalise(auxiliary)} {self.subject} {self.verb.base} {self.rest}?"

    def sentence(self, predicate: str) -> str:
        return capitalise(f"{self.subject} {predicate} {self.rest}.")


def draw_clause(rng: random.Random, words: Words) -> Clause:
    """Someone acts on a thing, or goes to a place: "the nurse / washes / the cup after lunch"."""
    subject = rng.choice([rng.choice(words.names), f"the {rng.choice(words.people)}"])
    plural = rng.random() < 0.25
    if plural:
        subject = rng.choice(["they", "we"])
    if rng.random() < 0.7:
        verb, rest = rng.choice(words.actions), f"the {rng.choice(words.things)}"
    else:
        verb, rest = rng.choice(words.motions), f"to the {rng.choice(words.places)}"
    when = rng.choice(["", "", " after lunch", " at night", " in the morning"])
    return Clause(subject, plural, verb, rest + when)


def draw_statement(rng: random.Random, words: Words) -> tuple[Clause, str, str]:
    """A clause, what it states in one of the tenses, and the auxiliary of that tense: "do" or "does", "did", "will"."""
    clause = draw_clause(rng, words)
    present = "do" if clause.plural else "does"
    return clause, *rng.choice([(clause.present(), present), (clause.past(), "did"), (clause.future(), "will")])


def draw_grammar(rng: random.Random, words: Words) -> Task:
    """One mistake in the verb, in the article, or in the number."""
    clause = draw_clause(rng, words)
    if not clause.plural and rng.random() < 0.3:
        clause = clause._replace(subject=rng.choice(["he", "she"]))
    name = rng.choice(words.names)
    noun, _ = rng.choice(words.kinds)
    one, many = rng.choice([pair for pair in words.plurals if pair[0] != pair[1]])
    wrong_verb = clause.verb.third if clause.plural else clause.verb.base
    other_article = "a" if article(noun).startswith("an ") else "an"
    number = rng.choice(["two", "three", "four"])
    wrong, right = rng.choice(
        [
            (clause.sentence(wrong_verb), clause.present()),
            (clause.sentence(wrong_verb), clause.present()),
            (clause.sentence(f"did not {clause.verb.third}"), clause.negative("did")),
            (f"{name} sees {other_article} {noun}.", f"{name} sees {article(noun)}."),
            (f"{name} sees {number} {one}.", f"{name} sees {number} {many}."),
        ]
    )
    return {"x": wrong}, right


def draw_tense(rng: random.Random, words: Words) -> Task:
    clause = draw_clause(rng, words)
    forms = {"present": clause.present(), "past": clause.past(), "future": clause.future()}
    given, wanted = rng.sample(sorted(forms), 2)
    return {"x": forms[given], "tense": wanted}, forms[wanted]


def draw_passive(rng: random.Random, words: Words) -> Task:
    doer, verb, thing = f"the {rng.choice(words.people)}", rng.choice(words.actions), rng.choice(words.things)
    if rng.random() < 0.4:
        doer = rng.choice(words.names)
    active, be = rng.choice([(verb.third, "is"), (verb.past, "was")])
    return {"x": capitalise(f"{doer} {active} the {thing}.")}, f"The {thing} {be} {verb.participle} by {doer}."


def draw_question(rng: random.Random, words: Words) -> Task:
    clause, statement, auxiliary = draw_statement(rng, words)
    return {"x": statement}, clause.question(auxiliary)


def draw_negation(rng: random.Random, words: Words) -> Task:
    clause, statement, auxiliary = draw_statement(rng, words)
    return {"x": statement}, clause.negative(auxiliary)


def draw_plural(rng: random.Random, words: Words) -> Task:
    one, many = rng.choice(words.plurals)
    return {"x": one}, f"The plural of {one} is {many}."


def draw_sorting(rng: random.Random, words: Words) -> Task:
    drawn = rng.sample(words.sortable, 3)
    return {"x": ", ".join(drawn)}, f"The order is {', '.join(sorted(drawn))}."


def draw_comparison(rng: random.Random, words: Words) -> Task:
    """Two animals, named in either order: the answer depends on both and on the word that compares them."""
    lower, higher = sorted(rng.sample(range(len(words.by_size)), 2))
    small, large = article(words.by_size[lower]), article(words.by_size[higher])
    comparative = rng.choice(["bigger", "smaller", "heavier", "lighter"])
    first, second = (large, small) if comparative in ("bigger", "heavier") else (small, large)
    named = " or ".join(rng.sample([small, large], 2))
    return {"x": named, "more": comparative}, capitalise(f"{first} is {comparative} than {second}.")


def draw_counting(rng: random.Random, words: Words) -> Task:
    """Sentences of three to nine words; the length is drawn first, so that no count is rare."""
    length = rng.randint(3, 9)
    while True:
        clause = draw_clause(rng, words)
        short = f"{rng.choice(words.names)} is {rng.choice(rng.choice(words.people_opposites))}."
        text = rng.choice([clause.present(), clause.past(), clause.future(), short])
        if len(text.split()) == length:
            return {"x": text}, f"The sentence has {length} words."


def draw_extraction(rng: random.Random, words: Words) -> Task:
    facts = {
        "person": rng.choice(words.names),
        "colour": rng.choice(words.colours),
        "city": rng.choice(words.cities),
        "object": rng.choice(words.things),
    }
    sentence = rng.choice(
        [
            "{person} lost a {colour} {object} in {city}.",
            "In {city}, {person} saw a {colour} {object}.",
            "The {colour} {object} of {person} is in {city}.",
            "{person} went to {city} with a {colour} {object}.",
        ]
    )
    wanted = rng.choice(sorted(facts))
    found = article(facts[wanted]) if wanted == "object" else facts[wanted]
    return {"x": sentence.format(**facts), "wanted": wanted}, f"The {wanted} is {found}."


def draw_capitals(rng: random.Random, words: Words) -> Task:
    """Names, cities, days and first words written small."""
    sentence = rng.choice(
        [
            "{name} lives in {city}.",
            "{name} met {friend} in {city}.",
            "On {day}, {name} went to {city}.",
            "{name} leaves {city} on {day}.",
            "The {person} called {name} on {day}.",
            "The {person} flew to {city} with {name}.",
        ]
    )
    name, friend = rng.sample(words.names, 2)
    right = sentence.format(
        name=name,
        friend=friend,
        person=rng.choice(words.people),
        city=rng.choice(words.cities),
        day=rng.choice(words.days),
    )
    return {"x": right.lower()}, right


def draw_conversion(rng: random.Random, words: Words) -> Task:
    unit: Unit = rng.choice(words.units)
    n = rng.randint(2, 9)
    fields = {"x": f"{n} {unit.large} to {unit.small}", "n": str(n), "large": unit.large, "small": unit.small}
    return fields, f"There are {n * unit.factor} {unit.small} in {n} {unit.large}."


def draw_category(rng: random.Random, words: Words) -> Task:
    member, kind = rng.choice(words.kinds)
    other = rng.choice(sorted({other for _, other in words.kinds} - {kind}))
    either = " or ".join(article(noun) for noun in rng.sample([kind, other], 2))
    fields = {"x": member, "a_x": article(member), "either": either}
    return fields, capitalise(f"{article(member)} is {article(kind)}.")


def draw_opposite(rng: random.Random, words: Words) -> Task:
    """Only the adjective changes: "The cup is new." becomes "The cup is old."."""
    subject, pairs = rng.choice([(words.things, words.thing_opposites), (words.people, words.people_opposites)])
    given, wanted = rng.sample(rng.choice(pairs), 2)
    frame = f"The {rng.choice(subject)} {rng.choice(['is', 'was'])} {{}}."
    return {"x": frame.format(given)}, frame.format(wanted)


FAMILIES = [
    Family(
        "grammar",
        draw_grammar,
        [
            ("Fix the grammar of the sentence.", "{x}"),
            ("Correct the mistake in this sentence.", "{x}"),
            ("Rewrite the sentence with correct grammar.", "{x}"),
            ("Fix the grammar: {x}", ""),
            ("Correct this sentence: {x}", ""),
        ],
        [("Find the error in the sentence and correct it.", "{x}"), ("Please repair the grammar here: {x}", "")],
    ),
    Family(
        "tense",
        draw_tense,
        [
            ("Rewrite the sentence in the {tense} tense.", "{x}"),
            ("Change the sentence to the {tense} tense.", "{x}"),
            ("Put this sentence into the {tense} tense.", "{x}"),
            ("Change to the {tense} tense: {x}", ""),
            ("Write this sentence in the {tense} tense: {x}", ""),
        ],
        [("Say it in the {tense} tense.", "{x}"), ("Please turn this into the {tense} tense: {x}", "")],
    ),
    Family(
        "passive",
        draw_passive,
        [
            ("Change the sentence to the passive voice.", "{x}"),
            ("Rewrite the sentence in the passive.", "{x}"),
            ("Turn the active sentence into a passive one.", "{x}"),
            ("Write this sentence in the passive voice: {x}", ""),
            ("Make this sentence passive: {x}", ""),
        ],
        [("Use the passive voice for this statement.", "{x}"), ("Say this with a passive verb: {x}", "")],
    ),
    Family(
        "question",
        draw_question,
        [
            ("Turn the sentence into a question.", "{x}"),
            ("Rewrite the sentence as a question.", "{x}"),
            ("Make a question from this sentence.", "{x}"),
            ("Change this sentence into a question: {x}", ""),
            ("Write a question from: {x}", ""),
        ],
        [("Ask whether this is so.", "{x}"), ("Form a question out of this statement: {x}", "")],
    ),
    Family(
        "negation",
        draw_negation,
        [
            ("Make the sentence negative.", "{x}"),
            ("Rewrite the sentence in the negative.", "{x}"),
            ("Write the negative of this sentence.", "{x}"),
            ("Turn this into a negative sentence: {x}", ""),
            ('Put "not" into this sentence: {x}', ""),
        ],
        [("Say that this is not so.", "{x}"), ("Form the negative of this statement: {x}", "")],
    ),
    Family(
        "plural",
        draw_plural,
        [
            ("What is the plural of the word?", "{x}"),
            ("Write the plural of this noun.", "{x}"),
            ("Give the plural form.", "{x}"),
            ("Make the noun plural.", "{x}"),
            ("What is the plural of {x}?", ""),
            ("Write the plural of {x}.", ""),
            ("Give the plural form of {x}.", ""),
        ],
        [("Write the word for more than one.", "{x}"), ("How does one write {x} in the plural?", "")],
        closed=True,
    ),
    Family(
        "sorting",
        draw_sorting,
        [
            ("Sort the words alphabetically.", "{x}"),
            ("Put the words in alphabetical order.", "{x}"),
            ("List these words from a to z.", "{x}"),
            ("Sort these words alphabetically: {x}", ""),
            ("Write in alphabetical order: {x}", ""),
        ],
        [("Arrange the list by the alphabet.", "{x}"), ("Order these words alphabetically, please: {x}", "")],
    ),
    Family(
        "comparison",
        draw_comparison,
        [
            ("Which of the two animals is {more}?", "{x}"),
            ("Say which animal is {more}.", "{x}"),
            ("Compare the animals: which one is {more}?", "{x}"),
            ("Which is {more}, {x}?", ""),
            ("Which animal is {more}: {x}?", ""),
        ],
        [("Choose the {more} animal.", "{x}"), ("Tell me what is {more}, {x}.", "")],
        closed=True,
    ),
    Family(
        "counting",
        draw_counting,
        [
            ("Count the words in the sentence.", "{x}"),
            ("How many words does the sentence have?", "{x}"),
            ("Give the number of words.", "{x}"),
            ("Count the words: {x}", ""),
            ("How many words are in this sentence? {x}", ""),
        ],
        [("What is the length of the sentence in words?", "{x}"), ("Please count all words here: {x}", "")],
    ),
    Family(
        "extraction",
        draw_extraction,
        [
            ("Find the {wanted} in the sentence.", "{x}"),
            ("Which {wanted} does the sentence name?", "{x}"),
            ("What is the {wanted} in this sentence?", "{x}"),
            ("Find the {wanted}: {x}", ""),
            ("Name the {wanted} in this sentence: {x}", ""),
        ],
        [("Tell me the {wanted} that is named here.", "{x}"), ("Look for the {wanted} here: {x}", "")],
    ),
    Family(
        "capitals",
        draw_capitals,
        [
            ("Put in the capital letters.", "{x}"),
            ("Write the sentence with capital letters.", "{x}"),
            ("Fix the capital letters in this sentence.", "{x}"),
            ("Use capital letters where they belong: {x}", ""),
            ("Correct the capital letters: {x}", ""),
        ],
        [("Give every name its capital letter.", "{x}"), ("Please write large letters where needed: {x}", "")],
    ),
    Family(
        "conversion",
        draw_conversion,
        [
            ("Convert the units.", "{x}"),
            ("Change the number to the other unit.", "{x}"),
            ("Do this conversion.", "{x}"),
            ("Convert {x}.", ""),
            ("How many {small} are there in {n} {large}?", ""),
        ],
        [("Work out the number in the new unit.", "{x}"), ("How much is {n} {large} in {small}?", "")],
        closed=True,
    ),
    Family(
        "category",
        draw_category,
        [
            ("What kind of thing is this?", "{x}"),
            ("Name the category of the word.", "{x}"),
            ("Say what this is.", "{x}"),
            ("Which group does the word belong to?", "{x}"),
            ("What kind of thing is {a_x}?", ""),
            ("Is {a_x} {either}?", ""),
            ("What is {a_x}: {either}?", ""),
        ],
        [("Tell me the class of this word.", "{x}"), ("Would one call {a_x} {either}?", "")],
        closed=True,
    ),
    Family(
        "opposite",
        draw_opposite,
        [
            ("Write the opposite of the sentence.", "{x}"),
            ("Replace the adjective with its opposite.", "{x}"),
            ("Change the last word to its opposite.", "{x}"),
            ("Say the opposite: {x}", ""),
            ("Use the opposite adjective: {x}", ""),
        ],
        [("Swap the adjective for one that means the opposite.", "{x}"), ("What is the opposite of this? {x}", "")],
    ),
]


def draw_record(
    family: Family, words: Words, phrasings: list[tuple[str, str]], rng: random.Random
) -> tuple[str, Record]:
    """Draw one task and ask it in one of the phrasings. Returned are what must be new about it, and the record."""
    fields, answer = family.draw(rng, words)
    instruction, given = (template.format(**fields) for template in rng.choice(phrasings))
    record = {"instruction": instruction, "input": given, "output": answer, "family": family.name}
    return (f"{instruction}\n{given}" if family.closed else fields["x"]), record


def vocabulary(records: list[Record]) -> set[str]:
    """Every blank-separated word of the records, wherever it stands."""
    return {word for record in records for value in record.values() for word in value.split()}


def quota(split: str, position: int) -> int:
    """How many records of a split the family at this position has: an even share, the first ones taking the rest."""
    share, rest = divmod(SIZES[split], len(FAMILIES))
    return share + (position < rest)


def build_family(position: int, seed: int) -> dict[str, list[Record]]:
    """All splits of one family. Validation and test keep to words that this family's train records hold."""
    family = FAMILIES[position]
    rng = random.Random(f"{seed} {family.name}")
    splits: dict[str, list[Record]] = {split: [] for split in SIZES}
    used: set[str] = set()
    for split, records in splits.items():
        unseen = split == "test_unseen"
        words, phrasings = (UNSEEN, family.unseen_phrasings) if unseen else (SEEN, family.phrasings)
        known = vocabulary(splits["train"])
        while len(records) < quota(split, position):
            novelty, record = draw_record(family, words, phrasings, rng)
            if novelty in used or (split in ("validation", "test") and not vocabulary([record]) <= known):
                continue
            used.add(novelty)
            records.append(record)
    return splits


def build_records(seed: int = 123) -> dict[str, list[Record]]:
    """Build every split, e.g. ``build_records()["train"][0]["output"]``; a seed gives the same records anywhere."""
    families = [build_family(position, seed) for position in range(len(FAMILIES))]
    splits = {split: [record for family in families for record in family[split]] for split in SIZES}
    for split, records in splits.items():
        random.Random(f"{seed} {split}").shuffle(records)
    return splits


def main() -> None:
    RECORDS_DIR.mkdir(exist_ok=True)
    for split, records in build_records().items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (RECORDS_DIR / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{split}: {len(records)} records")


if __name__ == "__main__":
    main()
