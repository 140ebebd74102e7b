"""The table in miniature: two invented worlds, and a small policy that knows every format.

The worlds have no name and no relation in common (``TRAINED``, ``OTHER``). The policy is
warm-started in worlds of yet other names, each with about half of all relations, on what the
methods ask of a model: to answer at once (it cannot know the answer, so it says the name that it
was asked about), to answer from passages, to think one sentence further, and to search. It
continues from the demo's starter, and as there the habit of searching is weak; every other format
is taught as well as it can be learned.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from benchmarks.baselines import ircot
from benchmarks.baselines.driver import Message
from benchmarks.baselines.iter_retgen import ITERATIONS
from research_agent.config import EnvironmentConfig
from research_agent.presets import PRESETS
from research_env import RESEARCH
from research_env.datasets import miniworld
from research_env.datasets.base import Question
from research_env.datasets.files import question_record
from research_env.demonstrations import (
    SKILLED,
    Demonstration,
    Habits,
    comparing_drill,
    demonstrate,
    gold_queries,
    reading_drill,
)
from research_env.retrieval.base import Hit
from research_env.retrieval.bm25.retriever import EmbeddedRetriever, build_index

MINIWORLD = PRESETS["miniworld"]

TRAINED = frozenset(
    ("spouse", "birthplace", "birth", "director", "studio", "premiere", "founder", "seat",
     "mayor", "country", "ruler", "capital", "ally")
)  # fmt: skip
OTHER = (
    frozenset(relation.name for possible in miniworld.RELATIONS.values() for relation in possible)
    - TRAINED
)
WORLDS = {"MiniWorld": (0, TRAINED), "other world": (1, OTHER)}  # seed and relations
TRAIN, DEV = 4000, 400  # questions of a world
MAX_IN_FLIGHT = 128  # episodes of an evaluation that are played at the same time
WORKERS = 2  # cells at the same time
MAX_PROMPT, MAX_RESPONSE, MAX_TURN_TOKENS = 640, 384, 64  # tokens; the policy's context is 1,024

PER_WORLD, BLOCK = 300, 6_000  # demonstrations of one world; of those shuffled together
SHARES = {"search": 0.22, "read": 0.3, "think": 0.3, "drill": 0.16, "guess": 0.02}
HABIT_SHARE = 0.12  # share of the demonstrations, at the end, that search by habit


# --- prompts in words of the policy's vocabulary --------------------------------------------------


def guess(question: str) -> list[Message]:
    """The prompt of Naive Generation."""
    return [{"role": "user", "content": f"{question}\n guess:"}]


def read(question: str, hits: Sequence[Hit]) -> list[Message]:
    """The prompt of Naive RAG and Iter-RetGen."""
    return [{"role": "user", "content": f"{RESEARCH.render(hits)}\n{question}\n guess:"}]


def think(question: str, hits: Sequence[Hit], thoughts: Sequence[str]) -> str:
    """The prompt of IRCoT."""
    return f"{RESEARCH.render(hits)}\n{question}\n{''.join(f'{each}.' for each in thoughts)}"


# --- worlds ---------------------------------------------------------------------------------------


def write_worlds(folder: Path) -> dict[str, dict[str, str]]:
    """Write questions and passages of both worlds; the environment's arguments for each."""
    arguments = {}
    for name, (seed, relations) in WORLDS.items():
        world = miniworld.world(seed, relations)
        drawn = miniworld.questions(world, random.Random(f"miniature {seed}"), TRAIN + DEV)
        questions = [
            {
                **question_record(question),
                "id": f"{seed}-{i}",
                "split": "dev" if i < DEV else "train",
            }
            for i, question in enumerate(drawn)
        ]
        passages = [structs.asdict(passage) for passage in world]
        where = folder / name.replace(" ", "-")
        where.mkdir(parents=True, exist_ok=True)
        for file, records in (("questions", questions), ("corpus", passages)):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (where / f"{file}.jsonl").write_text(lines, encoding="utf-8")
        arguments[name] = {
            "dataset": "custom",
            "questions": str(where / "questions.jsonl"),
            "corpus": str(where / "corpus.jsonl"),
            "template": "question",
        }
    return arguments


