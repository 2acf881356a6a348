"""The grammar behind the bundled sample model: stories, questions and their split.

Everything here is a pure function of a ``random.Random``: the same seed always gives the
same text. Three things are generated:

* short stories whose characters and objects come back later in the text;
* question items (ten kinds, see ``KINDS``), each with exactly one right short answer;
* documents, which is what the model trains on: a story, a description of the invented
  village of Lumo, or a conversation of one to three turns.

The split between training and test does not depend on a seed. A question belongs to the
test side when the SHA-256 of its normalized text (lower case, single spaces) falls into one
bucket out of ten, see ``is_held_out``. ``document`` draws training questions only and
``held_out_questions`` draws test questions only, so no test question can occur in training
text, whatever the seeds are. What is held out is the exact question, not its kind: the
words, sentence forms and number pairs of the test questions all occur in training, in
other combinations.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

TEST_BUCKETS = 10

GIRLS = ("Mia", "Lily", "Anna", "Rosa", "Zoe", "Nina", "Ella", "Ruby")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Finn", "Omar", "Jack")
NAMES = GIRLS + BOYS
ANIMALS = (
    "fox", "bear", "owl", "rabbit", "mouse", "frog", "duck", "cat", "dog", "hen", "goat",
    "turtle", "pig", "horse",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
OBJECTS = (
    "ball", "kite", "hat", "book", "drum", "boat", "lamp", "key", "bell", "scarf", "cup",
    "coin", "shell", "ring",
)  # fmt: skip
THINGS = ("pears", "plums", "nuts", "cakes", "stones", "coins", "shells", "books")
FOODS = ("pears", "plums", "nuts", "cakes", "soup", "honey", "corn", "cheese")
ACTIVITIES = ("reading", "singing", "dancing", "sleeping", "painting", "cooking", "playing")
PLACES = (
    "in the forest", "in the garden", "by the river", "on the farm", "at the market",
    "at the school", "on the beach", "in the park", "on the hill", "by the lake",
    "in the barn", "in the kitchen",
)  # fmt: skip
LOCATIONS = (
    "on the table", "under the bed", "in the box", "behind the door", "on the chair",
    "in the basket", "by the window", "in the bag", "under the tree", "on the shelf",
)  # fmt: skip
CONTAINERS = ("box", "basket", "bag", "pot", "chest", "drawer")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SEASONS = ("spring", "summer", "autumn", "winter")
# Each word stands in one pair only, so every word has exactly one opposite.
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("in", "out"),
    ("day", "night"), ("happy", "sad"), ("open", "closed"), ("full", "empty"),
    ("high", "low"), ("wet", "dry"), ("hard", "soft"), ("young", "old"), ("light", "dark"),
    ("loud", "quiet"), ("near", "far"), ("clean", "dirty"), ("left", "right"),
    ("early", "late"), ("first", "last"), ("long", "short"), ("strong", "weak"),
    ("good", "bad"), ("rich", "poor"), ("sweet", "sour"), ("above", "below"),
    ("push", "pull"), ("yes", "no"),
)  # fmt: skip
COMPARATIVES = (
    ("taller", "tallest", "shorter", "shortest"),
    ("faster", "fastest", "slower", "slowest"),
    ("stronger", "strongest", "weaker", "weakest"),
)


@dataclass(frozen=True)
class Villager:
    """One animal of Lumo, the closed world that the fact questions ask about."""

    animal: str
    name: str
    home: str
    food: str
    work: str


LUMO = (
    Villager("bear", "Bruno", "in the cave", "honey", "bakes the bread"),
    Villager("fox", "Rusty", "under the hill", "berries", "paints the houses"),
    Villager("owl", "Hoot", "in the tower", "nuts", "reads the stories"),
    Villager("rabbit", "Clover", "in the garden", "carrots", "grows the flowers"),
    Villager("mouse", "Pip", "in the mill", "cheese", "sews the hats"),
    Villager("frog", "Hops", "by the pond", "soup", "sings the songs"),
    Villager("duck", "Dot", "by the lake", "corn", "rows the boat"),
    Villager("cat", "Luna", "on the roof", "fish", "lights the lamps"),
    Villager("dog", "Rex", "by the gate", "bones", "carries the letters"),
    Villager("hen", "Penny", "in the barn", "seeds", "rings the bell"),
    Villager("goat", "Gus", "on the rock", "grass", "pulls the cart"),
    Villager("turtle", "Shelly", "on the beach", "plums", "counts the coins"),
)


@dataclass(frozen=True)
class Item:
    """A question with its one right answer."""

    kind: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The exact text that the model is given."""
        return chat_prompt(self.question)


