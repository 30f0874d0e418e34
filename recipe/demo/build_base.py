"""Build the demo's base model: a GPT-2 of two million parameters that has read plain English sentences, no more.

The text is written here, from the word lists of ``words.py``: short paragraphs in which people do things today,
yesterday and tomorrow, small facts ("A rose is a flower."), comparisons, lists. It holds both word sets, the held-out
words too: a base model knows words. What fine-tuning never shows it is the held-out words *in instructions*. The text
holds no instruction, no response and no prompt template, so the base continues a text and cannot follow an instruction.
The lists and the repeated speech are there for a skill that every large base model has: to copy what stood earlier.

The tokenizer is a byte-level BPE, as in GPT-2, with ``<|endoftext|>`` last and no padding token. It is trained on the
same text and on the fixed words of the prompts, so that prompts are short in tokens.

``python -m recipe.demo.build_base`` writes ``base/`` in about eight minutes on two CPU cores. Text and tokenizer
are the same everywhere; the weights are as reproducible as the floating-point sums of the machine.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from recipe.demo.build_records import FAMILIES, draw_clause, draw_statement
from recipe.demo.words import SEEN, UNSEEN, Words, article, capitalise

BASE_DIR = Path(__file__).parent / "base"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 1280
CONTEXT = 256
SEED = 123
DOCUMENTS = 40_000
BATCH_TOKENS = 2048
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 60, 0.01

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n\n\n### Input:\n\n\n### Response:\n"
)

# Plain sentences about language lessons: where the base meets the words that instructions are made of.
LESSON = [
    "In the lesson, {name} writes a sentence.",
    "A noun names a thing.",
    "The plural form of a noun names more than one thing.",
    "The singular names one thing.",
    "A verb says what one does.",
    "The past tense says what was done before.",
    "The future tense says what will be done later.",
    "The present tense says what one does now.",
    "An active sentence names first who does something.",
    "A passive sentence uses the passive voice.",
    "A question ends with a question mark.",
    "A question asks whether something is so.",
    "A statement says that something is so.",
    "The negative of a statement says that it is not so.",
    "A name has a capital letter, and so does the first word of a sentence.",
    "Capital letters are large letters.",
    "The alphabet goes from a to z.",
    "The words in the list are in alphabetical order.",
    "{name} sorts the words alphabetically, by the first letter.",
    "{name} counts all the words in the sentence and writes the number.",
    "The length of a sentence is the number of its words.",
    "An adjective says what a thing is like.",
    "The opposite of an adjective means the reverse.",
    "{name} finds a mistake in the grammar and corrects the error.",
    "{name} turns the page and changes one word.",
    "{name} puts the last word first.",
    "Please give the book to {name}.",
    "{name} tells what kind of thing it is.",
    "The words of one category form a group, or a class.",
    "{name} compares two animals.",
    "A unit is used for a number of things.",
    "{name} converts the number to the new unit.",
    "{name} makes a list of the things that are needed here.",
    "{name} chooses the words and works out the rest.",
    "{name} calls it a good example.",
    "{name} names the person, the colour, the city and the object.",
    "The two words belong together.",
    "The sentence is about a person, an object, a city or a colour.",
    "{name} rewrites it with the correct words.",
    "{name} replaces one word with the other one.",
    "This is how one writes it.",
]


def write_days(rng: random.Random, words: Words) -> str:
    """Somebody did, does and will do a thing."""
    clause = draw_clause(rng, words)
    who, verb, rest = clause.subject, clause.verb, clause.rest
    today = verb.base if clause.plural else verb.third
    days = [
        f"Yesterday {who} {verb.past} {rest}.",
        f"Today {who} {today} {rest}.",
        f"Tomorrow {who} will {verb.base} {rest}.",
    ]
    return " ".join(rng.sample(days, rng.randint(2, 3)))


def write_denial(rng: random.Random, words: Words) -> str:
    """Somebody asks, and somebody says no."""
    clause, statement, auxiliary = draw_statement(rng, words)
    denial = f"{clause.subject} {auxiliary} not {clause.verb.base} {clause.rest}."
    asked = f"{clause.question(auxiliary)} No, {denial}"
    return rng.choice([asked, f"{rng.choice(words.names)} says: {statement} But {denial}"])


def write_news(rng: random.Random, words: Words) -> str:
    """The same event told twice, once about the one who acts and once about the thing."""
    who = rng.choice([rng.choice(words.names), f"the {rng.choice(words.people)}"])
    verb, thing = rng.choice(words.actions), rng.choice(words.things)
    told = [f"{capitalise(who)} {verb.past} the {thing}.", f"The {thing} was {verb.participle} by {who}."]
    if rng.random() < 0.5:
        told = [f"{capitalise(who)} {verb.third} the {thing}.", f"The {thing} is {verb.participle} by {who}."]
    return " ".join(rng.sample(told, 2))


def write_report(rng: random.Random, words: Words) -> str:
    """Where somebody has a coloured thing: names, colours, things and cities that come back."""
    name, friend = rng.sample(words.names, 2)
    colour, thing, city = rng.choice(words.colours), rng.choice(words.things), rng.choice(words.cities)
    person, day = rng.choice(words.people), rng.choice(words.days)
    sentences = [
        f"{name} lost a {colour} {thing} in {city}.",
        f"In {city}, {name} saw a {colour} {thing}.",
        f"The {colour} {thing} of {name} is in {city}.",
        f"{name} went to {city} with a {colour} {thing}.",
        f"On {day}, {name} went to {city}.",
        f"{name} met {friend} in {city}.",
        f"The {person} called {name} on {day}.",
        f"The {person} flew to {city} with {friend}.",
        f"{name} lives in {city}.",
        f"{friend} leaves {city} on {day}.",
        f"{city} is a city.",
        f"{capitalise(colour)} is a colour, and the {thing} is {colour}.",
    ]
    return " ".join(rng.sample(sentences, rng.randint(2, 4)))


def write_echo(rng: random.Random, words: Words) -> str:
    """Two people say or write the same, one of them at times without capital letters."""
    name, friend = rng.sample(words.names, 2)
    said = rng.choice([write_report, write_days, write_denial, write_news, write_opposites])(rng, words)
    if rng.random() < 0.7:
        return f"{name} says: {said} {friend} says: {said}"
    return f"{name} writes a note: {said.lower()} {friend} writes a letter: {said}"


def write_same_list(rng: random.Random, words: Words) -> str:
    """A list of unrelated words, twice: the second time only a reader who looks back can know what comes next."""
    name, friend = rng.sample(words.names, 2)
    pool = [*words.names, *words.people, *words.things, *words.places, *words.cities, *words.colours, *words.sortable]
    pool += [form for verb in words.actions + words.motions for form in verb]
    pool += [noun for pair in words.plurals + words.thing_opposites + words.people_opposites for noun in pair]
    listed = ", ".join(rng.sample(pool, rng.randint(3, 9)))
    return f"The list of {name} is {listed}. The list of {friend} is {listed}."


def write_facts(rng: random.Random, words: Words) -> str:
    """What a few things are."""
    facts = [capitalise(f"{article(noun)} is {article(kind)}.") for noun, kind in rng.sample(words.kinds, 4)]
    noun, kind = rng.choice(words.kinds)
    return " ".join(facts) + f" {rng.choice(words.names)} sees {article(noun)}, and the {noun} is {article(kind)}."


def write_sizes(rng: random.Random, words: Words) -> str:
    """Two or three animals of one word set, for only within a set are they ordered, and how they compare."""
    by_size = rng.choice([SEEN, UNSEEN]).by_size
    animals = [article(by_size[i]) for i in sorted(rng.sample(range(len(by_size)), rng.randint(2, 3)))]
    sentences = []
    for small, large in pairwise(animals):
        sentences.append(capitalise(f"{large} is {rng.choice(['bigger', 'heavier'])} than {small}."))
        sentences.append(capitalise(f"{small} is {rng.choice(['smaller', 'lighter'])} than {large}."))
    return " ".join(rng.sample(sentences, len(sentences)))


def write_opposites(rng: random.Random, words: Words) -> str:
    """Things and people change: what was old is new."""
    nouns, pairs = rng.choice([(words.things, words.thing_opposites), (words.people, words.people_opposites)])
    noun, (one, other) = rng.choice(nouns), rng.sample(rng.choice(pairs), 2)
    return rng.choice(
        [
            f"The {noun} is not {one}. The {noun} is {other}.",
            f"The {noun} was {one}. Now the {noun} is {other}.",
            f"One {noun} is {one} and the other {noun} is {other}.",
            f"{capitalise(one)} is the opposite of {other}.",
        ]
    )


def write_numbers(rng: random.Random, words: Words) -> str:
    """One thing, then more of them."""
    name, (one, many) = rng.choice(words.names), rng.choice(words.plurals)
    number = rng.choice(["two", "three", "four"])
    return f"Here is one {one}, and there are {number} {many}. {name} sees {article(one)} and {number} {many}."


def write_units(rng: random.Random, words: Words) -> str:
    """How many small units make some large ones."""
    unit, n = rng.choice(words.units), rng.randint(2, 9)
    return f"In {n} {unit.large} there are {n * unit.factor} {unit.small}, and {n} {unit.large} are not much."


def write_list(rng: random.Random, words: Words) -> str:
    """Words from a to z."""
    ordered = sorted(rng.sample(words.sortable, rng.randint(3, 6)))
    first = ordered[0]
    return f"The words {', '.join(ordered)} are in alphabetical order. {capitalise(first)} begins with {first[0]}."


def write_count(rng: random.Random, words: Words) -> str:
    """A sentence, and how long it is."""
    clause = draw_clause(rng, words)
    sentence = rng.choice([clause.present(), clause.past(), clause.future()])
    name = rng.choice(words.names)
    return f"{name} says: {sentence} The sentence of {name} has {len(sentence.split())} words."


def write_lesson(rng: random.Random, words: Words) -> str:
    return " ".join(sentence.format(name=rng.choice(words.names)) for sentence in rng.sample(LESSON, 3))


def write_document(rng: random.Random, words: Words) -> str:
    """A few paragraphs, one a line."""
    writers = [
        write_days, write_denial, write_news, write_report, write_facts, write_sizes, write_opposites, write_numbers,
        write_units, write_list, write_count, write_lesson, write_echo, write_echo,
        write_same_list, write_same_list, write_same_list,
    ]  # fmt: skip
    return "\n".join(writer(rng, words) for writer in rng.choices(writers, k=rng.randint(2, 5)))


def write_text(seed: int) -> list[str]:
    """All documents of the pre-training text."""
    rng = random.Random(seed)
    return [write_document(rng, SEEN + UNSEEN) for _ in range(DOCUMENTS)]


def fixed_words(instruction: str) -> str:
    """An instruction's template without its blanks: "Change to the {tense} tense: {x}" is "Change to the tense:"."""
    return " ".join(word for word in instruction.split() if "{" not in word)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY_SIZE`` tokens, the end of text being the last."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    asked = [TEMPLATE + fixed_words(instruction) for family in FAMILIES for instruction, _ in family.phrasings]
    bpe.train_from_iterator([*documents[:8000], *asked * 100], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == VOCABULARY_SIZE - 1
    return tokenizer


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """All documents in a row, each closed by the end of text, cut into full windows."""
    ids = [token for row in tokenizer(documents)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batch_up(documents: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> list[torch.Tensor]:
    """Four fifths of the text in short windows, where copying is learned soonest, and the rest in full ones."""
    first = len(documents) * 4 // 5
    short, full = pack(documents[:first], tokenizer, CONTEXT // 2), pack(documents[first:], tokenizer, CONTEXT)
    batches = [*short.split(BATCH_TOKENS * 2 // CONTEXT), *full.split(BATCH_TOKENS // CONTEXT)]
    random.Random(seed).shuffle(batches)
    return batches


def pretrain(batches: list[torch.Tensor], seed: int) -> GPT2LMHeadModel:
    """Train a fresh GPT-2 on the batches, each seen once: AdamW, linear warm-up, cosine decay to zero."""
    torch.manual_seed(seed)
    eos = VOCABULARY_SIZE - 1
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY_SIZE,
            n_positions=CONTEXT,
            n_embd=192,
            n_layer=4,
            n_head=6,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=eos,
            eos_token_id=eos,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, len(batches))
    model.train()
    losses = []
    progress = tqdm(batches, desc="pre-training")
    for batch in progress:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    print(f"final loss: {sum(losses[-50:]) / len(losses[-50:]):.4f} (mean of the last 50 of {len(losses)} steps)")
    return model.eval()


def main() -> None:
    documents = write_text(SEED)
    tokenizer = train_tokenizer(documents)
    model = pretrain(batch_up(documents, tokenizer, SEED), SEED)
    model.bfloat16().save_pretrained(BASE_DIR)
    tokenizer.save_pretrained(BASE_DIR)


if __name__ == "__main__":
    main()
