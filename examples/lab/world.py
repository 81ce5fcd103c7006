"""The lab's world: true facts as short questions, and which of them training never sees.

`data/*.json` holds the facts. A question is a prompt and its answer; most facts are asked in two or three phrasings
(sums, digits and what is three hops from an inventor in one, a place right after its city in six), and a fact that is
held out is held out in all of them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
STATE_RELATIONS = ("capital", "nickname", "region", "abbreviation", "bird", "flower", "tree", "statehood")
COUNTRY_RELATIONS = ("capital", "language", "currency", "continent")
BEFORE_PLACE = ("{}", "the city of {}", "people from {}", "near {}", "a street in {}", "the weather in {}")
"""What stands before a place that directly follows its city: "the city of Dallas Texas"."""
HELD_OUT = 0.2
"""Share of two-hop questions, of addition pairs, of name pairs and of three-hop questions that training never sees."""
NEW_CITIES = 0.05
"""Share of cities that training never asks a two-hop question about."""
LARGEST_OPERAND = 99
LARGEST_NUMBER = 2 * LARGEST_OPERAND


@dataclass(frozen=True)
class Question:
    """A prompt, its answer, and what a perfect reader would have in mind between the two."""

    family: str
    prompt: str
    answer: str
    subject: str = ""
    """The city, person, invention or word asked about; for addition the two operands, joined by +."""
    relation: str = ""
    bridge: str = ""
    """The state or country that is not in the prompt and that links subject and answer."""
    split: str = "train"
    """"train", "held out" or "new city"."""


@dataclass(frozen=True)
class World:
    """The facts as read from the data files."""

    states: list[dict]
    countries: list[dict]
    inventions: list[dict]
    opposites: list[dict]
    scenes: dict


def read_world(folder: Path = DATA) -> World:
    """Read the facts."""
    parts = ("states", "countries", "inventions", "opposites", "scenes")
    return World(**{part: json.loads((folder / f"{part}.json").read_text(encoding="utf-8")) for part in parts})


def questions(world: World, seed: int = 0) -> list[Question]:
    """Every question that can be listed (not the repeated random sequences), with its split."""
    random = np.random.default_rng(seed)
    return [
        *_places(world.states, "state", STATE_RELATIONS, random),
        *_places(world.countries, "country", COUNTRY_RELATIONS, random),
        *_inventions(world, random),
        *_addition(random),
        *_digits(),
        *_opposites(world),
        *_indirect_objects(world, random),
    ]


def _places(places: list[dict], kind: str, relations: tuple[str, ...], random: np.random.Generator) -> list[Question]:
    """Facts about states (or countries), the place of each city, and the two hops from city to fact."""
    result = []
    cities = [(place, city) for place in places for city in place["cities"]]
    new = {cities[i][1] for i in random.permutation(len(cities))[: round(NEW_CITIES * len(cities))]}
    for place in places:
        for relation in relations:
            fact = Question(f"{kind} fact", "", place[relation], place["name"], relation, place["name"])
            result += _ask(fact, f"the {relation} of {place['name']} is", f"{place['name']} has the {relation}")
    for place, city in cities:
        follows = Question(f"city then {kind}", "", place["name"], city, kind, place["name"])
        result += _ask(follows, *(before.format(city) for before in BEFORE_PLACE))
        fact = Question(f"city of {kind}", "", place["name"], city, kind, place["name"])
        result += _ask(fact, f"the {kind} containing {city} is", f"{city} is in the {kind} of", f"{city},")
        for relation in relations:
            held_out = random.random() < HELD_OUT
            split = "new city" if city in new else "held out" if held_out else "train"
            fact = Question(f"two-hop {kind}", "", place[relation], city, relation, place["name"], split)
            result += _ask(
                fact,
                f"the {relation} of the {kind} containing {city} is",
                f"the {kind} containing {city} has the {relation}",
            )
    return result


def _inventions(world: World, random: np.random.Generator) -> list[Question]:
    """Invention → inventor → birthplace → country (→ a fact of the country): one, two and three hops."""
    countries = {country["name"]: country for country in world.countries}
    result = []
    for entry in world.inventions:
        thing, person, town, country = (entry[key] for key in ("invention", "inventor", "birthplace", "country"))
        fact = Question("inventor", "", person, thing, "inventor", person)
        result += _ask(fact, f"the inventor of the {thing} is", f"the {thing} was invented by")
        fact = Question("birthplace", "", town, person, "birthplace", town)
        result += _ask(fact, f"the birthplace of {person} is", f"{person} was born in")
        fact = Question("two-hop invention", "", town, thing, "birthplace", person)
        result += _ask(
            fact, f"the birthplace of the inventor of the {thing} is", f"the inventor of the {thing} was born in"
        )
        fact = Question("two-hop invention", "", country, person, "country", town)
        result += _ask(
            fact, f"the country of the birthplace of {person} is", f"the birthplace of {person} is in the country of"
        )
        split = "held out" if random.random() < HELD_OUT else "train"
        fact = Question("three-hop", "", country, thing, "country", town, split)
        result += _ask(
            fact,
            f"the country of the birthplace of the inventor of the {thing} is",
            f"the birthplace of the inventor of the {thing} is in the country of",
        )
        for relation in COUNTRY_RELATIONS:
            split = "held out" if random.random() < HELD_OUT else "train"
            fact = Question("three-hop", "", countries[country][relation], person, relation, country, split)
            result += _ask(fact, f"the {relation} of the country of the birthplace of {person} is")
    return result


def _addition(random: np.random.Generator) -> list[Question]:
    """All sums of two numbers up to 99; a pair is held out in both orders."""
    result = []
    for a in range(LARGEST_OPERAND + 1):
        for b in range(a, LARGEST_OPERAND + 1):
            split = "held out" if random.random() < HELD_OUT else "train"
            for x, y in sorted({(a, b), (b, a)}):
                fact = Question("addition", "", str(x + y), f"{x}+{y}", "sum", split=split)
                result += _ask(fact, f"calc: {x}+{y}=")
    return sorted(result, key=lambda question: question.prompt)


def _digits() -> list[Question]:
    """What a number's digits and neighbours are: they give the number tokens the structure that sums need."""
    result = []
    for n in range(LARGEST_NUMBER + 1):
        fact = Question("digits", "", "", str(n), "")
        result += _ask(replace(fact, answer=str(n % 10), relation="last digit"), f"the last digit of {n} is")
        result += _ask(replace(fact, answer=str(n // 10), relation="tens"), f"the tens of {n} is")
        if n < LARGEST_NUMBER:
            result += _ask(replace(fact, answer=str(n + 1), relation="next"), f"the number after {n} is")
            result += _ask(
                replace(fact, subject=str(n + 1), answer=str(n), relation="previous"), f"the number before {n + 1} is"
            )
    return result


def _opposites(world: World) -> list[Question]:
    """Opposite words, asked in the language of the word."""
    frames = {
        "english": ("the opposite of {} is", "{} is the opposite of"),
        "french": ("le contraire du mot {} est", "{} est le contraire du mot"),
        "spanish": ("lo contrario de {} es", "{} es lo contrario de"),
    }
    result = []
    for pair in world.opposites:
        for language, phrasings in frames.items():
            for word, opposite in (pair[language], pair[language][::-1]):
                fact = Question(f"opposites {language}", "", opposite, word, "opposite", pair["english"][0])
                result += _ask(fact, *(phrasing.format(word) for phrasing in phrasings))
    return result


def _indirect_objects(world: World, random: np.random.Generator) -> list[Question]:
    """Sentences with two names, of which one is repeated: the answer is the other; held out by pairs of names."""
    scenery = np.random.default_rng(1)
    names, places, objects = (world.scenes[key] for key in ("names", "places", "objects"))
    result = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            split = "held out" if random.random() < HELD_OUT else "train"
            for receiver, giver in ((first, second), (second, first)):
                for opening in ("When", "After"):
                    place, thing = places[random.integers(len(places))], objects[random.integers(len(objects))]
                    pair = (receiver, giver) if random.random() < 0.5 else (giver, receiver)
                    fact = Question("indirect object", "", receiver, receiver, giver, split=split)
                    elsewhere, other = places[scenery.integers(len(places))], objects[scenery.integers(len(objects))]
                    result += _ask(
                        fact,
                        f"{opening} {pair[0]} and {pair[1]} went to the {place}, {giver} gave a {thing} to",
                        f"{opening} {pair[1]} and {pair[0]} went to the {elsewhere}, {giver} gave a {other} to",
                    )
    return result


def _ask(fact: Question, *phrasings: str) -> list[Question]:
    """The same fact in several phrasings."""
    return [replace(fact, prompt=phrasing) for phrasing in phrasings]
