"""Training: collect, credit, learn, sync, log, save. Then again.

A step depends on its number, the weights, the optimizer's state and torch's random state. A
checkpoint holds these and nothing else, so a killed run continues to the same bits. If collection
runs ahead of learning, the checkpoint also holds the episodes in flight.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from research_agent import checkpoint, rollout_state, step_metrics
from research_agent.algorithms import algorithm
from research_agent.algorithms.base import SelectsGroups
from research_agent.checkpoint import Checkpoint
from research_agent.config import TrainConfig, as_json, changes, require_same, validate
from research_agent.curriculum import CollapseMonitor, CurriculumState, parse_stages
from research_agent.distributed import broadcast_object, gather, init_distributed, rank_and_size
from research_agent.engines import make_engine
from research_agent.engines.base import Engine
from research_agent.environments import Environments, open_environments, provenance_of
from research_agent.errors import (
    CheckpointError,
    CollapseError,
    ConfigError,
    NonFiniteError,
    TooManyVoidError,
)
from research_agent.evaluation.evaluate import evaluate
from research_agent.evaluation.predictions import as_record
from research_agent.files import folder_lock, write_atomic
from research_agent.formats import RunFormat, StateFormat, read_object, require
from research_agent.learner import Learner
from research_agent.models.policy import context_length, load_model, require_ends
from research_agent.models.source import model_source, resolve_model
from research_agent.renderer import load_renderer
from research_agent.rollout import Episode, InFlight, collect
from research_agent.run_logger import METRICS, TIMINGS, RunLogger, append, read_lines, wandb_run
from research_agent.terminal import show
from research_agent.trace import Trace, TracedEngine, TracedEnvironments, span
from research_agent.trajectory import Group, Trajectory
from research_agent.trees import TreePlan

CHANGES = "changes.jsonl"  # settings with which a run was continued


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """How a run ended."""

    message: str
    numbers: Mapping[str, float | str]
    signal: int = 0  # the one that asked the run to stop before its end


def train(config: TrainConfig) -> TrainSummary:
    """Train until the steps or the time are used up; see ``Trainer.train``."""
    return Trainer(config).train()


class Trainer:
    """A training run, from its configuration to its checkpoints.

    Args:
        config: everything that the run depends on.

    Attributes:
        config: the configuration.
        step: training steps done.
        seconds: time spent in those steps, without evaluation and saving.

    Raises:
        ConfigError: a setting has a value that cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        validate(config)
        self.config = config
        self.step = 0
        self.seconds = 0.0

    def train(self) -> TrainSummary:
        """Train until the steps or the time are used up, continuing what the output folder holds.

        Returns:
            How the run ended. A run that was asked to stop by a signal says which one.

        Raises:
            CheckpointError: the folder holds a run of another configuration, or cannot be written.
            CollapseError: the reward collapsed and the configuration says stop.
            ConfigError: the environment, model or algorithm refuses its settings.
            TooManyVoidError: more episodes were void than ``max_void_fraction`` allows. The state
                is saved.
        """
        run = self.config.run
        with ExitStack() as stack:
            signals = stack.enter_context(_stop_signals())
            stack.enter_context(init_distributed())
            stack.enter_context(folder_lock(run.output) if rank_and_size()[0] == 0 else ExitStack())
            saved = self._newest_checkpoint()
            if finished := broadcast_object(self._finished()):
                return self._summary(f"{run.output} is finished: {finished}")
            _require_one_process(self.config)
            self._open(saved, stack)
            logger = stack.enter_context(self._logger(saved))

            while not any(gather([bool(signals)])) and not finished:
                start = time.perf_counter()

                # Collect. The tasks of a step are a function of its number.
                with saved_for_inspection(run.output, self.step, []), span(self.trace, "collect"):
                    trajectories, groups = self._collect()
                collected = time.perf_counter()

                # Credit and learn. Advantages, weights and objective are the algorithm's.
                self._require_few_void(trajectories)
                with (
                    saved_for_inspection(run.output, self.step, trajectories),
                    span(self.trace, "update"),
                ):
                    learned = self.learner.update(groups)
                updated = time.perf_counter()

                # Sync. The next step is sampled with the new weights.
                self.step += 1
                self.engine.load_weights(self.learner.weights(), version=self.step)
                end = time.perf_counter()
                self.seconds += end - start
                finished = broadcast_object(self._finished())

                # Log.
                metrics = {
                    **step_metrics.of_episodes(trajectories),
                    **step_metrics.staleness(groups, self.step - 1),
                    **({"stage": self.curriculum.stage + 1.0} if self.stages else {}),
                    **step_metrics.prefixed("learner", learned),
                }
                if logger and run.eval_every and (finished or self.step % run.eval_every == 0):
                    metrics |= self._evaluate()
                timings = {
                    "seconds": self.seconds,
                    "collect": collected - start,
                    "learn": updated - collected,
                    "sync": end - updated,
                    "episodes_per_second": len(trajectories) / (end - start),
                }
                if logger:
                    shown = [as_record(each) for each in trajectories[: run.log_episodes]]
                    logger.record(self.step, metrics, timings, shown)

                # A collapsed run stops or goes back; a finished stage gives way to the next.
                best = None
                if self.collapse and groups:
                    best = self.collapse.add(self.step, metrics["reward"])
                if best is not None:
                    message = self._roll_back(best)
                    if logger:
                        logger.print(message)
                next_stage = self.curriculum.advance(self.stages, metrics["reward"])
                if next_stage:
                    self._start_stage(stack)

                # Save.
                is_best = "eval/reward" in metrics and self.step == self._best_step()
                due = self.step % run.save_every == 0
                if broadcast_object(due or is_best or next_stage or best is not None):
                    self._save()
            self._save()

        if finished:
            return self._summary(f"{run.output} is finished: {finished}")
        message = f"stopped after step {self.step} of {run.steps}; the same command continues it"
        return self._summary(message, signals[0] if signals else 0)

    def _open(self, saved: Checkpoint | None, stack: ExitStack) -> None:
        """Make everything that a step uses, with the weights and states of a checkpoint."""
        config, sampling, run = self.config, self.config.sampling, self.config.run
        rank, size = rank_and_size()
        torch.manual_seed(run.seed)
        rule = algorithm(config.algorithm.algorithm, **config.algorithm.algorithm_args)
        self.trace = Trace(run.trace) if run.trace and rank == 0 else None
        if self.trace:
            stack.callback(self.trace.close)

        # Environments: as many as this process has episodes in flight.
        self.stages = parse_stages(config.environment.stages)
        self.curriculum = CurriculumState()
        if saved and self.stages:
            self.curriculum = CurriculumState(**saved.state["stage"])
        share = -(-sampling.prompts_per_step * sampling.group_size // size)
        slots = min(share * (1 + sampling.max_staleness), sampling.max_in_flight or share)
        self.environments = self._open_environments(slots, stack)
        self.provenance = self._provenance()
        if saved:
            self._require_same_run(saved)
        self.eval_environments: Environments | None = None
        if run.eval_every and rank == 0:
            eval_args = {**config.environment.env_args, **run.eval_args}
            self.eval_environments = open_environments(config.environment.env, slots, eval_args)
            stack.callback(self.eval_environments.close)

        # Policy: the model that learns, its reference, and the engine that samples.
        self.origin = _starting_model(config.policy.model)
        if saved:
            self.origin = _saved_origin(saved, config.policy.model)
        adapter = self._load_policy(saved)
        if rank == 0:
            config_file = run.output / "config.json"
            write_atomic(config_file, json.dumps(as_json(self.config), indent=1) + "\n")
        load = partial(load_model, device=config.policy.device)
        reference = None
        if rule.needs_reference and (adapter is not None or not config.learner.lora_rank):
            # With several ranks each shard goes to its device when the model is sharded.
            reference = load_model(self.origin, device="cpu") if size > 1 else load(self.origin)
        self.engine: Engine = make_engine(
            sampling.engine,
            self.model,
            self.renderer,
            max_slots=slots,
            max_context=context_length(self.model, sampling.max_prompt + sampling.max_response),
            dtype=config.learner.precision,
        )
        if self.trace:
            self.engine = TracedEngine(self.engine, self.trace)
        self.learner = Learner(
            self.model,
            rule,
            config.learner,
            reference=reference,
            adapter=adapter,
            temperature=sampling.temperature,
        )
        if not saved:
            self._rehearse_save()

        self.collapse = None if run.collapse is None else CollapseMonitor(run.collapse)
        self.in_flight = InFlight()
        if saved:
            with checkpoint.restoring(saved):
                self._restore(saved)
        if saved or adapter is not None:
            self.engine.load_weights(self.learner.weights(), version=self.step)

    def _restore(self, saved: Checkpoint) -> None:
        """Take up the states of learner, random numbers, collapse monitor and episodes."""
        self.learner.load_state_dict(saved.state["learner"])
        torch.set_rng_state(saved.state["random"])
        if self.collapse:
            self.collapse.history = [(int(s), float(r)) for s, r in saved.state["rewards"]]
        self.in_flight = rollout_state.from_state(
            saved.state["in_flight"], self.environments, self.config.sampling, self.config.run.seed
        )

    def _load_policy(self, saved: Checkpoint | None) -> str | None:
        """Open tokenizer and model; returns the adapter that the learner is to put beside it."""
        config = self.config
        self._load_renderer(saved)
        adapter = None if config.policy.merge_adapter else model_source(self.origin).adapter
        load = partial(load_model, device=config.policy.device)
        if saved and adapter is None and not config.learner.lora_rank:
            self.model = load(saved.folder)
        else:
            self.model = load(self.origin, merge_adapter=adapter is None)
        require_ends(self.model, self.renderer)
        return adapter

    def _load_renderer(self, saved: Checkpoint | None) -> None:
        """Open the tokenizer. Its chat template writes the day on which the run started."""
        policy = self.config.policy
        before = saved.config["policy"].get("chat_template_date") if saved else None
        today = broadcast_object(date.today().isoformat())
        self.renderer = load_renderer(
            resolve_model(self.origin),
            chat_template=policy.chat_template,
            chat_template_args=policy.chat_template_args,
            chat_template_date=policy.chat_template_date or before or today,
        )
        written = self.renderer.chat_template_date or None
        self.config = replace(self.config, policy=replace(policy, chat_template_date=written))

    def _open_environments(self, count: int, stack: ExitStack) -> Environments:
        """Open the environments of the present stage; ``stack`` closes them."""
        config = self.config.environment
        stage_args = self.stages[self.curriculum.stage].env_args if self.stages else {}
        environments = open_environments(config.env, count, {**config.env_args, **stage_args})
        stack.callback(environments.close)
        return TracedEnvironments(environments, self.trace) if self.trace else environments

    def _provenance(self) -> dict[str, str]:
        """What the episodes depend on, as the environment says; places are left out."""
        found = provenance_of(self.environments)
        return {name: text for name, text in found.items() if not name.startswith("place:")}

    def _require_same_run(self, saved: Checkpoint) -> None:
        """Compare a checkpoint's configuration and environment with the present ones.

        Raises:
            CheckpointError: something differs that changes the results, without ``--override``.
        """
        run = self.config.run
        before, now = saved.state["environment"], self.provenance
        same_environment = before == now if before and now else None
        found = changes(saved.config, self.config, same_environment=same_environment)
        if same_environment is False:
            differing = {
                f"environment's {name}": (before.get(name), now.get(name))
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name)
            }
            found = replace(found, results={**found.results, **differing})
        require_same(found, run.output, override=run.override)
        if rank_and_size()[0] == 0 and (found.results or found.neutral):
            record = {"step": saved.step, "results": found.results, "neutral": found.neutral}
            append(run.output / CHANGES, [record])
            if not run.quiet:
                names = ", ".join([*found.results, *found.neutral])
                show(f"{run.output}: continuing with other settings: {names}", file=sys.stderr)

    def _start_stage(self, stack: ExitStack) -> None:
        self.in_flight.clear()
        self.environments.close()
        self.environments = self._open_environments(self.environments.num_envs, stack)
        self.provenance = self._provenance()

    @contextmanager
    def _logger(self, saved: Checkpoint | None) -> Iterator[RunLogger | None]:
        """Open the logs and record the first evaluation; None on every rank but the first."""
        if rank_and_size()[0]:
            yield None
            return
        run = self.config.run
        show, fresh = not run.quiet, not saved
        settings = as_json(self.config)
        board = None if run.wandb is None else wandb_run(run.wandb, run.output, settings)
        with RunLogger(
            run.output, self.step, run.steps, show=show, fresh=fresh, board=board
        ) as logger:
            begin = f"continuing after step {self.step}" if saved else "starting"
            logger.print(f"{run.output}: {begin}")
            if run.eval_every and not saved:
                logger.record(0, self._evaluate(), {"seconds": 0.0})
            yield logger

    def _collect(self) -> tuple[list[Trajectory], list[Group]]:
        """Play the tasks of a step; returns all episodes, and the groups to learn from.

        An algorithm that selects groups reserves as many tasks per step as its rounds can need. A
        step leaves out those that it does not need, so its tasks never depend on other steps.
        Free slots start the tasks of the next ``max_staleness`` steps.
        """
        sampling, rule = self.config.sampling, self.learner.algorithm
        selects = rule if isinstance(rule, SelectsGroups) else None
        rounds = selects.max_rounds if selects else 1
        tasks_per_step = sampling.prompts_per_step * rounds
        later_steps = range(self.step + 1, self.step + sampling.max_staleness + 1)
        later = [
            episode
            for step in later_steps
            for episode in _episodes(
                step * tasks_per_step, sampling.prompts_per_step, sampling.group_size
            )
        ]
        rank, size = rank_and_size()
        next_task = self.step * tasks_per_step
        played: list[Trajectory] = []
        groups: list[Group] = []
        for _ in range(rounds):
            missing = sampling.prompts_per_step - len(groups)
            episodes = _episodes(next_task, missing, sampling.group_size)
            next_task += missing
            own = collect(
                self.engine,
                self.environments,
                self.renderer,
                episodes[rank::size],  # each rank plays its share, and all learn from all
                sampling,
                seed=self.config.run.seed,
                ahead=later,
                in_flight=self.in_flight,
                overlong_prompts=self.config.sampling.overlong_prompts,
                plan=TreePlan.of(sampling),
            )
            trajectories = sorted(gather(own), key=lambda t: (t.episode, t.sample))
            played += trajectories
            for group in _groups(trajectories):
                if selects is None or selects.keeps([t.reward for t in group.trajectories]):
                    groups.append(group)
            too_many_void = (
                step_metrics.void_fraction(played) > self.config.algorithm.max_void_fraction
            )
            if too_many_void or len(groups) == sampling.prompts_per_step:
                break
        return played, groups

    def _require_few_void(self, trajectories: Sequence[Trajectory]) -> None:
        limit = self.config.algorithm.max_void_fraction
        fraction = step_metrics.void_fraction(trajectories)
        if fraction <= limit:
            return
        self.in_flight.clear()  # many of these episodes are void too
        self._save()
        raise TooManyVoidError(
            f"{fraction:.0%} of the episodes of step {self.step + 1} were void, more than "
            f"--max-void-fraction {limit:.0%}: something that the environment needs is down. "
            f"Step {self.step} is saved in {self.config.run.output}; "
            "the same command continues when it is up"
        )

    def _evaluate(self) -> dict[str, float]:
        """Play the held-out tasks with the present weights."""
        run = self.config.run
        if self.eval_environments is None:
            return {}
        summary = evaluate(
            self.engine,
            self.eval_environments,
            self.renderer,
            replace(self.config.sampling, temperature=run.eval_temperature),
            run.output / "evaluations" / f"step-{self.step:06d}",
            limit=run.eval_limit,
            seed=run.seed,
            show=False,
        )
        if summary.episodes == 0:
            return {}  # all void: there is nothing to report
        return step_metrics.prefixed("eval", {"reward": summary.reward, **summary.metrics})

    def _whole_weights(self) -> dict[str, Tensor] | None:
        """The weights to save, which all ranks gather; None where the model itself has them."""
        if rank_and_size()[1] == 1 and not self.learner.has_adapters:
            return None
        return dict(self.learner.weights())

    def _write_model(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        self.model.save_pretrained(folder, state_dict=weights)
        self.renderer.tokenizer.save_pretrained(folder)

    def _rehearse_save(self) -> None:
        """Write the model's files and drop them, so that what fails later fails before a step."""
        weights = self._whole_weights()
        if rank_and_size()[0] == 0:
            root = self.config.run.output / "checkpoints"
            checkpoint.rehearse(root, partial(self._write_model, weights=weights))

    def _save(self) -> None:
        config = self.config
        weights = self._whole_weights()
        learner = self.learner.state_dict()
        if rank_and_size()[0]:
            return
        checkpoint.save(
            config.run.output / "checkpoints",
            self.step,
            write_model=partial(self._write_model, weights=weights),
            state={
                "learner": learner,
                "random": torch.get_rng_state(),
                "seconds": self.seconds,
                "origin": self.origin,
                "environment": self.provenance,
                **({"rewards": self.collapse.history} if self.collapse else {}),
                **({"stage": asdict(self.curriculum)} if self.stages else {}),
                "in_flight": rollout_state.to_state(self.in_flight),
            },
            config=as_json(config),
            keep=config.run.keep,
            best=self._best_step(),
        )

    def _best_step(self) -> int | None:
        """The step after which an evaluation gave the highest reward; the first of several."""
        records = read_lines(self.config.run.output / METRICS)
        evaluated = [r for r in records if r["step"] and r.get("eval/reward") is not None]
        return max(evaluated, key=lambda r: r["eval/reward"])["step"] if evaluated else None

    def _roll_back(self, best: int) -> str:
        """Go back to the newest checkpoint up to step ``best``; returns a message for the log.

        Raises:
            CollapseError: the configuration says stop, or there is no such checkpoint.
        """
        run = self.config.run
        good = checkpoint.latest(run.output / "checkpoints", up_to=best)
        what = (
            f"the reward collapsed: at step {self.step} it is below {run.collapse:g} of its best "
            f"average, that of step {best}; the newest checkpoint up to there is {good or 'none'}"
        )
        if run.on_collapse == "stop" or good is None or self.collapse is None:
            raise CollapseError(what)
        saved = checkpoint.load(good)
        with torch.no_grad():
            if not self.learner.has_adapters:
                self.model.load_state_dict(load_model(good, device="cpu").state_dict())
            self.learner.load_state_dict(saved.state["learner"])
        self.engine.load_weights(self.learner.weights(), version=self.step)
        self.in_flight.clear()
        self.collapse.history.clear()
        return f"{what}; the run continues from it"

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Find the newest checkpoint of this run, the same on all ranks, and take up its step."""
        run, output = self.config.run, self.config.run.output
        newest = checkpoint.latest(output / "checkpoints")
        if len(set(gather([newest]))) > 1:
            message = f"the ranks see different checkpoints in {output}; share the folder"
            raise CheckpointError(message)
        if newest:
            saved = checkpoint.load(newest)
            with checkpoint.restoring(saved):
                require(saved.config, RunFormat)
                require(saved.state, StateFormat)
            self.step, self.seconds = saved.step, float(saved.state["seconds"])
            found = changes(saved.config, self.config, same_environment=True)  # so far
            require_same(found, output, override=run.override)
            return saved
        started = output / "config.json"
        if started.exists() and read_lines(output / METRICS):
            mend = f"remove it, or give another --output than {output}"
            found = changes(read_object(started, CheckpointError, mend), self.config)
            require_same(found, output, override=run.override)
        return None

    def _finished(self) -> str:
        """Why the run is finished; empty while it is not."""
        run = self.config.run
        if self.step >= run.steps:
            return f"{self.step} steps are done; give more --steps to continue"
        if run.time_limit is not None and self.seconds >= run.time_limit:
            return (
                f"its {run.time_limit:g} s are over, {self.step} steps are done; "
                "give a longer --time-limit"
            )
        return ""

    def _summary(self, message: str, number: int = 0) -> TrainSummary:
        """Summarize from the logs, so that a finished run reports the same numbers again."""
        output = self.config.run.output
        records, timings = read_lines(output / METRICS), read_lines(output / TIMINGS)
        numbers: dict[str, float | str] = {"steps": records[-1]["step"] if records else 0}
        if timings:
            numbers["seconds of training"] = timings[-1]["seconds"]
        for name in dict.fromkeys(name for record in records for name in record):
            if name == "reward" or name.startswith(("env/", "eval/")):
                values = [r[name] for r in records if r.get(name) is not None]
                if values:
                    numbers |= {f"{name} first": values[0], f"{name} last": values[-1]}
        newest = checkpoint.latest(output / "checkpoints")
        numbers |= {
            "model": str(newest or ""),
            "logs": str(output / METRICS),
            "tensorboard": str(output / "tensorboard"),
        }
        return TrainSummary(message, numbers, number)


def _require_one_process(config: TrainConfig) -> None:
    """Refuse under torchrun what works in one process only."""
    run = config.run
    if rank_and_size()[1] == 1:
        return
    if run.collapse is not None and run.on_collapse == "rollback":
        raise ConfigError("--on-collapse rollback works in one process only; stop, and start again")
    if config.sampling.max_staleness:
        raise ConfigError("--max-staleness works in one process only; leave it at 0 with torchrun")
    if config.sampling.tree_branches:
        raise ConfigError("--tree-branches works in one process only; leave it at 0 with torchrun")


def _starting_model(model: str) -> str:
    """The model to start from; of another run's folder its newest checkpoint."""
    newest = checkpoint.latest(Path(model).expanduser() / "checkpoints")
    return str(newest) if newest else model


def _saved_origin(saved: Checkpoint, model: str) -> str:
    """The model that a saved run began with, if the configuration leads there too.

    Raises:
        CheckpointError: the checkpoint names another model. It may come from somebody else, and
            must not make a run load what nobody asked for.
    """
    origin = str(saved.state["origin"])
    own_checkpoints = Path(model).expanduser() / "checkpoints"
    if origin != model and Path(origin).parent != own_checkpoints:
        raise CheckpointError(
            f"{saved.folder} began with the model {origin!r}, which --model {model} does not name; "
            f"give --model {origin} if you trust it"
        )
    return origin


def _episodes(first: int, tasks: int, samples: int) -> list[Episode]:
    return [(task, sample) for task in range(first, first + tasks) for sample in range(samples)]


def _groups(trajectories: Sequence[Trajectory]) -> list[Group]:
    """The samples of each task without void ones; a task with none left has no group."""
    usable = (trajectory for trajectory in trajectories if not trajectory.void)
    return [Group(episode, list(ts)) for episode, ts in groupby(usable, lambda t: t.episode)]


@contextmanager
def saved_for_inspection(
    output: Path, step: int, trajectories: Sequence[Trajectory]
) -> Iterator[None]:
    """If a number is not finite, write the trajectories that led to it to a file.

    Args:
        output: folder of the run. A new file in its ``failures`` gets the cause and the
            trajectories with tokens and log-probabilities. Nothing there is overwritten.
        step: training steps done.
        trajectories: those of the step.

    Raises:
        NonFiniteError: the original error; its message names the file.
    """
    try:
        yield
    except NonFiniteError as error:
        if rank_and_size()[0]:
            raise
        folder = output / "failures"
        folder.mkdir(exist_ok=True)
        names = (folder / f"step-{step + 1:06d}-{n}.json" for n in range(1, 10_000))
        path = next(name for name in names if not name.exists())
        record = {
            "step": step + 1,
            "cause": str(error),
            "trajectories": [
                {**as_record(trajectory), "segments": [asdict(s) for s in trajectory.segments]}
                for trajectory in trajectories
            ],
        }
        path.write_text(json.dumps(record, default=str), encoding="utf-8")
        message = (
            f"step {step + 1}: {error}. The trajectories are in {path}; the last checkpoint is "
            f"{checkpoint.latest(output / 'checkpoints') or 'none'}"
        )
        raise NonFiniteError(message) from error


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list; a second SIGINT exits at once.

    Outside the main thread Python delivers no signals, and the list stays empty.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:  # a scheduler may send SIGTERM more than once
            raise KeyboardInterrupt
        seen.append(number)
        print("\nstopping after this step; once more to leave at once", file=sys.stderr)

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
