"""Demonstrations in MiniWorld: a small policy learns to read before it learns to search.

A demonstration is a list of (provenance, text) pairs with the provenance "prompt", "action" or
"observation"; a trainer fits the actions. There are three kinds:

- A drill shows passages and asks for their facts, one after another, or shows a comparison and asks
  only how it ends.
- A skilled episode searches hop by hop, as the gold decomposition says, and answers.
- A habit episode does what a model does that never learned to search: it may guess at once, stop
  early, or forget the format. Each of these is a random decision at the start of a turn.

Skills come first and habits last, so that the policy at the end is able to read and search, but
seldom does. Reinforcement learning then has to find when to search, how long, and how to answer.

The worlds have seeds of their own, and no name in common with the worlds 0 and 1, in which the
policy is trained and tested (see ``miniworld.OWN_SHARES``).
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from research_env.datasets import miniworld
from research_env.datasets.base import Question
from research_env.papers.recall import RECALL, WIKIPEDIA_SEARCH
from research_env.papers.research import RESEARCH
from research_env.retrieval.base import Hit
from research_env.retrieval.bm25.retriever import EmbeddedRetriever, build_index
from research_env.tools.calls import CallRecord

Demonstration = list[tuple[str, str]]

PER_WORLD = 600  # demonstrations of one world
BLOCK = 12_000  # demonstrations that are shuffled together
ONE_PASSAGE_SHARE = 0.3  # first part, with one passage per search: reading before choosing
READING_SHARE, COMPARING_SHARE = 0.3, 0.15  # drills among the skilled demonstrations


@dataclass(frozen=True, slots=True)
class Habits:
    """The probability of the skilled choice at each decision."""

    search: float = 0.35  # at the start: search rather than guess
    go_on: float = 0.55  # after a result: search again rather than answer with what was found
    box: float = 0.75  # at the end: put the answer in a box


SKILLED = Habits(search=1.0, go_on=1.0, box=1.0)


def demonstrations(
    count: int, top_k: int, seed: int = 0, habit_share: float = 0.09, habits: Habits | None = None
) -> Iterator[Demonstration]:
    """Make demonstrations, in the order in which they are to be learned.

    Args:
        count: number of demonstrations.
        top_k: passages per search, after a first part with one.
        seed: seed of all random choices.
        habit_share: the share of habit episodes, all of them at the end.
        habits: the probabilities in the habit episodes.

    Yields:
        Lists of (provenance, text).
    """
    rng = random.Random(f"demonstrations {seed}")
    worlds = _worlds(rng)
    habitual = round(count * habit_share)
    first = min(round(count * ONE_PASSAGE_SHARE), count - habitual)
    stages = (
        (first, 1, SKILLED),
        (count - first - habitual, top_k, SKILLED),
        (habitual, top_k, habits or Habits()),
    )
    for size, shown, decisions in stages:
        for start in range(0, size, BLOCK):
            block: list[Demonstration] = []
            while len(block) < min(BLOCK, size - start):
                wanted = min(PER_WORLD, size - start - len(block))
                block += _from_world(next(worlds), wanted, shown, decisions, rng)
            # Many demonstrations of one world in a row would teach its names.
            rng.shuffle(block)
            yield from block


def _from_world(
    world: miniworld.World, count: int, top_k: int, habits: Habits, rng: random.Random
) -> list[Demonstration]:
    """Demonstrations of one world: drills and episodes, or without drills if there are habits."""
    questions = list(miniworld.questions(world, rng, count))
    with tempfile.TemporaryDirectory() as folder:
        build_index(world, Path(folder) / "index")
        retriever = EmbeddedRetriever(Path(folder) / "index")
        queries = [query for question in questions for query in gold_queries(question)]
        answers = iter(retriever.search(queries, top_k))
        retriever.close()
    made: list[Demonstration] = []
    for question in questions:
        results = []
        for _ in question.decomposition:
            hits = next(answers)
            if isinstance(hits, Exception):
                raise hits
            results.append(RESEARCH.render(hits))
        drawn = rng.random() if habits == SKILLED else 1.0
        if drawn < READING_SHARE:
            made.append(reading_drill(world, top_k, rng))
        elif drawn < READING_SHARE + COMPARING_SHARE:
            made.append(comparing_drill(world, rng))
        else:
            made.append(demonstrate(question, results, rng, habits))
    return made


def _worlds(rng: random.Random) -> Iterator[miniworld.World]:
    """Worlds of random seeds, without those that have a share of the names to themselves."""
    while True:
        seed = rng.randrange(2**31)
        if seed % miniworld.NAME_SHARES not in miniworld.OWN_SHARES:
            yield miniworld.world(seed)


def gold_queries(question: Question) -> list[str]:
    """The queries of the gold decomposition, with the answers of earlier hops filled in."""
    answers = [hop.answer for hop in question.decomposition]
    return [
        re.sub(r"#(\d+)", lambda match: answers[int(match[1]) - 1], hop.question)
        for hop in question.decomposition
    ]


def demonstrate(
    question: Question, results: list[str], rng: random.Random, habits: Habits
) -> Demonstration:
    """Play a question hop by hop.

    Args:
        question: with its decomposition.
        results: the observation of each gold query, in order.
        rng: random generator of the decisions.
        habits: the probabilities of skilled decisions.

    Raises:
        ValueError: the question has no decomposition.
    """
    hops = question.decomposition
    relations = [hop.question.rsplit(" ", 1)[1] for hop in hops]
    comparison = question.type == "comparison"
    parts: Demonstration = [("prompt", RESEARCH.prompt("question", question.question))]

    def finish(thought: str, answer: str) -> Demonstration:
        boxed = f"\\boxed{{ {answer}}}" if rng.random() < habits.box else f" {answer}"
        return [*parts, ("action", f"{thought} <answer> {boxed.lstrip()} </answer>")]

    if rng.random() >= habits.search:
        # A name drawn at random cannot be learned; trying to would spoil the reading of names.
        guess = hops[0].question.rsplit(" ", 1)[0]
        return finish(f"<think> guess: {guess} </think>", guess)
    plan = f" compare {relations[0]}" if comparison else "".join(f" {r}" for r in relations)
    thought = f"<think> plan:{plan} </think>"
    for i, (query, result) in enumerate(zip(gold_queries(question), results, strict=True)):
        parts += [("action", f"{thought} <search> {query} </search>"), ("observation", result)]
        found = f"{relations[i]} {hops[i].answer}"
        if i == len(hops) - 1:
            if comparison:
                order = "after" if int(hops[1].answer) > int(hops[0].answer) else "before"
                found += f" {order} {hops[0].answer}"
            return finish(f" <think> done: {found} </think>", question.answers[0])
        if rng.random() >= habits.go_on:
            return finish(f" <think> done: {found} </think>", hops[i].answer)
        thought = f" <think> next: {found} </think>"
    raise ValueError(f"question {question.id!r} has no decomposition")


def reading_drill(world: miniworld.World, top_k: int, rng: random.Random) -> Demonstration:
    """Show passages, and ask for their facts in random order, as an episode would."""
    subjects = rng.sample(list(world.entities.values()), top_k)
    passages = {passage.title: passage for passage in world.passages}
    shown = RESEARCH.render([Hit(passages[subject.name], 1.0) for subject in subjects])
    facts = [(subject, fact) for subject in subjects for fact in subject.facts.items()]
    parts: Demonstration = [("prompt", shown)]
    for subject, (relation, value) in rng.sample(facts, len(facts)):
        parts.append(("observation", f" <search> {subject.name} {relation} </search>"))
        parts.append(("action", f" <think> next: {relation} {value} </think>"))
    return [*parts, ("observation", "\n")]  # so that the last action does not end the text


def comparing_drill(world: miniworld.World, rng: random.Random) -> Demonstration:
    """Show a comparison without its passages, and ask which year is later and who is meant.

    In a whole episode these are two tokens of sixty, too few to learn them.
    """
    while (question := miniworld.comparison(world, rng)) is None:
        pass
    (_, prompt), *rest = demonstrate(question, ["", ""], rng, SKILLED)
    text = "".join(text for _, text in rest)
    order = " after" if " after" in text else " before"
    shown, asked = text.split(order)
    return [("prompt", prompt), ("observation", shown), ("action", order + asked)]


def tool_demonstrations(
    count: int, top_k: int, seed: int = 0, habit_share: float = 0.2, habits: Habits | None = None
) -> Iterator[Demonstration]:
    """Make episodes in which the policy calls ReCall's tool, without drills; habits come last.

    The prompt is `TOOL_TEMPLATE`, which opens a thought, as ReCall's own prompt does.

    Args:
        count: number of demonstrations.
        top_k: passages per search, after a first part with one.
        seed: seed of all random choices.
        habit_share: the share of habit episodes, all of them at the end.
        habits: the probabilities in the habit episodes.

    Yields:
        Lists of (provenance, text).
    """
    habitual = round(count * habit_share)
    skilled = demonstrations(4 * count, top_k, seed, 0.0)  # enough: about half are drills
    episodes = (each for each in skilled if each[0][1].endswith("?\n") and len(each) > 3)
    yield from map(_with_tool_calls, islice(episodes, count - habitual))
    yield from map(_with_tool_calls, demonstrations(habitual, top_k, seed + 1, 1.0, habits))


TOOL_TEMPLATE = "{question}\n<think>"
"""The prompt of `tool_demonstrations`."""


def _with_tool_calls(demonstration: Demonstration) -> Demonstration:
    """Rewrite an episode with ReSearch's tags as one with ReCall's tool calls."""
    assert RECALL.tool_format is not None
    made: Demonstration = []
    call = ""
    for provenance, text in demonstration:
        if provenance == "prompt":
            made.append((provenance, f"{text}<think>"))
        elif provenance == "observation":
            result = text.strip().removeprefix("<result>\n").removesuffix("\n</result>")
            record = CallRecord("", "", call, result=result)
            made.append((provenance, RECALL.tool_format.framer([record])))
        else:
            said = text.strip().removeprefix("<think>")
            said = re.sub(r"<answer> (.*) </answer>", r"\1", said)
            if query := re.search(r" <search>(.*) </search>", said):
                call = json.dumps({"name": WIKIPEDIA_SEARCH.name, "arguments": {"query": query[1]}})
                said = f"{said[: query.start()]}\n<tool_call>\n{call}\n</tool_call><|im_end|>"
            made.append((provenance, said))
    return made


def tool_vocabulary() -> dict[str, str]:
    """Phrases of ReCall's tool calls, each by the phrase of `vocabulary` that it replaces.

    With these texts for its tokens of tags, a policy that writes the tags writes tool calls.
    """
    call = '{"name": "wikipedia_search", "arguments": {"query": "'
    return {
        " <search>": f"\n<tool_call>\n{call}",
        " </search>": '"}}\n</tool_call><|im_end|>',
        " <result>": f"\n<|im_start|>user\n<tool_response>{call}",
        ' <result>\n"': '"}}\n"',
        ".\n</result>": ".\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n",
    }


def vocabulary() -> list[str]:
    """Words and phrases of MiniWorld and its demonstrations, for a tokenizer of whole phrases.

    A phrase that names a relation is one token, so a fact is three: the relation and the two halves
    of a name. Any other text is spelled in bytes.
    """
    tags = [*RESEARCH.think, *RESEARCH.query, *RESEARCH.result, *RESEARCH.answer]
    marks = [' <result>\n"', '"\n', '.\n\n"', ".\n</result>", "?\n", ".\n", " \\boxed{", "}", ".",
             ",", "?", "\n", '"', " or", ". All about", " plan:", " next:", " done:", " guess:",
             " compare", " after", " before"]  # fmt: skip
    return list(
        dict.fromkeys([*tags, *(f" {tag}" for tag in tags), *marks, *miniworld.vocabulary()])
    )
