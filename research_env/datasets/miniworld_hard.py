"""The levels of MiniWorld's ``difficulty``: harder questions, and harder worlds.

Difficulty 0 is MiniWorld as it is. Levels 1 to 4 each add to the level before:

1. Chains of three to six facts. Comparisons of three years: "Which came first by opening, A, B or
   C?"
2. Intersections: "What is the work directed by the mentor of A, released by B?"; exactly one entity
   fits. Counts: "How many of A, B and C have a premiere before 1950?"
3. Namesakes: each work has one, another film or play of the same name with other facts. A question
   names a work with one more fact, "the director of A, released by B"; a query without that fact
   finds either. Each entity that is compared or counted must be found through a fact.
4. Chains have five or six facts, and there are no intersections.

Level 5 has the questions of level 2, but documents must be opened. Each entity has a card, which
says its name and nothing else, and a passage of the same title with its facts. With one passage per
search a query finds the card, and the tool ``open`` reads both.

Each question has one answer, which follows from its gold passages. The texts consist of MiniWorld's
phrases, so a policy that reads MiniWorld can read them; only " the work" and the words of counts
are no phrases of its vocabulary, and are spelled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

from research_env.datasets import miniworld
from research_env.datasets.base import Dataset, Hop, Question
from research_env.datasets.miniworld import (
    ASKED,
    COMPARED,
    MIN_YEARS_APART,
    RELATIONS,
    SPLITS,
    Entity,
    World,
)
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.retrieval.base import Passage

BY_NAME = {relation.name: relation for kind in RELATIONS.values() for relation in kind}


@dataclass(frozen=True, slots=True)
class Level:
    """Shares of the kinds of question, which sum to 1, and what else makes a level hard."""

    chain: float
    comparison: float
    intersection: float = 0.0
    count: float = 0.0
    hops: tuple[int, int] = (3, 6)  # fewest and most facts of a chain
    namesakes: bool = False
    reached: bool = False  # each entity that is compared or counted is found through a fact
    cards: bool = False  # a search finds a card; the facts are in a document to open


LEVELS = {
    1: Level(chain=0.8, comparison=0.2),
    2: Level(chain=0.5, comparison=0.15, intersection=0.2, count=0.15),
    3: Level(
        chain=0.5, comparison=0.15, intersection=0.2, count=0.15, namesakes=True, reached=True
    ),
    4: Level(chain=0.6, comparison=0.2, count=0.2, hops=(5, 6), namesakes=True, reached=True),
    5: Level(chain=0.5, comparison=0.15, intersection=0.2, count=0.15, cards=True),
}


@dataclass(frozen=True, slots=True)
class Path:
    """A chain of facts from a named entity: its phrase, its last value, and its steps."""

    phrase: str
    value: str
    hops: tuple[Hop, ...]  # hop 2 refers to hop 1 as #1, as if the path stood alone


def world(seed: int, difficulty: int) -> World:
    """Make the world of a seed at a level.

    Args:
        seed: seed of the world.
        difficulty: a level; 0 is MiniWorld.

    Raises:
        ConfigurationError: no such level.
    """
    known = (0, *LEVELS)
    if type(difficulty) is not int or difficulty not in known:  # 2.0 would seed other questions
        levels = ", ".join(map(str, known))
        raise ConfigurationError(f"difficulty of miniworld is one of {levels}, not {difficulty!r}")
    made = miniworld.world(seed)
    if difficulty and LEVELS[difficulty].namesakes:
        return _with_namesakes(seed)
    return _with_cards(seed) if difficulty and LEVELS[difficulty].cards else made


def load(split: str, seed: int, difficulty: int) -> Dataset:
    """Make the questions of a split at a level, and the corpus.

    Args:
        split: "train" (4,000 questions) or "dev" (400); no task is in both.
        seed: seed of the world.
        difficulty: from 0 to 5; 0 is MiniWorld.

    Raises:
        ConfigurationError: no such level, or a seed that is no whole number.
        UnknownNameError: no such split.
    """
    if split not in SPLITS:
        raise UnknownNameError("split of miniworld", split, SPLITS)
    made = world(seed, difficulty)
    if difficulty == 0:
        return miniworld.load(split, seed)
    return Dataset("miniworld", _splits(seed, difficulty)[split], made)


def questions(world: World, level: Level, rng: random.Random, wanted: int) -> Iterator[Question]:
    """Draw distinct questions about a world, in the shares of a level."""
    kinds: dict[str, tuple[float, Callable[[], Question | None]]] = {
        "chain": (level.chain, partial(_chain, world, level, rng)),
        "comparison": (level.comparison, partial(_comparison, world, level, rng)),
        "intersection": (level.intersection, partial(_intersection, world, rng, _index(world))),
        "count": (level.count, partial(_count, world, level, rng)),
    }
    weights = [share for share, _ in kinds.values()]
    seen: set[str] = set()
    while len(seen) < wanted:
        draw = rng.choices([draw for _, draw in kinds.values()], weights)[0]
        question = draw()
        if question is None:
            continue
        task = str((sorted(hop.question for hop in question.decomposition), question.answers))
        if task not in seen:
            seen.add(task)
            yield question


# --- the world with namesakes ---------------------------------------------------------------------


@lru_cache(maxsize=8)
def _with_namesakes(seed: int) -> World:
    """Every work gets a namesake, whose facts all differ from its own."""
    made, rng = miniworld.world(seed), random.Random(f"namesakes {seed}")
    entities = dict(made.entities)
    works = [entity for entity in entities.values() if entity.kind == "work"]
    values = {r.name: sorted({w.facts[r.name] for w in works}) for r in RELATIONS["work"]}
    passages = list(made.passages)
    for work in works:
        facts = {
            name: rng.choice([value for value in values[name] if value != own])
            for name, own in work.facts.items()
        }
        other = Entity(work.name, "work", facts)
        entities[namesake(work.name)] = other
        text = miniworld.state(other, rng)
        passages.append(Passage(made.passage_id(namesake(work.name)), work.name, text))
    rng.shuffle(passages)
    return World(seed, entities, tuple(passages), variant="-namesakes")


@lru_cache(maxsize=8)
def _with_cards(seed: int) -> World:
    """Every entity gets a card, and its passage states the facts without its name."""
    made, rng = miniworld.world(seed), random.Random(f"cards {seed}")
    passages: list[Passage] = []
    for passage in made.passages:
        name = passage.title
        if name not in made.entities:  # a gazette
            passages.append(passage)
            continue
        opening, _, facts = passage.text.removesuffix(f" All about {name}.").partition(", ")
        card = f"{opening}. All about {name}. All about {name}."
        passages.append(Passage(f"{passage.id}-card", name, card))
        passages.append(Passage(passage.id, name, f"{opening.removesuffix(f' {name}')}, {facts}"))
    rng.shuffle(passages)
    return World(seed, made.entities, tuple(passages), variant="-cards")


def namesake(name: str) -> str:
    """The key of a work's namesake in ``World.entities``; both have the same name."""
    return f"{name} 2"