# --- demonstrations -------------------------------------------------------------------------------


def demonstrations(count: int, top_k: int, seed: int = 0) -> Iterator[Demonstration]:
    """Make demonstrations of every format, in the order in which they are to be learned.

    Args:
        count: how many.
        top_k: passages per search.
        seed: seed of every choice.

    Yields:
        Lists of (provenance, text).
    """
    rng = random.Random(f"miniature {seed}")
    habitual = round(count * HABIT_SHARE)
    for size, habits in ((count - habitual, SKILLED), (habitual, Habits())):
        for start in range(0, size, BLOCK):
            block: list[Demonstration] = []
            while len(block) < min(BLOCK, size - start):
                wanted = min(PER_WORLD, size - start - len(block))
                block += _from_world(_world(rng), wanted, top_k, habits, rng)
            rng.shuffle(block)  # else the names of one world would be learned
            yield from block


def _world(rng: random.Random) -> miniworld.World:
    """A world without the names of those of the table, with about half of all relations."""
    while (seed := rng.randrange(2**31)) % miniworld.NAME_SHARES in miniworld.OWN_SHARES:
        pass
    relations = [
        relation.name
        for possible in miniworld.RELATIONS.values()
        for relation in rng.sample(possible, rng.choice((2, 3)))
    ]
    return miniworld.world(seed, relations)


def _from_world(
    world: miniworld.World, count: int, top_k: int, habits: Habits, rng: random.Random
) -> list[Demonstration]:
    with tempfile.TemporaryDirectory() as folder:
        build_index(world, Path(folder) / "index")
        retriever = EmbeddedRetriever(Path(folder) / "index")

        def found(query: str) -> list[Hit]:
            (hits,) = retriever.search([query], top_k)
            if isinstance(hits, Exception):
                raise hits
            return hits

        made = []
        for question in miniworld.questions(world, rng, count):
            (sort,) = rng.choices([*SHARES], [*SHARES.values()])
            made.append(
                _demonstrate(sort, question, world, found, top_k=top_k, habits=habits, rng=rng)
            )
        retriever.close()
    return made


def _demonstrate(
    sort: str,
    question: Question,
    world: miniworld.World,
    found: Callable[[str], list[Hit]],
    *,
    top_k: int,
    habits: Habits,
    rng: random.Random,
) -> Demonstration:
    if sort == "guess":
        return [("prompt", _text(guess(question.question))), ("action", f" {_subject(question)}")]
    if sort == "drill":
        compared = any(name in entity.facts for entity in world.entities.values()
                       for name in miniworld.COMPARED.values())  # fmt: skip
        if compared and rng.random() < 0.3:
            return comparing_drill(world, rng)
        return reading_drill(world, rng.choice((top_k, 2 * top_k, 3 * top_k)), rng)
    if sort == "read":
        query, hits = question.question, list[Hit]()
        for _ in range(rng.randrange(ITERATIONS) + 1):
            hits = found(query)
            query = f"{question.question} {known(question, hits)}"
        return [
            ("prompt", _text(read(question.question, hits))),
            ("action", f" {known(question, hits)}"),
        ]
    if sort == "think":
        hits, said = found(question.question), list[str]()
        thoughts = chain_of_thought(question)
        for thought in thoughts[: rng.randrange(len(thoughts))]:
            said.append(thought)
            hits = ircot.gather(hits, found(thought))
        # The stop string ends it; the end token would never be reached.
        return [
            ("prompt", think(question.question, hits, said)),
            ("action", f"{thoughts[len(said)]}."),
            ("observation", "\n"),
        ]
    results = [RESEARCH.render(found(query)) for query in gold_queries(question)]
    return demonstrate(question, results, rng, habits)