@dataclass(frozen=True)
class Segment:
    """A stretch of a document; the role decides how much its loss counts in training."""

    role: Literal["prompt", "answer", "story"]
    text: str


@dataclass(frozen=True)
class Character:
    """Someone in a story, with the words needed to speak of them."""

    kind: str
    name: str
    look: str

    @property
    def he(self) -> str:
        """Subject pronoun."""
        return "she" if self.name in GIRLS else "he"

    @property
    def him(self) -> str:
        """Object pronoun."""
        return "her" if self.name in GIRLS else "him"

    @property
    def his(self) -> str:
        """Possessive pronoun."""
        return "her" if self.name in GIRLS else "his"

    @property
    def full(self) -> str:
        """How the character is first introduced, such as "a shy fox named Tom"."""
        return f"a {self.look} {self.kind} named {self.name}"


@dataclass(frozen=True)
class Cast:
    """All that a story draws on, fixed before its first sentence is written."""

    hero: Character
    friend: Character
    home: str
    place: str
    colour: str
    thing: str


def chat_prompt(question: str) -> str:
    """Frame a question as training does; the answer follows after one space."""
    return f"User: {question}\nAssistant:"


def is_held_out(question: str) -> bool:
    """Tell whether a question belongs to the test side of the split.

    Depends on nothing but the normalized text, so that training and test text made with any
    two seeds are disjoint.
    """
    normalized = " ".join(question.lower().split())
    digest = hashlib.sha256(normalized.encode()).digest()
    return int.from_bytes(digest[:8], "big") % TEST_BUCKETS == 0


