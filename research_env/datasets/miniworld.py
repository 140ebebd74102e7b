"""MiniWorld: an invented world of people, works, organisations and places, made from a seed.

Every entity has one passage that states five or six facts about it, several of them with values of
the same type (a film has a director, a writer and a composer). Questions chain one to four such
facts, or compare the years of two entities. Relations are paraphrased, both in passages and in
questions. Gazettes mention names without stating facts: they are distractors. Nothing in it is
true elsewhere, so a model can only answer by searching.

Another seed is another world with other names. The generator needs no file and no network.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from research_env.datasets.base import Dataset, Hop, Question
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.retrieval.base import Passage

Kind = Literal["person", "work", "organisation", "city", "country", "year"]

SPLITS = {"train": 4000, "dev": 400}  # number of questions per split
HOPS = {1: 0.22, 2: 0.34, 3: 0.21, 4: 0.13}  # shares of chains by length; the rest are comparisons
POPULATION: dict[Kind, int] = {
    "person": 440,
    "work": 320,
    "organisation": 220,
    "city": 180,
    "country": 40,
}
GAZETTES = 120
FIRST_YEAR, LAST_YEAR = 1900, 1999
MIN_YEARS_APART = 8  # between two entities that a question compares
NAME_SHARES = 8  # all names are dealt into this many shares
OWN_SHARES = (0, 1)
"""The world of a seed takes its names from share ``seed % NAME_SHARES`` if that is one of these,
else from all other shares. So worlds to learn in and to test in have no name in common."""


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact: its name, the type of its value, and the ways to say it.

    Each of ``statements`` is followed by the value, each of ``references`` by the subject.
    """

    name: str
    value: Kind
    statements: tuple[str, ...]
    references: tuple[str, ...]


# No statement holds the stem of its relation's name: a query of an entity and a relation would
# also find passages of other entities that mention it.
RELATIONS: dict[Kind, tuple[Relation, ...]] = {
    "person": (
        Relation("spouse", "person", ("married to", "the partner of", "wed to"),
                 ("the spouse of", "the person married to", "the partner of")),
        Relation("mentor", "person", ("taught by", "a pupil of", "trained by"),
                 ("the mentor of", "the person who taught", "the teacher of")),
        Relation("birthplace", "city", ("born in", "a native of", "raised in"),
                 ("the birthplace of", "the city that saw the birth of", "the native city of")),
        Relation("home", "city", ("living in", "a resident of", "settled in"),
                 ("the home of", "the city that houses", "the residence of")),
        Relation("employer", "organisation", ("working for", "on the staff of", "hired by"),
                 ("the employer of", "the organisation that pays", "the workplace of")),
        Relation("birth", "year", ("alive since", "dating from", "registered in"),
                 ("the birth year of", "the year of birth of", "the year that bore")),
    ),
    "work": (
        Relation("director", "person", ("directed by", "filmed by", "staged by"),
                 ("the director of", "the person who directed", "the filmmaker behind")),
        Relation("writer", "person", ("written by", "scripted by", "penned by"),
                 ("the writer of", "the person who wrote", "the author of")),
        Relation("composer", "person", ("scored by", "with music by", "with songs by"),
                 ("the composer of", "the person who scored", "the musician behind")),
        Relation("studio", "organisation", ("released by", "distributed by", "produced by"),
                 ("the studio of", "the organisation that released", "the distributor of")),
        Relation("premiere", "year", ("first shown in", "on screens since", "seen from"),
                 ("the premiere year of", "the year of the premiere of", "the year that saw")),
    ),
    "organisation": (
        Relation("founder", "person", ("founded by", "started by", "created by"),
                 ("the founder of", "the person who founded", "the creator of")),
        Relation("chair", "person", ("run by", "headed by", "managed by"),
                 ("the chair of", "the person who runs", "the head of")),
        Relation("seat", "city", ("based in", "headquartered in", "located in"),
                 ("the seat of", "the city that hosts", "the headquarters of")),
        Relation("owner", "organisation", ("owned by", "a branch of", "controlled by"),
                 ("the owner of", "the organisation that owns", "the parent of")),
        Relation("opening", "year", ("trading since", "active from", "set up in"),
                 ("the opening year of", "the year of the opening of", "the year that launched")),
    ),
    "city": (
        Relation("mayor", "person", ("governed by", "administered by", "led by"),
                 ("the mayor of", "the person who governs", "the administrator of")),
        Relation("architect", "person", ("designed by", "planned by", "built by"),
                 ("the architect of", "the person who designed", "the planner of")),
        Relation("country", "country", ("a part of", "belonging to", "inside"),
                 ("the country of", "the country that contains", "the state around")),
        Relation("twin", "city", ("paired with", "a sister of", "linked to"),
                 ("the twin of", "the city paired with", "the sister city of")),
        Relation("charter", "year", ("on maps since", "on record from", "walled in"),
                 ("the charter year of", "the year of the charter of", "the year that chartered")),
    ),
    "country": (
        Relation("ruler", "person", ("ruled by", "reigned by", "commanded by"),
                 ("the ruler of", "the person who rules", "the monarch of")),
        Relation("poet", "person", ("praised by", "sung by", "honoured by"),
                 ("the poet of", "the person who praised", "the bard of")),
        Relation("capital", "city", ("steered from", "led from", "centred on"),
                 ("the capital of", "the city that leads", "the first city of")),
        Relation("ally", "country", ("a friend of", "in league with", "bound to"),
                 ("the ally of", "the country in league with", "the friend of")),
        Relation("bank", "organisation", ("financed by", "a client of", "funded by"),
                 ("the bank of", "the organisation that finances", "the lender of")),
    ),
}  # fmt: skip

