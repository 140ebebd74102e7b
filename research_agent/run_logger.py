"""The logs of a run: JSON Lines, TensorBoard, Weights & Biases, and a progress bar.

``metrics.jsonl`` holds only what follows from configuration and seed, so the log of a run that was
killed and continued equals that of a run that never was. What depends on the clock is in
``timings.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Column

from research_agent.errors import CheckpointError, ConfigError, LogError
from research_agent.formats import LONGEST_LINE, NumbersFormat, StepFormat, finite, parse
from research_agent.system.files import write_atomic
from research_agent.system.terminal import printable

METRICS, TIMINGS, TRAJECTORIES = "metrics.jsonl", "timings.jsonl", "trajectories.jsonl"
_SHOWN = 5  # metrics of the environment shown beside the progress bar


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines log, whose records have a step each.

    Args:
        path: the log. One that does not exist has no records. In ``metrics.jsonl`` and
            ``timings.jsonl`` every value is a number or null.

    Returns:
        The records, without a last line that a kill has cut short.

    Raises:
        LogError: a whole line is no such record; the message names file and line.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise LogError(f"{path} is no regular file; remove it")
    schema = NumbersFormat if path.name in (METRICS, TIMINGS) else StepFormat
    records = []
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                break
            where = f"{path}:{number}: this line is no record of a step"
            record = parse(line, schema, where, LogError, "remove the line")
            number_of_step = record.get("step")
            if not isinstance(number_of_step, int):
                raise LogError(f"{where}: its step is {number_of_step!r}; remove the line")
            records.append(record)
    return records


def truncate_after(path: Path, step: int) -> None:
    """Drop the records of later steps, and an incomplete last line, by replacing the file."""
    kept = [record for record in read_lines(path) if record["step"] <= step]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


def wandb_run(project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """Open the run of Weights & Biases that belongs to a folder; a continued run has the same one.

    Args:
        project: name of the project there.
        folder: folder of the run; its last part names the run.
        config: settings to show beside the metrics.

    Raises:
        ConfigError: the package is missing, or Weights & Biases refuses the run.
    """
    try:
        import wandb  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        message = "--wandb needs a package that is missing: pip install 'research-env[wandb]'"
        raise ConfigError(message) from error
    kept = folder / "wandb-id"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, secrets.token_hex(4) + "\n")
    try:
        run = wandb.init(
            project=project,
            name=folder.name,
            id=kept.read_text(encoding="utf-8").strip(),
            dir=folder,
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        # Its own steps cannot go back, as ours do when a run is rolled back or continued.
        run.define_metric("*", step_metric="step")
    except wandb.Error as error:
        raise ConfigError(
            f"Weights & Biases refuses the project {project!r}: {error}; log in with wandb login, "
            "or set WANDB_MODE=offline"
        ) from error
    return run


class RunLogger:
    """The logs and the progress bar of a run, from one step on.

    Args:
        folder: folder of the run.
        step: steps done; records and evaluations of later steps, which will be done again, are
            dropped.
        steps: steps of the whole run.
        show: whether to show progress, on standard error.
        fresh: the run begins, so that all records and evaluations are dropped.
        wandb: takes the same metrics as TensorBoard; see ``wandb_run``.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        *,
        show: bool = True,
        fresh: bool = False,
        wandb: Any = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (slow to import)

        folder.mkdir(parents=True, exist_ok=True)
        done = -1 if fresh else step
        for name in (METRICS, TIMINGS, TRAJECTORIES):
            truncate_after(folder / name, done)
        for evaluation in (folder / "evaluations").glob("step-*"):
            number = evaluation.name.removeprefix("step-")
            if number.isdecimal() and int(number) > done:
                shutil.rmtree(evaluation)
        self._folder = folder
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._wandb = wandb
        self._console = Console(stderr=True)
        self._show = show
        self._steps = steps
        # The description gets the width that the other columns leave, and is cut at its end.
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False, table_column=rest),
            TimeLeft(compact=True),
            TextColumn("left"),
            console=self._console,
            disable=not (show and self._console.is_terminal),
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("", total=steps, completed=step)

    def __enter__(self) -> Self:
        """Show the progress bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the terminal back in order and close the logs."""
        self._progress.stop()
        with contextlib.suppress(OSError):  # a full disk, which ``record`` has reported
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))

    def print(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self._show:
            text = printable(message)
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        episodes: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Log a finished step, and move the progress bar on.

        Args:
            step: number of steps done, this one included.
            metrics: what follows from configuration and seed.
            timings: what depends on the clock; "seconds" is the training so far.
            episodes: some episodes in words, for ``trajectories.jsonl``.

        Raises:
            CheckpointError: the logs cannot be written, on a full disk for example.
        """
        shown = {**metrics, **{f"time/{k}": v for k, v in timings.items()}}
        try:
            append(self._folder / METRICS, [{"step": step, **metrics}])
            append(self._folder / TIMINGS, [{"step": step, **timings}])
            append(self._folder / TRAJECTORIES, [{"step": step, **each} for each in episodes])
            for name, value in shown.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
            if self._wandb is not None:
                self._wandb.log({"step": step, **shown})
        except OSError as error:
            raise CheckpointError(
                f"cannot write the log of step {step} to {self._folder}: {error}; make room, and "
                "start the same command again: it continues from the last checkpoint"
            ) from error
        words = printable("  ".join(_beside_the_bar(metrics, timings)))
        self._progress.update(self._task, completed=step, description=words)
        if self._show and not self._console.is_terminal:
            self.print(f"step {step}/{self._steps}  {words}")


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a JSON Lines file, and wait until they are on the disk.

    A number that is not finite is written as null.
    """
    lines = "".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records)
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def _beside_the_bar(metrics: Mapping[str, float], timings: Mapping[str, float]) -> Iterator[str]:
    """Yield what is shown of a step beside the progress bar."""
    if "reward" in metrics:
        yield f"reward {metrics['reward']:.3f}"
    of_environment = [(k, v) for k, v in metrics.items() if k.startswith("env/")]
    for name, value in of_environment[:_SHOWN]:
        yield f"{name.removeprefix('env/')} {value:.2f}"
    if "eval/reward" in metrics:
        yield f"held-out {metrics['eval/reward']:.3f}"
    if metrics.get("void_fraction"):
        yield f"void {metrics['void_fraction']:.0%}"
    if metrics.get("skipped_fraction"):
        yield f"skipped {metrics['skipped_fraction']:.0%}"
    if "episodes_per_second" in timings:
        yield f"{timings['episodes_per_second']:.1f} episodes/s"