def article(noun: str) -> str:
    """Put the right indefinite article before a noun."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text: str) -> str:
    """Start with a capital and leave the rest alone."""
    return f"{text[0].upper()}{text[1:]}"


def sentence(text: str) -> str:
    """Start with a capital and end with a full stop."""
    return f"{capital(text)}."


# --- questions -------------------------------------------------------------------------------


def subjects(rng: random.Random, count: int) -> list[str]:
    """Different actors: all people, or all animals ("the fox")."""
    if rng.random() < 0.6:
        return rng.sample(NAMES, count)
    return [f"the {animal}" for animal in rng.sample(ANIMALS, count)]


def told(rng: random.Random, clauses: Sequence[str]) -> str:
    """Tell two or three clauses as sentences, or two of them joined by "and"."""
    if len(clauses) == 2 and rng.random() < 0.3:
        return sentence(" and ".join(clauses))
    return " ".join(sentence(clause) for clause in clauses)


def addition(rng: random.Random) -> tuple[str, str]:
    """A sum of two small numbers."""
    left, right = rng.randint(2, 10), rng.randint(2, 10)
    one, two = rng.sample(NAMES, 2)
    things, place = rng.choice(THINGS), rng.choice(PLACES)
    animals = rng.choice(("birds", "ducks", "frogs", "cats"))
    question = rng.choice(
        (
            (
                f"{one} has {left} {things} and gets {right} more. "
                f"How many {things} does {one} have now?"
            ),
            (
                f"{one} has {left} {things} and {two} has {right} {things}. "
                f"How many {things} do they have together?"
            ),
            (
                f"There are {left} {animals} {place}. {right} more come. "
                f"How many {animals} are there now?"
            ),
            f"{one} asks: what is {left} plus {right}?",
            f"What is {left} plus {right}?",
        )
    )
    return question, str(left + right)


def subtraction(rng: random.Random) -> tuple[str, str]:
    """A difference of two small numbers, never below one."""
    left = rng.randint(3, 18)
    right = rng.randint(2, min(left - 1, 10))
    one, two = rng.sample(NAMES, 2)
    place = rng.choice(PLACES)
    things, food = rng.choice(THINGS), rng.choice(("pears", "plums", "nuts", "cakes"))
    animals = rng.choice(("birds", "ducks", "frogs", "cats"))
    question = rng.choice(
        (
            f"{one} has {left} {food} and eats {right}. How many {food} are left?",
            (
                f"{one} has {left} {things} and gives {right} to {two}. "
                f"How many {things} does {one} have left?"
            ),
            f"There are {left} {animals} {place}. {right} go away. How many {animals} are left?",
            f"{one} asks: what is {left} minus {right}?",
            f"What is {left} minus {right}?",
        )
    )
    return question, str(left - right)


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """Addition or subtraction."""
    return rng.choice((addition, subtraction))(rng)


def possession(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """Tell who has which thing."""
    count = rng.choice((2, 3))
    pairs = list(zip(subjects(rng, count), rng.sample(OBJECTS, count), strict=True))
    return told(rng, [f"{who} has a {thing}" for who, thing in pairs]), pairs


def activity(rng: random.Random) -> tuple[str, list[tuple[str, str, str]]]:
    """Tell who is doing what where."""
    count = rng.choice((2, 3))
    rows = list(
        zip(
            subjects(rng, count),
            rng.sample(ACTIVITIES, count),
            rng.sample(PLACES, count),
            strict=True,
        )
    )
    return told(rng, [f"{who} is {doing} {place}" for who, doing, place in rows]), rows


def giving(rng: random.Random) -> tuple[str, list[tuple[str, str, str]]]:
    """Tell who gave which thing to whom, all four people being different."""
    first, second, third, fourth = rng.sample(NAMES, 4)
    one, two = rng.sample(OBJECTS, 2)
    rows = [(first, one, second), (third, two, fourth)]
    return told(rng, [f"{who} gave a {thing} to {whom}" for who, thing, whom in rows]), rows


def liking(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """Tell who likes which food."""
    count = rng.choice((2, 3))
    pairs = list(zip(subjects(rng, count), rng.sample(FOODS, count), strict=True))
    return told(rng, [f"{who} likes {food}" for who, food in pairs]), pairs


def who(rng: random.Random) -> tuple[str, str]:
    """Who does, has, likes, gave or got it."""
    form = rng.randrange(4)
    if form == 0:
        context, pairs = possession(rng)
        answer, thing = rng.choice(pairs)
        return f"{context} Who has the {thing}?", answer
    if form == 1:
        context, rows = activity(rng)
        answer, doing, place = rng.choice(rows)
        return f"{context} Who is {rng.choice((doing, place))}?", answer
    if form == 2:
        context, pairs = liking(rng)
        answer, food = rng.choice(pairs)
        return f"{context} Who likes {food}?", answer
    context, rows = giving(rng)
    giver, thing, taker = rng.choice(rows)
    verb, answer = rng.choice((("gave", giver), ("got", taker)))
    return f"{context} Who {verb} the {thing}?", answer


def what(rng: random.Random) -> tuple[str, str]:
    """What somebody has, does, likes, gave or got."""
    form = rng.randrange(4)
    if form == 0:
        context, pairs = possession(rng)
        actor, thing = rng.choice(pairs)
        return f"{context} What does {actor} have?", f"a {thing}"
    if form == 1:
        context, rows = activity(rng)
        actor, doing, _ = rng.choice(rows)
        return f"{context} What is {actor} doing?", doing
    if form == 2:
        context, pairs = liking(rng)
        actor, food = rng.choice(pairs)
        return f"{context} What does {actor} like?", food
    context, rows = giving(rng)
    giver, thing, taker = rng.choice(rows)
    asked = rng.choice((f"What did {giver} give to {taker}?", f"What did {taker} get?"))
    return f"{context} {asked}", f"a {thing}"


def where(rng: random.Random) -> tuple[str, str]:
    """Where somebody or something is."""
    form = rng.randrange(3)
    if form == 0:
        context, rows = activity(rng)
        actor, doing, place = rng.choice(rows)
        return f"{context} Where is {actor}{rng.choice(('', f' {doing}'))}?", place
    count = rng.choice((2, 3))
    if form == 1:
        pairs = list(zip(subjects(rng, count), rng.sample(PLACES, count), strict=True))
        verb, asked = rng.choice((("is", "Where is {}?"), ("lives", "Where does {} live?")))
        context = told(rng, [f"{actor} {verb} {place}" for actor, place in pairs])
        actor, place = rng.choice(pairs)
        return f"{context} {asked.format(actor)}", place
    pairs = list(zip(rng.sample(OBJECTS, count), rng.sample(LOCATIONS, count), strict=True))
    context = told(rng, [f"the {thing} is {place}" for thing, place in pairs])
    thing, place = rng.choice(pairs)
    return f"{context} Where is the {thing}?", place


def colour(rng: random.Random) -> tuple[str, str]:
    """Which colour a thing has."""
    form = rng.randrange(3)
    count = rng.choice((2, 3))
    colours, things = rng.sample(COLOURS, count), rng.sample(OBJECTS, count)
    people = rng.sample(NAMES, count)
    chosen = rng.randrange(count)
    if form == 0:
        pairs = zip(things, colours, strict=True)
        context = told(rng, [f"the {thing} is {shade}" for thing, shade in pairs])
        return f"{context} What colour is the {things[chosen]}?", colours[chosen]
    if form == 1:
        # One kind of thing for all: only the owner tells the colours apart.
        things = [things[0]] * count
    triples = zip(people, colours, things, strict=True)
    context = told(rng, [f"{name} has a {shade} {thing}" for name, shade, thing in triples])
    return f"{context} What colour is {people[chosen]}'s {things[chosen]}?", colours[chosen]


def opposite(rng: random.Random) -> tuple[str, str]:
    """The opposite of a common word."""
    pair = rng.choice(OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else pair[::-1]
    one, two = rng.sample(NAMES, 2)
    question = rng.choice(
        (
            f"What is the opposite of {word}?",
            f"Which word means the opposite of {word}?",
            f"{one} asks: what is the opposite of {word}?",
            f"{one} says {word}. {two} says the opposite. What does {two} say?",
        )
    )
    return question, answer


def next_day(rng: random.Random) -> tuple[str, str]:
    """The day before or after another."""
    index, step = rng.randrange(7), rng.choice((1, -1))
    day, answer = DAYS[index], DAYS[(index + step) % 7]
    name = rng.choice(NAMES)
    one, two = rng.sample(("swims", "reads", "paints", "cooks", "sings"), 2)
    after = (
        f"{name} asks: what day comes after {day}?",
        f"{name} says that today is {day}. What day is tomorrow?",
        f"{name} {one} on {day} and {two} the next day. When does {name} {two[:-1]}?",
    )
    before = (
        f"{name} asks: what day comes before {day}?",
        f"{name} says that today is {day}. What day was yesterday?",
        f"{name} {one} on {day} and {two} the day before. When does {name} {two[:-1]}?",
    )
    return rng.choice(after if step == 1 else before), answer


def next_number(rng: random.Random) -> tuple[str, str]:
    """The number before or after another, or the next in a row of equal steps."""
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        number, step = rng.randint(2, 19), rng.choice((1, -1))
        word = "after" if step == 1 else "before"
        asked = f"what number comes {word} {number}?"
        return rng.choice((f"{name} asks: {asked}", capital(asked))), str(number + step)
    step = rng.choice((1, 2, -1))
    start = rng.randint(1, 14) if step > 0 else rng.randint(4, 20)
    row = ", ".join(str(start + step * turn) for turn in range(3))
    return f"{name} counts: {row}. What number comes next?", str(start + 3 * step)


def next_season(rng: random.Random) -> tuple[str, str]:
    """The season before or after another."""
    index, step = rng.randrange(4), rng.choice((1, -1))
    word = "after" if step == 1 else "before"
    name = rng.choice(NAMES)
    return (
        f"{name} asks: which season comes {word} {SEASONS[index]}?",
        SEASONS[(index + step) % 4],
    )


def sequence(rng: random.Random) -> tuple[str, str]:
    """Days, numbers or seasons in their order."""
    return rng.choice((next_day, next_day, next_number, next_number, next_season))(rng)


def compare_amounts(rng: random.Random) -> tuple[str, str]:
    """Who has more or fewer, or who is older or younger."""
    one, two = rng.sample(NAMES, 2)
    low, high = sorted(rng.sample(range(2, 21), 2))
    first, second = (low, high) if rng.random() < 0.5 else (high, low)
    bigger, smaller = (one, two) if first > second else (two, one)
    things = rng.choice(THINGS)
    more = rng.random() < 0.5
    answer = bigger if more else smaller
    if rng.random() < 0.5:
        context = f"{one} has {first} {things} and {two} has {second} {things}."
        return f"{context} Who has {'more' if more else 'fewer'} {things}?", answer
    context = f"{one} is {first} years old and {two} is {second} years old."
    return f"{context} Who is {'older' if more else 'younger'}?", answer


def compare_numbers(rng: random.Random) -> tuple[str, str]:
    """Which of two numbers is bigger or smaller."""
    one, two = rng.sample(range(1, 21), 2)
    if rng.random() < 0.5:
        return f"Which number is bigger, {one} or {two}?", str(max(one, two))
    return f"Which number is smaller, {one} or {two}?", str(min(one, two))


def compare_three(rng: random.Random) -> tuple[str, str]:
    """Who stands at one end of a chain of three."""
    top, middle, bottom = subjects(rng, 3)
    more, most, less, least = rng.choice(COMPARATIVES)
    clauses = [
        rng.choice((f"{top} is {more} than {middle}", f"{middle} is {less} than {top}")),
        rng.choice((f"{middle} is {more} than {bottom}", f"{bottom} is {less} than {middle}")),
    ]
    rng.shuffle(clauses)
    superlative, answer = rng.choice(((most, top), (least, bottom)))
    return f"{told(rng, clauses)} Who is the {superlative}?", answer


def comparison(rng: random.Random) -> tuple[str, str]:
    """Amounts, bare numbers or a chain of three."""
    return rng.choice((compare_amounts, compare_amounts, compare_numbers, compare_three))(rng)


def fact(rng: random.Random) -> tuple[str, str]:
    """Something that is always so in Lumo."""
    villager = rng.choice(LUMO)
    animal, name = villager.animal, villager.name
    who_is_meant = rng.choice((f"the {animal}", name))
    question, answer = rng.choice(
        (
            (f"what is the {animal} of Lumo called?", name),
            (f"which animal of Lumo is called {name}?", f"the {animal}"),
            (f"where in Lumo does {who_is_meant} live?", villager.home),
            (f"which animal of Lumo lives {villager.home}?", f"the {animal}"),
            (f"what does {who_is_meant} of Lumo like to eat?", villager.food),
            (f"which animal of Lumo likes to eat {villager.food}?", f"the {animal}"),
            (f"which animal {villager.work} in Lumo?", f"the {animal}"),
            (f"what does {who_is_meant} do in Lumo?", villager.work),
        )
    )
    if rng.random() < 0.7:
        return f"{rng.choice(NAMES)} asks: {question}", answer
    return capital(question), answer


def tracking(rng: random.Random) -> tuple[str, str]:
    """Where something is after it has been moved, handed on, or somebody has walked."""
    form = rng.randrange(3)
    one, two, three = rng.sample(NAMES, 3)
    thing = rng.choice(OBJECTS)
    if form == 0:
        old, new = rng.sample(CONTAINERS, 2)
        asked, answer = rng.choice((("is the {} now", new), ("was the {} first", old)))
        return (
            f"{one} put the {thing} in the {old}. Then {two} moved it to the {new}. "
            f"Where {asked.format(thing)}?"
        ), f"in the {answer}"
    if form == 1:
        asked, answer = rng.choice((("has the {} now", three), ("had the {} first", one)))
        return (
            f"{one} had a {thing}. {one} gave it to {two}. Then {two} gave it to {three}. "
            f"Who {asked.format(thing)}?"
        ), answer
    old, new, other = rng.sample(PLACES, 3)
    actor, answer = rng.choice(((one, new), (two, other)))
    return (
        f"{one} was {old}. {two} was {other}. Then {one} walked away and is {new} now. "
        f"Where is {actor} now?"
    ), answer


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": arithmetic,
    "who": who,
    "what": what,
    "where": where,
    "colour": colour,
    "opposite": opposite,
    "sequence": sequence,
    "comparison": comparison,
    "fact": fact,
    "tracking": tracking,
}


def draw_question(rng: random.Random, kind: str, *, held_out: bool) -> Item:
    """Draw one question of a kind from one side of the split."""
    while True:
        question, answer = KINDS[kind](rng)
        if is_held_out(question) == held_out:
            return Item(kind, question, answer)


def held_out_questions(seed: int, per_kind: int) -> list[Item]:
    """Different test questions, equally many of each kind, kind by kind."""
    rng = random.Random(seed)
    items: dict[str, Item] = {}
    for position, kind in enumerate(KINDS, start=1):
        while len(items) < position * per_kind:
            item = draw_question(rng, kind, held_out=True)
            items.setdefault(item.question, item)
    return list(items.values())


# --- stories ---------------------------------------------------------------------------------

LOOKS = ("little", "brave", "kind", "clever", "shy", "happy", "small", "funny", "gentle")
# Stories take place outdoors, where it can rain and where a seed can grow.
SCENES = (
    "in the forest", "in the garden", "by the river", "on the farm", "on the beach",
    "in the park", "on the hill", "by the lake",
)  # fmt: skip
HOMES = (*SCENES, "in the barn", "in the village")
HIDDEN = ("under a bush", "behind a tree", "behind a rock", "in the tall grass", "next to a log")
# What an animal usually is; half of the stories about it keep to that.
USUAL_LOOKS = {
    "fox": "clever", "bear": "kind", "owl": "clever", "rabbit": "shy", "mouse": "brave",
    "frog": "funny", "duck": "happy", "cat": "shy", "dog": "brave", "hen": "kind",
    "goat": "funny", "turtle": "gentle", "pig": "happy", "horse": "gentle", "boy": "little",
    "girl": "small",
}  # fmt: skip
LONGEST_STORY = 6
OPENINGS = ("One day", "One morning", "One sunny day", "One cold day", "Early one morning")


def character(rng: random.Random, kind: str, name: str) -> Character:
    """Give a name and a look to an animal or a child."""
    if kind == "child":
        kind = "girl" if name in GIRLS else "boy"
    look = rng.choice(LOOKS)
    if kind in USUAL_LOOKS and rng.random() < 0.5:
        look = USUAL_LOOKS[kind]
    return Character(kind, name, look)


def make_cast(rng: random.Random) -> Cast:
    """Choose who and what a story is about."""
    one, two = rng.sample((*ANIMALS, "child", "child"), 2)
    first, second = rng.sample(NAMES, 2)
    place = rng.choice(SCENES)
    home = rng.choice([home for home in HOMES if home != place])
    return Cast(
        character(rng, one, first),
        character(rng, two, second),
        home,
        place,
        rng.choice(COLOURS),
        rng.choice(OBJECTS),
    )


def the_place(phrase: str) -> str:
    """Strip the preposition: "by the river" becomes "the river"."""
    return phrase.split(" ", 1)[1]


def lost(rng: random.Random, cast: Cast) -> list[str]:
    """The hero loses a thing and the friend finds it."""
    hero, friend, thing = cast.hero, cast.friend, f"{cast.colour} {cast.thing}"
    spot, wrong = rng.sample(HIDDEN, 2)
    search = rng.choice(
        (
            f"{hero.name} looked {wrong}, but it was not there.",
            f"{hero.name} sat down and began to cry.",
        )
    )
    return [
        f"{hero.name} had a {thing} and loved it very much.",
        f"{rng.choice(OPENINGS)}, {hero.he} lost the {cast.thing} {cast.place}. {search}",
        f"Then {friend.full} came by and found the {cast.thing} {spot}.",
        rng.choice(
            (
                (
                    f'"Thank you, {friend.name}!" said {hero.name}, and they played with the '
                    f"{thing} all day."
                ),
                f"{hero.name} hugged {friend.name} and never lost the {thing} again.",
            )
        ),
    ]


def rescue(rng: random.Random, cast: Cast) -> list[str]:
    """The hero frees the friend and is given a present."""
    hero, friend, thing = cast.hero, cast.friend, f"{cast.colour} {cast.thing}"
    trouble, tool, act = rng.choice(
        (
            ("had fallen into a deep hole", "a long rope", f"pulled {friend.him} out"),
            ("was stuck in the mud", "a strong stick", f"pulled {friend.him} out"),
            ("was stuck in a tall tree", "a ladder", f"helped {friend.him} down"),
            ("was stuck in a net", "a sharp stone", f"set {friend.him} free"),
        )
    )
    return [
        f"{rng.choice(OPENINGS)}, {hero.he} was walking {cast.place} and heard a cry for help.",
        f"{capital(friend.full)} {trouble}.",
        f"{hero.name} found {tool} and {act}.",
        rng.choice(
            (
                f"{friend.name} was so happy that {friend.he} gave {hero.name} a {thing}.",
                f'"You saved me, {hero.name}!" said {friend.name}, and gave {hero.him} a {thing}.',
            )
        ),
    ]


def rain(rng: random.Random, cast: Cast) -> list[str]:
    """It rains and the friend takes the hero in."""
    hero, friend = cast.hero, cast.friend
    drink = rng.choice(("warm soup", "hot tea", "warm milk"))
    return [
        f"{rng.choice(OPENINGS)}, {hero.name} was playing {cast.place} when it began to rain.",
        (
            f"{hero.he.capitalize()} was wet and cold. {capital(friend.full)} saw {hero.him} "
            f'and said, "Come into my house!"'
        ),
        f"{friend.name} gave {hero.him} {drink} and a dry {cast.colour} blanket.",
        rng.choice(
            (
                f"When the rain stopped, {hero.name} thanked {friend.name} for the {drink}.",
                f"{hero.name} drank the {drink}, and soon {hero.he} was warm again.",
            )
        ),
    ]


def gift(rng: random.Random, cast: Cast) -> list[str]:
    """The hero makes a present for the friend's birthday."""
    hero, friend, thing = cast.hero, cast.friend, f"{cast.colour} {cast.thing}"
    return [
        f"{hero.his.capitalize()} best friend was {friend.full}.",
        (
            f"It was {friend.name}'s birthday, so {hero.name} "
            f"{rng.choice(('bought', 'found'))} a {thing}."
        ),
        (
            f"{hero.he.capitalize()} put it in a box and took it to {the_place(cast.place)}, "
            f"where {friend.name} was waiting."
        ),
        rng.choice(
            (
                f'"A {thing}! I love it!" said {friend.name}, and they danced together.',
                f"{friend.name} opened the box, saw the {thing} and hugged {hero.name}.",
            )
        ),
    ]