NOUNS: dict[Kind, tuple[str, ...]] = {
    "person": ("person", "citizen"),
    "work": ("film", "play"),
    "organisation": ("organisation", "company"),
    "city": ("city", "town"),
    "country": ("state", "kingdom"),
}
COMPARED: dict[Kind, str] = {"person": "birth", "work": "premiere", "organisation": "opening",
                             "city": "charter"}  # fmt: skip
COMPARISONS = {
    "earlier": ("Which has the earlier {name},", "Which came first by {name},"),
    "later": ("Which has the later {name},", "Which came last by {name},"),
}
ASKED: dict[Kind, tuple[str, ...]] = {
    "person": ("Who is", "Name"),
    "work": ("What is", "Name"),
    "organisation": ("What is", "Name"),
    "city": ("What is", "Name"),
    "country": ("What is", "Name"),
    "year": ("What is", "Name"),
}
GAZETTE_VERBS = ("mentions", "portrays", "remembers", "advertises", "salutes")

# A name is a beginning of three letters, and an ending that shows its kind.
BEGINNINGS = tuple(
    first + vowel + last for first in "BDFGKLMNRSTV" for vowel in "aeiou" for last in "lnr"
)
ENDINGS: dict[str, tuple[str, ...]] = {
    "person": ("ani", "ora", "imir", "eth", "una", "ovan", "ika", "ander", "ys", "elin", "oth",
               "ami", "uro", "ede", "ilda", "asko", "enna", "ivo", "orin", "ulf"),
    "work": ("saga", "song", "mask", "dream", "night", "storm", "tale", "dance", "ghost", "rose",
             "flame", "mirror", "river", "garden", "winter", "shadow"),
    "organisation": ("corp", "works", "labs", "union", "trust", "guild", "motors", "press",
                     "bureau", "mills"),
    "city": ("ford", "ton", "burg", "holm", "port", "mouth", "field", "haven", "gate", "wick"),
    "country": ("land", "stan", "mark", "reich", "onia", "avia"),
    "gazette": ("post", "herald", "courier", "times", "echo", "voice"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entity:
    """Something with a passage: its facts map the name of a relation to a name or a year."""

    name: str
    kind: Kind
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class World:
    """A whole invented world: its entities by name, and its passages in corpus order."""

    seed: int
    entities: dict[str, Entity]
    passages: tuple[Passage, ...]
    variant: str = ""  # suffix of the name, for a world that `miniworld_hard` has changed

    @property
    def name(self) -> str:
        """The corpus name, unique to the seed and the variant."""
        return f"miniworld-{self.seed}{self.variant}"

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.passages)

    def fingerprint(self) -> str:
        """SHA-256 over ids, titles and texts."""
        digest = hashlib.sha256()
        for passage in self.passages:
            digest.update(f"{passage.id}\0{passage.title}\0{passage.text}\n".encode())
        return digest.hexdigest()

    def passage_id(self, entity: str) -> str:
        """Id of the passage about an entity."""
        return f"mw{self.seed}-{entity.lower().replace(' ', '-')}"


def _names(rng: random.Random, seed: int, family: str, count: int) -> list[str]:
    pool = [beginning + ending for beginning in BEGINNINGS for ending in ENDINGS[family]]
    random.Random(f"names {family}").shuffle(pool)
    share = seed % NAME_SHARES
    kept = (
        [share] if share in OWN_SHARES else [i for i in range(NAME_SHARES) if i not in OWN_SHARES]
    )
    return rng.sample([name for i in kept for name in pool[i::NAME_SHARES]], count)


def state(entity: Entity, rng: random.Random) -> str:
    """The text of an entity's passage: each fact once, in random order and phrasing."""
    clauses = [
        f"{rng.choice(relation.statements)} {entity.facts[relation.name]}"
        for relation in RELATIONS[entity.kind]
        if relation.name in entity.facts
    ]
    rng.shuffle(clauses)
    noun = rng.choice(NOUNS[entity.kind])
    return f"The {noun} {entity.name}, {', '.join(clauses)}. All about {entity.name}."


def world(seed: int = 0, relations: Collection[str] | None = None) -> World:
    """Make the world of a seed: the same arguments give the same names, facts and passages.

    Args:
        seed: another seed is another world.
        relations: names of the relations that facts may have, at least one for each kind of
            entity; None: all.

    Raises:
        ConfigurationError: the seed is negative or not a whole number, or a kind has no relation.
        UnknownNameError: there is no such relation.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigurationError(f"world_seed must be a whole number of 0 or more, not {seed!r}")
    if relations is None:
        return _world(seed, None)
    known = [relation.name for kind in RELATIONS.values() for relation in kind]
    for name in relations:
        if name not in known:
            raise UnknownNameError("relation of miniworld", name, known)
    for kind, possible in RELATIONS.items():
        if all(relation.name not in relations for relation in possible):
            names = ", ".join(relation.name for relation in possible)
            raise ConfigurationError(f"relations has none for a {kind}; give some of {names}")
    return _world(seed, frozenset(relations))


@lru_cache(maxsize=8)  # behind the check: to a cache, True and 1.0 are 1
def _world(seed: int, relations: frozenset[str] | None) -> World:
    rng = random.Random(f"miniworld {seed}")
    names = {kind: _names(rng, seed, kind, count) for kind, count in POPULATION.items()}

    def value(relation: Relation, subject: str) -> str:
        if relation.value == "year":
            return str(rng.randint(FIRST_YEAR, LAST_YEAR))
        return rng.choice([name for name in names[relation.value] if name != subject])

    stated = {
        kind: [each for each in possible if relations is None or each.name in relations]
        for kind, possible in RELATIONS.items()
    }
    entities = {
        name: Entity(name, kind, {r.name: value(r, name) for r in stated[kind]})
        for kind in POPULATION
        for name in names[kind]
    }
    couples = rng.sample(names["person"], len(names["person"]))
    for one, other in zip(couples[::2], couples[1::2], strict=True):
        if "spouse" in entities[one].facts:
            entities[one].facts["spouse"], entities[other].facts["spouse"] = other, one

    made = World(seed, entities, ())
    passages = [
        Passage(made.passage_id(name), name, state(entity, rng))
        for name, entity in entities.items()
    ]
    for name in _names(rng, seed, "gazette", GAZETTES):
        mentioned = rng.sample(list(entities), len(GAZETTE_VERBS))
        clauses = [f"{verb} {m}" for verb, m in zip(GAZETTE_VERBS, mentioned, strict=True)]
        text = f"The gazette {name}, which {', '.join(clauses)}."
        passages.append(Passage(made.passage_id(name), name, text))
    rng.shuffle(passages)
    return World(seed, entities, tuple(passages))


def _chain(world: World, rng: random.Random, hops: int) -> Question | None:
    """Draw a question that chains facts; None if the walk ends early or returns to an entity."""
    start = rng.choice(list(world.entities.values()))
    here, visited, steps = start, [start.name], []
    for hop in range(hops):
        last = hop == hops - 1
        possible = [r for r in RELATIONS[here.kind] if r.name in here.facts]
        choices = [r for r in possible if last or r.value != "year"]
        if not choices:
            return None
        relation = rng.choice(choices)
        reached = here.facts[relation.name]
        steps.append((relation, here.name, reached))
        if reached in visited:
            return None
        visited.append(reached)
        if not last:
            here = world.entities[reached]
    phrase = start.name
    for relation, _, _ in steps:
        phrase = f"{rng.choice(relation.references)} {phrase}"
    asked = rng.choice(ASKED[steps[-1][0].value])
    end = "." if asked == "Name" else "?"
    return Question(
        id="",
        question=f"{asked} {phrase}{end}",
        answers=(steps[-1][2],),
        supporting=tuple(world.passage_id(subject) for _, subject, _ in steps),
        hops=hops,
        type="chain",
        decomposition=tuple(
            Hop(
                f"{subject if i == 0 else f'#{i}'} {relation.name}",
                reached,
                world.passage_id(subject),
            )
            for i, (relation, subject, reached) in enumerate(steps)
        ),
    )


def comparison(world: World, rng: random.Random) -> Question | None:
    """Draw a question that compares two years; None if there are none, or they are too close."""
    kind = rng.choice(list(COMPARED))
    relation = COMPARED[kind]
    one, other = rng.sample([e for e in world.entities.values() if e.kind == kind], 2)
    if relation not in one.facts:
        return None
    years = int(one.facts[relation]), int(other.facts[relation])
    if abs(years[0] - years[1]) < MIN_YEARS_APART:
        return None
    order = rng.choice(list(COMPARISONS))
    first = (years[0] < years[1]) == (order == "earlier")
    opening = rng.choice(COMPARISONS[order]).format(name=relation)
    return Question(
        id="",
        question=f"{opening} {one.name} or {other.name}?",
        answers=((one if first else other).name,),
        supporting=(world.passage_id(one.name), world.passage_id(other.name)),
        hops=2,
        type="comparison",
        decomposition=tuple(
            Hop(f"{e.name} {relation}", e.facts[relation], world.passage_id(e.name))
            for e in (one, other)
        ),
    )


def questions(world: World, rng: random.Random, count: int) -> Iterator[Question]:
    """Draw distinct questions about a world, in the shares of `HOPS`."""
    seen: set[str] = set()
    while len(seen) < count:
        hops = rng.choices([*HOPS, 0], [*HOPS.values(), 1 - sum(HOPS.values())])[0]
        question = _chain(world, rng, hops) if hops else comparison(world, rng)
        if question is None:
            continue
        # Two phrasings of one task count as one question, so that no task is in two splits.
        steps = [hop.question for hop in question.decomposition]
        task = str((steps if hops else sorted(steps), question.answers))
        if task not in seen:
            seen.add(task)
            yield question


@lru_cache(maxsize=8)
def _splits(seed: int) -> dict[str, tuple[Question, ...]]:
    drawn = questions(world(seed), random.Random(f"questions {seed}"), sum(SPLITS.values()))
    return {
        split: tuple(
            replace(question, id=f"mw{seed}-{split}-{i}", split=split)
            for i, question in zip(range(count), drawn, strict=False)
        )
        for split, count in SPLITS.items()
    }


def load(split: str, world_seed: int = 0) -> Dataset:
    """Make MiniWorld's questions of a split and its corpus.

    Args:
        split: "train" (4,000 questions) or "dev" (400); no task is in both.
        world_seed: the world; another seed has other names and facts.

    Raises:
        UnknownNameError: no such split.
        ConfigurationError: a seed that is no whole number.
    """
    if split not in SPLITS:
        raise UnknownNameError("split of miniworld", split, SPLITS)
    made = world(world_seed)
    return Dataset("miniworld", _splits(world_seed)[split], made)


def vocabulary() -> list[str]:
    """List the phrases that the texts of all worlds consist of; a name or a year is two."""
    relations = [relation for kind in RELATIONS.values() for relation in kind]
    return [
        *(f", {phrase}" for relation in relations for phrase in relation.statements),
        *(f" {phrase}" for relation in relations for phrase in relation.references),
        *(f" {relation.name}" for relation in relations),
        *(f"The {noun}" for nouns in NOUNS.values() for noun in nouns),
        "The gazette",
        f", which {GAZETTE_VERBS[0]}",
        *(f", {verb}" for verb in GAZETTE_VERBS[1:]),
        *(opening.format(name=name) for name in COMPARED.values()
          for openings in COMPARISONS.values() for opening in openings),
        *(asked for phrases in ASKED.values() for asked in phrases),
        *(space + beginning for space in ("", " ") for beginning in BEGINNINGS),
        *(ending for endings in ENDINGS.values() for ending in endings),
        *(f" {decade}" for decade in range(FIRST_YEAR // 10, LAST_YEAR // 10 + 1)),
        *"0123456789",
    ]  # fmt: skip