def _told_apart(world: World, key: str, asked: str, rng: random.Random) -> tuple[str, str]:
    """The phrase and the value of a fact that tells a work from its namesake; else two ""."""
    entity = world.entities[key]
    if entity.kind != "work" or namesake(entity.name) not in world.entities:
        return "", ""
    relation = rng.choice([r for r in RELATIONS["work"] if r.name != asked and r.value != "year"])
    value = entity.facts[relation.name]
    return f", {rng.choice(relation.statements)} {value},", f" {value}"


# --- paths ----------------------------------------------------------------------------------------


def _path(world: World, rng: random.Random, length: int, last: str | None = None) -> Path | None:
    """Draw a path; None if it ends early or returns to an entity.

    Args:
        world: the world.
        rng: random generator of the choices.
        length: number of facts.
        last: the type of the last value; None takes any, a year included.
    """
    key = rng.choice(list(world.entities))
    phrase = world.entities[key].name
    visited, hops = {phrase}, []
    apart = ""
    for place in range(length):
        entity, final = world.entities[key], place == length - 1
        choices = [
            r
            for r in RELATIONS[entity.kind]
            if (last is None or r.value == last if final else r.value != "year")
        ]
        if not choices:
            return None
        relation = rng.choice(choices)
        if place == 0:
            said, apart = _told_apart(world, key, relation.name, rng)
            phrase += said
        reached = entity.facts[relation.name]
        if reached in visited:
            return None
        visited.add(reached)
        subject = f"#{place}" if place else f"{entity.name}{apart}"
        hops.append(Hop(f"{subject} {relation.name}", reached, world.passage_id(key)))
        phrase = f"{rng.choice(relation.references)} {phrase}"
        key = reached
    return Path(phrase.removesuffix(","), hops[-1].answer, tuple(hops))


def _chain(world: World, level: Level, rng: random.Random) -> Question | None:
    path = _path(world, rng, rng.randint(*level.hops))
    if path is None:
        return None
    kind = BY_NAME[path.hops[-1].question.rsplit(" ", 1)[1]].value
    asked = rng.choice(ASKED[kind])
    end = "." if asked == "Name" else "?"
    return _question(f"{asked} {path.phrase}{end}", path.value, "chain", path.hops)