def learn(rng: random.Random, cast: Cast) -> list[str]:
    """The hero cannot do something until the friend shows how."""
    hero, friend = cast.hero, cast.friend
    skill, did = rng.choice(
        (("swim", "swam"), ("sing", "sang"), ("dance", "danced"), ("read", "read"),
         ("jump", "jumped"), ("paint", "painted"))
    )  # fmt: skip
    return [
        f"{hero.name} wanted to {skill}, but {hero.he} did not know how.",
        f"{rng.choice(OPENINGS)}, {hero.he} met {friend.full} {cast.place}.",
        f'"I will show you how to {skill}," said {friend.name}. {hero.name} tried again and again.',
        rng.choice(
            (
                f"At last {hero.name} {did} very well, and {friend.name} clapped.",
                f"By the end of the day {hero.name} {did} as well as {friend.name}.",
            )
        ),
    ]


def share(rng: random.Random, cast: Cast) -> list[str]:
    """The hero shares food and the friend pays it back with help."""
    hero, friend, food = cast.hero, cast.friend, rng.choice(FOODS)
    return [
        (
            f"{rng.choice(OPENINGS)}, {hero.he} took some {food} and walked to "
            f"{the_place(cast.place)}."
        ),
        f"There {hero.he} met {friend.full} who was very hungry.",
        f"{hero.name} gave {friend.him} half of the {food}, and they ate together.",
        rng.choice(
            (
                (
                    f'"Next time I will share with you," said {friend.name}, and the next day '
                    f"{friend.he} came back with more {food}."
                ),
                (
                    f'"You are so kind, {hero.name}," said {friend.name}. The {food} had never '
                    f"tasted so good."
                ),
            )
        ),
    ]


