"""The word lists behind the demo's records and behind the plain text of its base model.

There are two sets of words with the same fields. ``SEEN`` fills the train, validation and test records. ``UNSEEN``
fills ``test_unseen`` only: no record that a model is fine-tuned on holds its words, save the names of categories. The
base model reads plain sentences made of both sets, as any base model knows more words than its fine-tuning shows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple


class Verb(NamedTuple):
    """A verb's forms, e.g. ``Verb("take", "takes", "took", "taken")``."""

    base: str
    third: str
    past: str
    participle: str


class Unit(NamedTuple):
    """Two units and how many of the small one make a large one, e.g. ``Unit("weeks", "days", 7)``."""

    large: str
    small: str
    factor: int


@dataclass(frozen=True)
class Words:
    """One set of words, by the role that each can play in a sentence."""

    names: tuple[str, ...]
    people: tuple[str, ...]  # can act: "the teacher carries the box"
    things: tuple[str, ...]  # can be acted upon, and be big, red, old ...
    places: tuple[str, ...]  # one can go "to the" place
    cities: tuple[str, ...]
    days: tuple[str, ...]
    colours: tuple[str, ...]
    actions: tuple[Verb, ...]  # done to a thing
    motions: tuple[Verb, ...]  # done "to the" place
    plurals: tuple[tuple[str, str], ...]
    by_size: tuple[str, ...]  # animals, from the smallest to the largest
    thing_opposites: tuple[tuple[str, str], ...]
    people_opposites: tuple[tuple[str, str], ...]
    kinds: tuple[tuple[str, str], ...]  # (rose, flower)
    units: tuple[Unit, ...]
    sortable: tuple[str, ...]  # no two begin with the same letter

    def __add__(self, other: Words) -> Words:
        """All the words of both sets, role by role."""
        return Words(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def _listed(words: str) -> tuple[str, ...]:
    """Read words separated by blanks."""
    return tuple(words.split())


def _verbs(table: str) -> tuple[Verb, ...]:
    """Read one verb a line: base, third person, past, participle."""
    return tuple(Verb(*_listed(line)) for line in table.strip().splitlines())


def _pairs(table: str) -> tuple[tuple[str, str], ...]:
    """Read pairs written ``left/right``, separated by blanks."""
    return tuple((left, right) for left, right in (pair.split("/") for pair in table.split()))


def _kinds(**members: str) -> tuple[tuple[str, str], ...]:
    """Turn ``flower="rose tulip"`` into ``(("rose", "flower"), ("tulip", "flower"))``."""
    return tuple((member, kind) for kind, listed in members.items() for member in listed.split())


def article(noun: str) -> str:
    """Put "a" or "an" before a noun; the first letter decides, for no listed noun breaks that rule ("hour" would).

    >>> article("oak"), article("rose")
    ('an oak', 'a rose')
    """
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capitalise(text: str) -> str:
    """Make the first letter a capital and leave the rest alone, unlike ``str.capitalize``.

    >>> capitalise("the bag of Anna.")
    'The bag of Anna.'
    """
    return text[0].upper() + text[1:]


SEEN = Words(
    names=_listed("Anna Tom Maria Ben Lucy Omar Nina Paul Sara Leo Emma Ivan Rosa Sam Kate Hugo"),
    people=_listed("teacher doctor farmer driver baker singer nurse child neighbour painter"),
    things=_listed("box table cup chair plate bag lamp book car hat clock key ball bottle"),
    places=_listed("park market school station library river beach garden farm museum"),
    cities=_listed("London Paris Rome Berlin Madrid Oslo Cairo Tokyo Dublin Lisbon"),
    days=_listed("Monday Tuesday Wednesday Thursday Friday"),
    colours=_listed("red blue green yellow black white brown pink"),
    actions=_verbs("""
        carry carries carried carried
        clean cleans cleaned cleaned
        find finds found found
        wash washes washed washed
        move moves moved moved
        bring brings brought brought
        draw draws drew drawn
        take takes took taken
        choose chooses chose chosen
        push pushes pushed pushed
        hide hides hid hidden
        sell sells sold sold
        buy buys bought bought
        paint paints painted painted
    """),
    motions=_verbs("""
        go goes went gone
        walk walks walked walked
        run runs ran run
        drive drives drove driven
        travel travels travelled travelled
        hurry hurries hurried hurried
    """),
    plurals=_pairs("""
        box/boxes table/tables cup/cups chair/chairs plate/plates lamp/lamps book/books car/cars hat/hats key/keys
        child/children man/men woman/women foot/feet tooth/teeth mouse/mice sheep/sheep fish/fish
        knife/knives leaf/leaves wolf/wolves loaf/loaves
        baby/babies city/cities story/stories cherry/cherries berry/berries country/countries
        bus/buses glass/glasses dish/dishes watch/watches brush/brushes fox/foxes
        potato/potatoes tomato/tomatoes piano/pianos photo/photos
        boy/boys day/days toy/toys apple/apples egg/eggs tree/trees horse/horses cat/cats duck/ducks house/houses
        teacher/teachers farmer/farmers
    """),
    by_size=_listed("ant bee mouse duck cat wolf lion horse elephant whale"),
    thing_opposites=_pairs("""
        big/small old/new clean/dirty wet/dry hard/soft heavy/light hot/cold cheap/expensive strong/weak good/bad
        rough/smooth
    """),
    people_opposites=_pairs("happy/sad rich/poor quiet/loud early/late fast/slow"),
    kinds=_kinds(
        fruit="apple banana orange pear cherry",
        vegetable="onion carrot cucumber",
        flower="rose tulip daisy lily",
        tree="oak pine maple",
        bird="eagle owl parrot swan",
        tool="hammer saw axe drill",
        instrument="piano violin drum flute",
        vehicle="bus truck train car",
    ),
    units=(
        Unit("metres", "centimetres", 100),
        Unit("kilometres", "metres", 1000),
        Unit("kilograms", "grams", 1000),
        Unit("hours", "minutes", 60),
        Unit("minutes", "seconds", 60),
        Unit("weeks", "days", 7),
        Unit("years", "months", 12),
        Unit("feet", "inches", 12),
    ),
    sortable=_listed("apple ball cup door egg fish garden hat key lamp moon pen river table"),
)

UNSEEN = Words(
    names=_listed("Clara David Mona Peter Yuki Amir"),
    people=_listed("pilot lawyer judge gardener"),
    things=_listed("basket mirror drawer suitcase cupboard"),
    places=_listed("forest castle theatre harbour"),
    cities=_listed("Vienna Athens Delhi Lima"),
    days=_listed("Saturday Sunday"),
    colours=_listed("grey purple silver"),
    actions=_verbs("""
        lift lifts lifted lifted
        throw throws threw thrown
        hold holds held held
        lock locks locked locked
        copy copies copied copied
    """),
    motions=_verbs("""
        swim swims swam swum
        return returns returned returned
        march marches marched marched
    """),
    plurals=_pairs("""
        basket/baskets mirror/mirrors goose/geese deer/deer shelf/shelves thief/thieves hero/heroes echo/echoes
        lady/ladies party/parties bench/benches dress/dresses pilot/pilots lawyer/lawyers
    """),
    by_size=_listed("spider rat goat bear giraffe"),
    thing_opposites=_pairs("thick/thin wide/narrow bright/dull sharp/blunt"),
    people_opposites=_pairs("brave/timid calm/nervous"),
    kinds=_kinds(
        fruit="plum lemon",
        vegetable="cabbage",
        flower="orchid",
        tree="birch elm",
        bird="crow",
        tool="spade",
        instrument="guitar",
        vehicle="taxi",
    ),
    units=(
        Unit("centuries", "decades", 10),
        Unit("gallons", "pints", 8),
        Unit("euros", "cents", 100),
        Unit("pounds", "pence", 100),
    ),
    sortable=_listed("arrow bell coat desk fork gate hill nail pot rope sock tent"),
)
