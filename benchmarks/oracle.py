"""How far perfect queries go: an agent that knows the gold decomposition plays real questions.

    python -m benchmarks.oracle --env ReSearch-MuSiQue-v0

It searches with the gold sub-questions, the answers of earlier ones filled in (MuSiQue), or with
the titles of the gold passages (HotpotQA, 2WikiMultiHopQA), and then gives the gold answer. That
shows three things: the environment, its reward and its engine work on real input (every reward is
1, nothing fails); the passages can be found by someone who knows what to ask; and one search for
the whole question, the comparison, does not find them.
"""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import gymnasium as gym

from benchmarks.tables import print_table
from research_env import IDS, Corpus, Question, ResearchEnvError
from research_env.datasets import load_dataset
from research_env.errors import ConfigurationError, UnknownNameError

Plan = Callable[[Question], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Played:
    """One episode: ``recall[i]`` is the share of gold passages found by the first i+1 searches."""

    hops: int
    recall: tuple[float, ...]
    reward: float
    failed: bool


@dataclass(frozen=True, slots=True)
class OracleMeans:
    """A way of searching over all questions; ``recall`` by number of hops, and under "all".

    A question that needs fewer searches than others keeps its last recall in the mean.
    """

    questions: int
    errors: int
    mean_reward: float
    least_reward: float
    episodes_per_second: float
    recall: dict[str, list[float]]


def sub_questions(question: Question) -> list[str]:
    """The gold sub-questions, with ``#1``, ``#2``, ... replaced by the answers of those hops."""
    queries = []
    for hop in question.decomposition:
        query = hop.question
        for number in range(len(question.decomposition), 0, -1):  # "#12" before "#1"
            query = query.replace(f"#{number}", question.decomposition[number - 1].answer)
        queries.append(query)
    return queries


def titles_of(corpus: Corpus, questions: Iterable[Question]) -> dict[str, str]:
    """The titles of the questions' gold passages, by id; reads the corpus once."""
    wanted = {passage for question in questions for passage in question.supporting}
    return {passage.id: passage.title for passage in corpus if passage.id in wanted}


def gold_plan(questions: Sequence[Question], corpus: Corpus) -> Plan:
    """Sub-questions where every question has them, else the titles of the gold passages.

    Raises:
        ConfigurationError: a question names no gold passage.
    """
    bare = next((question for question in questions if not question.supporting), None)
    if bare is not None:
        raise ConfigurationError(
            f"question {bare.id!r} names no gold passages; choose a set and split that has them"
        )
    if all(question.decomposition for question in questions):
        return sub_questions
    titles = titles_of(corpus, questions)
    return lambda question: [titles[passage] for passage in question.supporting]


def play(env: gym.Env[str, str], question: Question, queries: Sequence[str]) -> Played:
    """Search for each query in turn, then answer with the first gold answer."""
    golds, found = set(question.supporting), set[str]()
    recall: list[float] = []
    hops = question.hops or len(golds)
    try:
        env.reset(options={"question_id": question.id})
        for query in queries:
            action = f"<think>I need a fact.</think> <search>{query}</search>"
            _, reward, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                return Played(hops, tuple(recall), float(reward), failed=True)
            found.update(info["passage_ids"])
            recall.append(len(golds & found) / len(golds))
        answer = f"<answer> The final answer is \\[ \\boxed{{{question.answers[0]}}} \\] </answer>"
        _, reward, terminated, *_ = env.step(f"<think>I know.</think> {answer}")
    except ResearchEnvError as error:
        print(f"{question.id}: {error}", file=sys.stderr)
        return Played(hops, tuple(recall), 0.0, failed=True)
    return Played(hops, tuple(recall), float(reward), failed=not terminated)


def measure(env: gym.Env[str, str], questions: Sequence[Question], plan: Plan) -> OracleMeans:
    """Play every question once, and summarize."""
    started = time.perf_counter()
    played = [play(env, question, plan(question)) for question in questions]
    seconds = time.perf_counter() - started
    groups = {str(hops): [p for p in played if p.hops == hops] for hops in {p.hops for p in played}}
    return OracleMeans(
        questions=len(played),
        errors=sum(p.failed for p in played),
        mean_reward=fmean(p.reward for p in played),
        least_reward=min(p.reward for p in played),
        episodes_per_second=len(played) / seconds,
        recall={
            name: _mean_recall(group) for name, group in [*sorted(groups.items()), ("all", played)]
        },
    )


def _mean_recall(played: Sequence[Played]) -> list[float]:
    longest = max(len(p.recall) for p in played)
    return [
        fmean(p.recall[min(i, len(p.recall) - 1)] if p.recall else 0.0 for p in played)
        for i in range(longest)
    ]


def show(summaries: Mapping[str, OracleMeans]) -> None:
    """Print a table for each way of searching, its rewards and its errors."""
    for name, summary in summaries.items():
        searches = [str(i + 1) for i in range(len(summary.recall["all"]))]
        rows = [
            [hops, *(f"{recall[i]:.4f}" if i < len(recall) else "" for i in range(len(searches)))]
            for hops, recall in summary.recall.items()
        ]
        print_table(f"{name}: support recall after each search", ["hops", *searches], rows)
        print(
            f"{summary.questions} questions, reward {summary.mean_reward:.4f} "
            f"(least {summary.least_reward:.4f}), errors {summary.errors}, "
            f"{summary.episodes_per_second:.0f} episodes/s"
        )
    gold, single = (summary.recall["all"][-1] for summary in summaries.values())
    if single:
        print(f"The gold queries find {gold / single:.2f} times what one search finds.")


def main(
    *,
    env: str = "ReSearch-MuSiQue-v0",
    split: str = "dev",
    top_k: int = 5,
    limit: int | None = None,
    retriever: str | None = None,
    json: bool = False,
) -> int:
    """Play the questions of an environment with gold queries, and with one search each.

    Args:
        env: the id of an environment whose questions have gold passages.
        split: split of its data set.
        top_k: passages that a search returns.
        limit: only the first so many questions.
        retriever: URL of an engine; by default the embedded index of the data set's corpus.
        json: print one line of JSON in place of the tables.

    Returns:
        The exit status: 1 when a reward was not 1 or an episode failed.
    """
    if env not in IDS:
        raise UnknownNameError("environment", env, IDS)
    dataset = load_dataset(IDS[env]["dataset"], split=split)
    if dataset.corpus is None:
        raise ConfigurationError(f"{env} has no corpus of its own, so no gold passages")
    questions = dataset.questions[:limit]
    plan = gold_plan(questions, dataset.corpus)
    game = gym.make(env, split=split, top_k=top_k, retriever=retriever, disable_env_checker=True)
    summaries = {
        "gold queries": measure(game, questions, plan),
        "one search": measure(game, questions, lambda question: [question.question]),
    }
    game.close()
    if json:
        found = {name: asdict(summary) for name, summary in summaries.items()}
        print(json_format.dumps({"env": env, "split": split, "top_k": top_k} | found))
    else:
        show(summaries)
    good = all(s.errors == 0 and s.least_reward == 1.0 for s in summaries.values())
    return 0 if good else 1


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(tyro.cli(main, prog="python -m benchmarks.oracle"))
    except ResearchEnvError as error:
        print(f"benchmarks.oracle: {error}", file=sys.stderr)
        sys.exit(2)