def noise(rng: random.Random, cast: Cast) -> list[str]:
    """A strange noise turns out to be harmless."""
    hero, friend, thing = cast.hero, cast.friend, f"{cast.colour} {cast.thing}"
    return [
        f"One night, {hero.name} heard a strange noise {cast.place}.",
        f"{hero.he.capitalize()} was afraid, but {hero.he} took a light and went to look.",
        f"It was only {friend.full}, who was looking for {friend.his} {thing}.",
        rng.choice(
            (
                f"They both laughed, and {hero.name} helped {friend.him} to find the {thing}.",
                (
                    f"{hero.name} held up the light, and soon {friend.name} saw the {thing} "
                    f"{rng.choice(HIDDEN)}."
                ),
            )
        ),
    ]


def hide(rng: random.Random, cast: Cast) -> list[str]:
    """A game of hide and seek."""
    hero, friend, spot = cast.hero, cast.friend, rng.choice(HIDDEN)
    return [
        f"{rng.choice(OPENINGS)}, {hero.he} played hide and seek {cast.place} with {friend.full}.",
        f"{friend.name} counted to ten, and {hero.name} hid {spot}.",
        f"But {hero.name} wore a {cast.colour} hat, and {friend.name} saw the hat at once.",
        rng.choice(
            (
                f'"I found you {spot}!" said {friend.name}, and they both laughed.',
                f"The next time, {hero.name} took off the {cast.colour} hat before {hero.he} hid.",
            )
        ),
    ]


