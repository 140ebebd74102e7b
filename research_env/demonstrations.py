"""Demonstrations in MiniWorld: how a small policy is taught to read before it learns to search.

A demonstration is a list of (provenance, text) pairs, of provenance "prompt", "action" or
"observation"; a trainer fits the actions. There are three sorts:

- a drill shows passages and asks for their facts, one after another, or goes through a comparison
  and asks only how it ends;
- a skilled episode searches hop by hop, as the gold decomposition says, and answers;
- a habit episode does what a model does that never learned to search: it may guess at once, stop
  half-way, or forget the format. Each is a decision made (or not) at the start of a turn.

Skill comes first and habits last, so that the policy at the end can read and search, and seldom
does. What reinforcement learning then has to find is when to search, how long, and how to answer.

The worlds are drawn from seeds of their own, and hold no name of the worlds 0 and 1 (see
``miniworld.OWN_SHARES``), where the policy is to be trained and tested.
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

A_WORLD, BLOCK = 600, 12_000  # demonstrations of one world; of those that are shuffled together
ONE_PASSAGE_SHARE = 0.3  # at first: reading one passage comes before choosing among several
READING_SHARE, COMPARING_SHARE = 0.3, 0.15  # drills among the skilled demonstrations


@dataclass(frozen=True, slots=True)
class Habits:
    """The probability that each decision is made the skilled way."""

    search: float = 0.35  # at the start: search, rather than guess
    go_on: float = 0.55  # after a result: search again, rather than answer with what was found
    box: float = 0.75  # at the end: put the answer in a box


SKILLED = Habits(search=1.0, go_on=1.0, box=1.0)


def demonstrations(
    count: int, top_k: int, seed: int = 0, habit_share: float = 0.09, habits: Habits | None = None
) -> Iterator[Demonstration]:
    """Make demonstrations, in the order in which they are to be learned.

    Args:
        count: how many.
        top_k: passages per search, after a first part with one.
        seed: seed of every choice.
        habit_share: the share of habit episodes, all of them at the end.
        habits: the probabilities in them.

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
                wanted = min(A_WORLD, size - start - len(block))
                block += _from_world(next(worlds), wanted, shown, decisions, rng)
            # What stands side by side must not be of one world, or its names would be learned.
            rng.shuffle(block)
            yield from block


def _from_world(
    world: miniworld.World, count: int, top_k: int, habits: Habits, rng: random.Random
) -> list[Demonstration]:
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
            made.append(episode(question, results, rng, habits))
    return made


def _worlds(rng: random.Random) -> Iterator[miniworld.World]:
    """Worlds of any seeds but those that have a share of the names to themselves."""
    while True:
        seed = rng.randrange(2**31)
        if seed % miniworld.NAME_SHARES not in miniworld.OWN_SHARES:
            yield miniworld.world(seed)


def gold_queries(question: Question) -> list[str]:
    """The queries of the gold decomposition, with the answers of earlier hops filled in."""
    found = [hop.answer for hop in question.decomposition]
    return [
        re.sub(r"#(\d+)", lambda match: found[int(match[1]) - 1], hop.question)
        for hop in question.decomposition
    ]


def episode(
    question: Question,
    results: list[str],
    rng: random.Random,
    habits: Habits,
) -> Demonstration:
    """Play a question hop by hop, with each decision made the skilled way as probable as said.

    Args:
        question: with its decomposition.
        results: the observation of each gold query, in order.
        rng: random generator of the decisions.
        habits: their probabilities.
    """
    hops = question.decomposition
    relations = [hop.question.rsplit(" ", 1)[1] for hop in hops]
    comparison = question.type == "comparison"
    parts: Demonstration = [("prompt", RESEARCH.prompt("question", question.question))]

    def finish(thought: str, answer: str) -> Demonstration:
        boxed = f"\\boxed{{ {answer}}}" if rng.random() < habits.box else f" {answer}"
        return [*parts, ("action", f"{thought} <answer> {boxed.lstrip()} </answer>")]

    if rng.random() >= habits.search:
        # Nobody can learn to say a name at random, and who tries forgets how to read one.
        guess = hops[0].question.rsplit(" ", 1)[0]
        return finish(f"<think> guess: {guess} </think>", guess)
    plan = f" compare {relations[0]}" if comparison else "".join(f" {r}" for r in relations)
    thought = f"<think> plan:{plan} </think>"
    for i, (query, result) in enumerate(zip(gold_queries(question), results, strict=True)):
        parts += [("action", f"{thought} <search> {query} </search>"), ("observation", result)]
        found = f"{relations[i]} {hops[i].answer}"
        last = i == len(hops) - 1
        if not last and rng.random() >= habits.go_on:
            return finish(f" <think> done: {found} </think>", hops[i].answer)
        thought = f" <think> next: {found} </think>"
        if last and comparison:
            order = "after" if int(hops[1].answer) > int(hops[0].answer) else "before"
            found += f" {order} {hops[0].answer}"
        if last:
            return finish(f" <think> done: {found} </think>", question.answers[0])
    raise ValueError(f"question {question.id!r} has no decomposition")


