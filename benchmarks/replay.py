"""Replay 625 recorded trajectories of a trained R1-Searcher model through the environment.

    python -m benchmarks.replay --data ../shared/data

The actions are the model's; the searches are run again, over the passages that it saw, with the
words of its queries where it had a dense engine (so a few find nothing). Every action must parse as
the search, with the same query, or the answer that it was, and every episode must end in the
recorded answer with the recorded F1, which is computed here from the recorded prediction by a
definition of its own. Then it prints how long real trajectories are.
"""

from __future__ import annotations

import json as json_format
import re
import string
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, quantiles

from benchmarks.recorded import QUERY, RecordedTrajectory, read_trajectories, recorded_folder
from benchmarks.tables import print_table
from research_env import Dataset, Question
from research_env.datasets import FileCorpus
from research_env.env import SearchQAEnv
from research_env.errors import ResearchEnvError

TOP_K = 5  # passages per search, in the recorded evaluation


@dataclass(frozen=True, slots=True)
class Replay:
    """What one replayed trajectory came to; ``wrong`` says what was not as recorded."""

    id: str
    found: tuple[int, ...]  # passages, search by search
    f1: float
    exact: bool
    reward: float
    wrong: tuple[str, ...]


def recorded_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 by SQuAD's and HotpotQA's rules, written here a second time, on purpose."""

    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(the|an|a)\b", " ", kept).split()

    best = 0.0
    for answer in answers:
        ours, theirs = words(prediction), words(answer)
        if ours != theirs and any(w in (["yes"], ["no"], ["noanswer"]) for w in (ours, theirs)):
            continue
        shared = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
        if shared:
            precision, recall = shared / len(ours), shared / len(theirs)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def replay(env: SearchQAEnv, trajectory: RecordedTrajectory) -> Replay:
    """Play the recorded actions, and say what was not as recorded."""
    wrong: list[str] = []
    found: list[int] = []

    def result(f1: float = 0.0, *, exact: bool = False, reward: float = 0.0) -> Replay:
        return Replay(trajectory.id, tuple(found), f1, exact, reward, tuple(wrong))

    env.reset(options={"question_id": trajectory.id})
    *searches, last = trajectory.actions
    for action in searches:
        _, _, terminated, truncated, info = env.step(action)
        asked = QUERY.search(action)
        if terminated or truncated or asked is None:
            wrong.append(f"no search at turn {len(found) + 1}: {info['stop_reason']}")
            return result()
        if info["query"] != " ".join(asked.group(1).replace('"', "").split()):
            wrong.append(f"query {info['query']!r}")
        found.append(len(info["passage_ids"]))
    _, reward, terminated, _, info = env.step(last)
    if not terminated or info["stop_reason"] != "answer":
        wrong.append(f"no answer at the end: {info['stop_reason']}")
        return result()
    f1 = info["metrics"]["f1"]
    if abs(f1 - recorded_f1(trajectory.prediction, trajectory.answers)) > 1e-9:
        wrong.append(f"F1 {f1} of {info['prediction']!r}")
    if _bag(info["prediction"]) != _bag(trajectory.prediction):
        wrong.append(f"answer {info['prediction']!r}, recorded {trajectory.prediction!r}")
    exact = info["prediction"] == trajectory.prediction.strip()
    return result(f1, exact=exact, reward=float(reward))


def lengths(trajectories: Sequence[RecordedTrajectory]) -> dict[str, list[int]]:
    """How long trajectories and their parts are: searches in number, texts in characters.

    ``action`` and ``observation`` count each one, ``actions`` and ``episode`` all of an episode
    together (without its prompt).
    """
    return {
        "searches": [len(t.observations) for t in trajectories],
        "action": [len(a) for t in trajectories for a in t.actions],
        "observation": [len(o) for t in trajectories for o in t.observations],
        "actions": [len("".join(t.actions)) for t in trajectories],
        "episode": [len("".join(t.actions + t.observations)) for t in trajectories],
    }


def distribution(values: Sequence[int]) -> dict[str, float]:
    """Mean, least, quantiles and greatest of some lengths."""
    cuts = quantiles(values, n=20, method="inclusive")
    named = {"5 %": cuts[0], "25 %": cuts[4], "50 %": cuts[9], "75 %": cuts[14], "95 %": cuts[18]}
    return {"mean": fmean(values), "min": min(values), **named, "max": max(values)}


def main(*, data: str | None = None, retriever: str | None = None, json: bool = False) -> int:
    """Replay the recorded trajectories and print what they came to, and how long they are.

    Args:
        data: the folder that holds r1searcher_trajectories; by default RESEARCH_DATA.
        retriever: URL of an engine; by default the embedded index of the passages that were seen.
        json: print one line of JSON in place of the tables.

    Returns:
        The exit status: 1 when something was not as recorded.
    """
    trajectories = read_trajectories(data)
    env = make_env(trajectories, recorded_folder(data) / "corpus.jsonl.gz", retriever)
    started = time.perf_counter()
    replays = [replay(env, trajectory) for trajectory in trajectories]
    seconds = time.perf_counter() - started
    env.close()
    wrong = [each for each in replays if each.wrong]
    summary = {
        "trajectories": len(replays),
        "as recorded": len(replays) - len(wrong),
        "searches": sum(len(each.found) for each in replays),
        "searches that found nothing": sum(each.found.count(0) for each in replays),
        "same words, other order": sum(not each.exact for each in replays),
        "mean F1": fmean(each.f1 for each in replays),
        "mean reward (r1-searcher-stage2)": fmean(each.reward for each in replays),
        "episodes per second": len(replays) / seconds,
    }
    shapes = {name: distribution(values) for name, values in lengths(trajectories).items()}
    if json:
        found = {"wrong": [asdict(each) for each in wrong], "lengths": shapes}
        print(json_format.dumps(summary | found))
    else:
        show(summary, shapes, wrong)
    return 1 if wrong else 0


def make_env(
    trajectories: Sequence[RecordedTrajectory], corpus: Path, retriever: str | None = None
) -> SearchQAEnv:
    """An environment that asks the recorded questions, over the passages that were seen."""
    questions = [Question(t.id, t.question, t.answers) for t in trajectories]
    dataset = Dataset("r1searcher_trajectories", questions, FileCorpus(corpus.stem, corpus))
    return SearchQAEnv(dataset=dataset, retriever=retriever, protocol="r1-searcher", top_k=TOP_K)


def show(
    summary: dict[str, float], shapes: dict[str, dict[str, float]], wrong: Sequence[Replay]
) -> None:
    """Print the summary, the lengths, and whatever was not as recorded."""
    for name, value in summary.items():
        print(f"{name}: {value:g}")
    rows = [
        [name, *(f"{v:.3g}" if v < 100 else f"{v:,.0f}" for v in shape.values())]
        for name, shape in shapes.items()
    ]
    headings = ["", *next(iter(shapes.values()))]
    print_table("searches per episode; lengths in characters", headings, rows)
    for each in wrong:
        print(f"{each.id}: {'; '.join(each.wrong)}")


def _bag(text: str) -> list[str]:
    return sorted(re.findall(r"\w+", text.lower()))


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(tyro.cli(main, prog="python -m benchmarks.replay"))
    except ResearchEnvError as error:
        print(f"benchmarks.replay: {error}", file=sys.stderr)
        sys.exit(2)