def known(question: Question, hits: Sequence[Hit]) -> str:
    """How far the passages lead: the answer, or that of the last hop in sight, or the subject."""
    shown = {hit.passage.id for hit in hits}
    reached = _subject(question)
    if question.type == "comparison":
        return question.answers[0] if shown.issuperset(question.supporting) else reached
    for hop in question.decomposition:
        if hop.support not in shown:
            break
        reached = hop.answer
    return reached


def chain_of_thought(question: Question) -> list[str]:
    """The thoughts that lead to the answer, each without its full stop.

    Each names what it found, which is whose passage comes next; so does the first of a comparison.
    """
    hops = question.decomposition
    found = [f" {hop.question.rsplit(' ', 1)[1]} {hop.answer}" for hop in hops]
    if question.type == "comparison":
        order = "after" if int(hops[1].answer) > int(hops[0].answer) else "before"
        other = hops[1].question.rsplit(" ", 1)[0]
        found = [f"{found[0]} or {other}", f"{found[1]} {order} {hops[0].answer}"]
    *before, last = found
    return [
        *(f" next:{each}" for each in before),
        f" done:{last} {ircot.MARK} {question.answers[0]}",
    ]


def _subject(question: Question) -> str:
    return question.decomposition[0].question.rsplit(" ", 1)[0]


def _text(messages: Sequence[Message]) -> str:
    return "".join(message["content"] for message in messages)


# --- the policy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Miniature:
    """How much is learned. The defaults are minutes on two cores."""

    demonstrations: int = 18_000  # episodes that the warm start imitates
    learning_rate: float = 1e-3  # warm start only
    top_k: int = 2  # passages per search, always
    steps: int = 36  # training steps with GRPO


@dataclass(frozen=True)
class Made:
    """Folders of the two policies, and the environment's arguments for each world."""

    policy: Path
    trained: Path
    worlds: dict[str, dict[str, str]]


def prepare(folder: Path, settings: Miniature, seed: int, *, quiet: bool = False) -> Made:
    """Make the worlds, the warm start and the trained policy; what is there is not made again.

    Args:
        folder: to write to.
        settings: how much is learned.
        seed: seed of all that is drawn.
        quiet: show no progress.
    """
    from research_agent.models.source import resolve_model  # noqa: PLC0415 - these load torch
    from research_agent.sft import SFTConfig  # noqa: PLC0415
    from research_agent.sft import run as fit  # noqa: PLC0415
    from research_agent.trainer import train  # noqa: PLC0415

    worlds = write_worlds(folder / "worlds")
    told = f"{settings.demonstrations}x{settings.learning_rate:g}-top{settings.top_k}-seed{seed}"
    warm = folder / "policies" / f"warm-{told}"
    if not warm.exists():
        made = fit(
            SFTConfig(
                demonstrations="benchmarks.baselines.miniature:demonstrations",
                demonstration_args={"top_k": settings.top_k},
                count=settings.demonstrations,
                model=str(resolve_model(MINIWORLD.policy.model)),
                batch_by_length=True,
                learning_rate=settings.learning_rate,
                decay_share=1.0,
                final_share=0.2,
                seed=seed,
                output=warm.with_name(f"{warm.name}.partial"),
                threads=1,
                quiet=quiet,
            )
        )
        made.rename(warm)
    environment = {**worlds[next(iter(WORLDS))], "split": "train", "top_k": settings.top_k}
    summary = train(
        replace(
            MINIWORLD,
            environment=EnvironmentConfig(env="research_env:SearchQA-v0", env_args=environment),
            policy=replace(MINIWORLD.policy, model=str(warm)),
            sampling=replace(
                MINIWORLD.sampling,
                max_prompt=96,
                max_response=MAX_RESPONSE,
                max_turn_tokens=MAX_TURN_TOKENS,
            ),
            run=replace(
                MINIWORLD.run,
                seed=seed,
                steps=settings.steps,
                output=folder / "policies" / f"grpo-{told}",
                eval_every=None,
                quiet=quiet,
            ),
        )
    )
    if summary.signal:
        raise KeyboardInterrupt
    return Made(warm, Path(str(summary.numbers["model"])), worlds)