def _dated(
    world: World, level: Level, rng: random.Random
) -> tuple[list[Path], list[Hop], list[int]] | None:
    """Draw three entities of one kind: paths to them, all hops (each ends with a year), years."""
    kind = rng.choice(list(COMPARED))
    if level.reached and kind == "work":
        return None  # nothing leads to a work
    paths: list[Path] = []
    hops: list[Hop] = []
    years: list[int] = []
    for _ in range(3):
        if level.reached:
            path = _path(world, rng, 1, last=kind)
        else:
            key = rng.choice([key for key, e in world.entities.items() if e.kind == kind])
            path = Path(world.entities[key].name, key, ())
        if path is None or any(path.value == other.value for other in paths):
            return None
        paths.append(path)
        first = len(hops)
        hops += path.hops
        subject = f"#{first + 1}" if path.hops else path.phrase
        year = world.entities[path.value].facts[COMPARED[kind]]
        hops.append(Hop(f"{subject} {COMPARED[kind]}", year, world.passage_id(path.value)))
        years.append(int(year))
    apart = min(b - a for a, b in pairwise(sorted(years)))
    return (paths, hops, years) if apart >= MIN_YEARS_APART else None


def _comparison(world: World, level: Level, rng: random.Random) -> Question | None:
    drawn = _dated(world, level, rng)
    if drawn is None:
        return None
    paths, hops, years = drawn
    kind = world.entities[paths[0].value].kind
    order = rng.choice(["first", "last"])
    chosen = paths[years.index(min(years) if order == "first" else max(years))]
    one, two, three = (path.phrase for path in paths)
    text = f"Which came {order} by {COMPARED[kind]}, {one}, {two} or {three}?"
    return _question(text, world.entities[chosen.value].name, "comparison", tuple(hops))


def _count(world: World, level: Level, rng: random.Random) -> Question | None:
    drawn = _dated(world, level, rng)
    if drawn is None:
        return None
    paths, hops, years = drawn
    kind = world.entities[paths[0].value].kind
    year = rng.choice([year for year in range(1910, 1991, 10) if year not in years])
    one, two, three = (path.phrase for path in paths)
    dated = f"an {COMPARED[kind]}" if COMPARED[kind] == "opening" else f"a {COMPARED[kind]}"
    text = f"How many of {one}, {two} and {three} have {dated} before {year}?"
    return _question(text, str(sum(each < year for each in years)), "count", tuple(hops))


# --- intersections --------------------------------------------------------------------------------

Index = dict[tuple[str, str, str], set[str]]  # kind, relation, value: keys of entities


def _index(world: World) -> Index:
    found: Index = {}
    for key, entity in world.entities.items():
        for relation, value in entity.facts.items():
            found.setdefault((entity.kind, relation, value), set()).add(key)
    return found


def _intersection(world: World, rng: random.Random, index: Index) -> Question | None:
    """Draw an entity that two facts identify, the value of one found through another fact."""
    key = rng.choice(list(world.entities))
    entity = world.entities[key]
    named = [r for r in RELATIONS[entity.kind] if r.value != "year"]
    first, second = rng.sample(named, 2)
    one, two = entity.facts[first.name], entity.facts[second.name]
    fits = index[entity.kind, first.name, one] & index[entity.kind, second.name, two]
    sources = [k for k, e in world.entities.items() if one in e.facts.values() and k != key]
    if fits != {key} or one == two or not sources:
        return None
    path = _path_to(world, rng, rng.choice(sources), one)
    if entity.name in path.phrase:
        return None
    said, also = rng.choice(first.statements), rng.choice(second.statements)
    asked = "Who is" if entity.kind == "person" else "What is"
    text = f"{asked} the {entity.kind} {said} {path.phrase}, {also} {two}?"
    last = Hop(f"{said} #1, {also} {two}", entity.name, world.passage_id(key))
    return _question(text, entity.name, "intersection", (*path.hops, last))


def _path_to(world: World, rng: random.Random, key: str, value: str) -> Path:
    """A fact of an entity that has this value, as a path of length 1."""
    entity = world.entities[key]
    relation = rng.choice([r for r in RELATIONS[entity.kind] if entity.facts[r.name] == value])
    said, apart = _told_apart(world, key, relation.name, rng)
    hop = Hop(f"{entity.name}{apart} {relation.name}", value, world.passage_id(key))
    phrase = f"{rng.choice(relation.references)} {entity.name}{said}"
    return Path(phrase.removesuffix(","), value, (hop,))


# --- questions ------------------------------------------------------------------------------------


def _question(text: str, answer: str, kind: str, hops: tuple[Hop, ...]) -> Question:
    return Question(
        id="",
        question=text,
        answers=(answer,),
        supporting=tuple(dict.fromkeys(hop.support for hop in hops if hop.support)),
        hops=len(hops),
        type=kind,
        decomposition=hops,
    )


@lru_cache(maxsize=8)
def _splits(seed: int, difficulty: int) -> dict[str, tuple[Question, ...]]:
    rng = random.Random(f"questions {seed} difficulty {difficulty}")
    drawn = questions(world(seed, difficulty), LEVELS[difficulty], rng, sum(SPLITS.values()))
    return {
        split: tuple(
            replace(question, id=f"mw{seed}-d{difficulty}-{split}-{i}", split=split)
            for i, question in zip(range(size), drawn, strict=False)
        )
        for split, size in SPLITS.items()
    }