def grow(rng: random.Random, cast: Cast) -> list[str]:
    """A seed grows with patience and water."""
    hero, friend = cast.hero, cast.friend
    plant = rng.choice((f"{cast.colour} flower", f"tree with {cast.colour} leaves"))
    return [
        f"{rng.choice(OPENINGS)}, {hero.name} found a seed {cast.place} and put it in the ground.",
        f"{hero.his.capitalize()} friend, {friend.full}, gave it water every day.",
        f"For a long time nothing came up. Then, in spring, they saw a {plant}.",
        rng.choice(
            (
                f'"We grew it together," said {hero.name} to {friend.name}.',
                f"{hero.name} and {friend.name} sat by the {plant} all summer.",
            )
        ),
    ]


def bake(rng: random.Random, cast: Cast) -> list[str]:
    """A cake is made, goes missing and comes back."""
    hero, friend = cast.hero, cast.friend
    filling = rng.choice(("honey", "plum", "nut", "pear"))
    return [
        f"{rng.choice(OPENINGS)}, {hero.name} made a big {filling} cake and put it by the window.",
        f"Soon the cake was gone! {hero.name} saw footprints that went to {the_place(cast.place)}.",
        f"There sat {friend.full}, eating the {filling} cake.",
        rng.choice(
            (
                (
                    f'"I am sorry, {hero.name}," said {friend.name}, and the next day they '
                    f"made a new {filling} cake together."
                ),
                f"{hero.name} laughed, sat down with {friend.name} and ate the rest of the cake.",
            )
        ),
    ]