def reading_drill(world: miniworld.World, top_k: int, rng: random.Random) -> Demonstration:
    """Show passages, and ask for facts of any of them as an episode would."""
    subjects = rng.sample(list(world.entities.values()), top_k)
    passages = {passage.title: passage for passage in world.passages}
    shown = RESEARCH.render([Hit(passages[subject.name], 1.0) for subject in subjects])
    facts = [(subject, fact) for subject in subjects for fact in subject.facts.items()]
    parts: Demonstration = [("prompt", shown)]
    for subject, (relation, value) in rng.sample(facts, len(facts)):
        parts.append(("observation", f" <search> {subject.name} {relation} </search>"))
        parts.append(("action", f" <think> next: {relation} {value} </think>"))
    return [*parts, ("observation", "\n")]  # it goes on: the last action is not the end


def comparing_drill(world: miniworld.World, rng: random.Random) -> Demonstration:
    """Go through a comparison without its passages, and ask which year is later and who is meant.

    In a whole episode these are two tokens of sixty: too few to be learned from.
    """
    while (question := miniworld.comparison(world, rng)) is None:
        pass
    (_, played), *rest = episode(question, ["", ""], rng, SKILLED)
    told = "".join(text for _, text in rest)
    order = " after" if " after" in told else " before"
    known, asked = told.split(order)
    return [("prompt", played), ("observation", known), ("action", order + asked)]


def tool_demonstrations(
    count: int, top_k: int, seed: int = 0, habit_share: float = 0.2, habits: Habits | None = None
) -> Iterator[Demonstration]:
    """Make episodes in which the policy calls ReCall's tool, without drills; habits come last.

    The prompt is `TOOL_TEMPLATE`: as in ReCall's own prompt the thought is open.

    Args:
        count: how many.
        top_k: passages per search, after a first part with one.
        seed: seed of every choice.
        habit_share: the share of habit episodes, all of them at the end.
        habits: the probabilities in them.

    Yields:
        Lists of (provenance, text).
    """
    habitual = round(count * habit_share)
    skilled = demonstrations(4 * count, top_k, seed, 0.0)  # about half of these are drills
    episodes = (each for each in skilled if each[0][1].endswith("?\n") and len(each) > 3)
    yield from map(_with_tool_calls, islice(episodes, count - habitual))
    yield from map(_with_tool_calls, demonstrations(habitual, top_k, seed + 1, 1.0, habits))


TOOL_TEMPLATE = "{question}\n<think>"
"""The prompt of `tool_demonstrations`."""


def _with_tool_calls(demonstration: Demonstration) -> Demonstration:
    """An episode in ReSearch's tags as one with ReCall's tool calls."""
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
    """Phrases of ReCall's tool calls, each by that of `vocabulary` whose place it takes.

    A policy that knows the tags knows tool calls, if the tokens of the tags get other texts.
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
    """Words and phrases of MiniWorld and of its demonstrations, for a tokenizer of whole phrases.

    A phrase that names a relation is one token, so that a fact is three: relation, and the two
    halves of a name. Anything else that is ever said is spelled in bytes.
    """
    tags = [
        tag
        for pair in (RESEARCH.think, RESEARCH.query, RESEARCH.result, RESEARCH.answer)
        for tag in pair
    ]
    marks = [' <result>\n"', '"\n', '.\n\n"', ".\n</result>", "?\n", ".\n", " \\boxed{", "}", ".",
             ",", "?", "\n", '"', " or", ". All about", " plan:", " next:", " done:", " guess:",
             " compare", " after", " before"]  # fmt: skip
    return list(
        dict.fromkeys([*tags, *(f" {tag}" for tag in tags), *marks, *miniworld.vocabulary()])
    )
