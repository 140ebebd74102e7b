"""Play tasks, write each episode as it ends, and summarize the environment's metrics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from research_agent.config import SamplingConfig
from research_agent.engines.base import Engine
from research_agent.environments import Environments
from research_agent.errors import ConfigError
from research_agent.evaluation.predictions import as_record, open_predictions
from research_agent.evaluation.summary import Outcome, Summary, main_metric, outcome, summarize
from research_agent.formats import finite
from research_agent.renderer import Renderer
from research_agent.rollout import collect
from research_agent.system.files import write_atomic
from research_agent.system.terminal import printable
from research_agent.trajectory import Trajectory


def evaluate(
    engine: Engine,
    environments: Environments,
    renderer: Renderer,
    sampling: SamplingConfig,
    output: Path,
    *,
    limit: int | None = None,
    samples_per_task: int = 1,
    seed: int = 0,
    header: Mapping[str, Any] | None = None,
    log_tokens: bool = False,
    show: bool = True,
    play: Callable[..., object] | None = None,
) -> Summary:
    """Play every task of the environment, or the first ones in its order.

    Writes ``predictions.jsonl`` (a line per episode, as it ends) and finally ``summary.json``.

    Args:
        engine: see ``collect``.
        environments: see ``collect``.
        renderer: see ``collect``.
        sampling: see ``collect``; temperature 0 is greedy.
        output: folder to write to; created if it is missing.
        limit: most tasks to play.
        samples_per_task: episodes per task.
        seed: seed of the order of the tasks and of the sampled tokens.
        header: what the episodes depend on (see ``fingerprint.header``). If the folder holds
            predictions with the same header, they are continued: only missing, incomplete and void
            episodes are played. None: all are played.
        log_tokens: also write each action token's text and log-probability.
        show: show a progress bar on standard error.
        play: plays the episodes, with the arguments of ``collect``; None: ``collect``.

    Raises:
        ConfigError: the environment does not say how many tasks it has, and no limit is given.
        PredictionsError: the folder holds predictions with another header, or of more tasks.
        ContextError: a prompt does not fit; the episodes that were played are kept.
    """
    if environments.num_tasks is None and limit is None:
        raise ConfigError("this environment has no last task; say how many to play (--limit)")
    count = min(n for n in (environments.num_tasks, limit) if n is not None)
    wanted = [(episode, sample) for episode in range(count) for sample in range(samples_per_task)]
    known = None if header is None else json.loads(json.dumps(header))  # as it is read back
    shows = dict(getattr(environments, "shows", {}))
    opened = {**(known or {}), **({"shows": shows} if shows else {})}
    # The renderer of an endpoint knows no tokens.
    chat_tokens = partial(_chat_tokens, renderer) if hasattr(renderer, "end_ids") else None

    def pieces(tokens: Sequence[int]) -> list[str]:
        return [renderer.decode([token]) for token in tokens]

    with (
        open_predictions(output, opened, frozenset(wanted), resume=known is not None) as (
            kept,
            append,
        ),
        _progress(show) as progress,
    ):
        outcomes = [outcome(record) for record in kept]
        played = {(record["episode"], record["sample"]) for record in kept}
        del kept[:]  # frees their texts
        running = _RunningMean()
        for each in outcomes:
            running.add(each)
        task = progress.add_task(str(running), total=len(wanted), completed=len(outcomes))
        missing = [each for each in wanted if each not in played]
        if missing:
            (output / "summary.json").unlink(missing_ok=True)  # it covers fewer episodes

        def finished(trajectory: Trajectory) -> None:
            record = as_record(trajectory, pieces if log_tokens else None, chat_tokens)
            append(record)
            outcomes.append(outcome(record))
            running.add(outcomes[-1])
            progress.update(task, advance=1, description=str(running))

        play = play or partial(collect, keep=False)  # each is freed when it is written
        play(engine, environments, renderer, missing, sampling, seed=seed, on_finish=finished)
        summary = summarize(outcomes, known)
        _write_summary(summary, output)
    return summary


def record_evaluation(
    trajectories: Sequence[Trajectory], output: Path, renderer: Renderer, shows: Mapping[str, str]
) -> Summary:
    """Write the files of an evaluation for episodes that have been played, one per task.

    Args:
        trajectories: the episodes.
        output: folder to write to; created if it is missing.
        renderer: it made the prompts, and knows the chat tokens.
        shows: what the environment's observations show; see ``read_shows``.
    """
    wanted = frozenset((t.episode, t.sample) for t in trajectories)
    header = {"settings": {"chat_template": renderer.chat_template}, "shows": dict(shows)}
    records = [as_record(t, None, partial(_chat_tokens, renderer)) for t in trajectories]
    with open_predictions(output, header, wanted, resume=False) as (_, append):
        for each in records:
            append(each)
    summary = summarize([outcome(each) for each in records], None)
    _write_summary(summary, output)
    return summary


def _chat_tokens(renderer: Renderer, tokens: Sequence[int]) -> dict[str, Any]:
    """The token that ended a turn, "" if none did, and the chat tokens before it."""
    ended = bool(tokens) and tokens[-1] in renderer.end_ids
    special = renderer.special_ids.intersection(tokens[:-1] if ended else tokens)
    markup = sorted(renderer.decode([token]) for token in special)
    end = renderer.decode(tokens[-1:]) if ended else ""
    return {"end": end, **({"chat_markup": markup} if markup else {})}


def _write_summary(summary: Summary, output: Path) -> None:
    text = json.dumps(finite(asdict(summary)), indent=1, allow_nan=False)
    write_atomic(output / "summary.json", text + "\n")


@dataclass
class _RunningMean:
    """The mean of the main metric over the episodes so far, for the progress bar."""

    totals: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def add(self, one: Outcome) -> None:
        if not one.void:
            self.totals.update({"reward": one.reward, **one.metrics})
            self.count += 1

    def __str__(self) -> str:
        metric = main_metric(name for name in self.totals if name != "reward")
        return f"{printable(metric)} {self.totals[metric] / self.count:.3f}" if self.count else ""


def _progress(show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("[bold]evaluating"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=not (show and console.is_terminal),
    )