PLOTS = (lost, rescue, rain, gift, learn, share, noise, hide, grow, bake)
# The plots that suit a hero; most stories use one of them.
PLOTS_OF_LOOK = {
    "little": (lost, rain), "brave": (rescue, noise), "kind": (share, gift),
    "clever": (noise, lost), "shy": (learn, hide), "happy": (bake, rain),
    "small": (rain, learn), "funny": (hide, bake), "gentle": (grow, gift),
}  # fmt: skip


def opening(rng: random.Random, cast: Cast) -> str:
    """Introduce the hero and where home is."""
    hero = cast.hero
    return rng.choice(
        (
            f"Once upon a time, there was {hero.full} who lived {cast.home}.",
            f"Once upon a time, {hero.full} lived {cast.home}.",
            f"Once upon a time, there was {hero.full}.",
            f"Long ago, {hero.full} lived {cast.home}.",
            f"There once was {hero.full}.",
            f"{capital(cast.home)} lived {hero.full}.",
            f"The {hero.look} {hero.kind} {hero.name} lived {cast.home}.",
            f"{hero.name} was a {hero.look} {hero.kind} who lived {cast.home}.",
        )
    )


def ending(rng: random.Random, cast: Cast) -> str:
    """Close with the friendship or the way home."""
    hero, friend = cast.hero, cast.friend
    return rng.choice(
        (
            f"From then on, {hero.name} and {friend.name} were best friends.",
            f"{hero.name} went home with a big smile.",
            f"That night, {hero.name} told everyone about {friend.name} the {friend.kind}.",
            f"{hero.name} the {hero.kind} never forgot that day.",
            "They lived happily ever after.",
        )
    )


def sentence_count(text: str) -> int:
    """Count sentences; what follows a quotation in lower case belongs to the same one."""
    return len(re.findall(r'[.!?]"? (?=[A-Z"])', text)) + 1


def tiny(rng: random.Random, cast: Cast) -> list[str]:
    """A story of two or three sentences in all."""
    hero, friend, thing = cast.hero, cast.friend, f"{cast.colour} {cast.thing}"
    return [
        rng.choice(
            (
                (
                    f"{hero.he.capitalize()} found a {thing} {cast.place} and gave it to "
                    f"{friend.full}."
                ),
                (
                    f"{hero.he.capitalize()} met {friend.full} {cast.place}, and they played "
                    f"with a {thing}."
                ),
            )
        )
    ]


def story(rng: random.Random, cast: Cast) -> str:
    """Write a story of two to six short sentences about a given cast."""
    if rng.random() < 0.1:
        body = tiny(rng, cast)
    else:
        plots = PLOTS_OF_LOOK[cast.hero.look] if rng.random() < 0.7 else PLOTS
        body = rng.choice(plots)(rng, cast)
    text = " ".join([opening(rng, cast), *body])
    if sentence_count(text) < LONGEST_STORY and rng.random() < 0.7:
        text = f"{text} {ending(rng, cast)}"
    return text


def story_request(rng: random.Random, cast: Cast) -> str:
    """Ask for a story about this cast, naming more or less of it."""
    hero, friend = article(cast.hero.kind), article(cast.friend.kind)
    return rng.choice(
        (
            f"Tell me a story about {hero}.",
            f"Tell me a story about {hero}.",
            f"Tell me a story about a {cast.hero.look} {cast.hero.kind}.",
            f"Please tell me a short story about {hero}.",
            f"Can you tell me a story about {hero}?",
            f"Tell me a story about {hero} named {cast.hero.name}.",
            f"Tell me a story about {hero} and {friend}.",
            "Tell me a story.",
        )
    )


def lumo_text(rng: random.Random) -> str:
    """Describe two or three animals of Lumo in plain sentences."""
    parts = []
    for one in rng.sample(LUMO, rng.choice((2, 3))):
        facts = [f"{one.name} lives {one.home}.", f"{one.name} likes to eat {one.food}."]
        rng.shuffle(facts)
        work = f"In Lumo, the {one.animal} is called {one.name} and {one.work}."
        parts.append(" ".join([work, *facts]))
    return " ".join(parts)


# --- documents -------------------------------------------------------------------------------


def turn(rng: random.Random) -> list[Segment]:
    """One question or story request of the training side, with its answer."""
    if rng.random() < 0.12:
        cast = make_cast(rng)
        prompt = chat_prompt(story_request(rng, cast))
        return [Segment("prompt", prompt), Segment("story", f" {story(rng, cast)}")]
    item = draw_question(rng, rng.choice(tuple(KINDS)), held_out=False)
    return [Segment("prompt", item.prompt), Segment("answer", f" {item.answer}")]


def conversation(rng: random.Random) -> list[Segment]:
    """One to three turns, each on its own line, as the chat template writes them."""
    segments = turn(rng)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        prompt, answer = turn(rng)
        segments += [Segment("prompt", f"\n{prompt.text}"), answer]
    return segments


def document(rng: random.Random) -> list[Segment]:
    """One training document."""
    draw = rng.random()
    if draw < 0.15:
        return [Segment("story", story(rng, make_cast(rng)))]
    if draw < 0.18:
        return [Segment("story", lumo_text(rng))]
    return conversation(rng)
