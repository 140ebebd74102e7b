"""Training: collect, credit, learn, sync, log, save. Then again.

A step depends on its number, the weights, the optimizer's state and torch's random state. A
checkpoint holds these and nothing else, so a killed run continues to the same bits. With
``max_staleness`` above 0 the episodes of later steps are played in another process during a step.
Then the checkpoint also holds the episodes in flight, and their timing decides what is sampled.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch

from research_agent import checkpoint, step_metrics
from research_agent.active_rollout import Episode
from research_agent.algorithms import algorithm
from research_agent.algorithms.base import SelectsGroups
from research_agent.checkpoint import Checkpoint
from research_agent.config import RolloutConfig, TrainConfig, as_json
from research_agent.config_changes import changes, require_same
from research_agent.config_checks import validate
from research_agent.curriculum import CollapseMonitor, CurriculumState, parse_stages
from research_agent.distributed import (
    alike,
    broadcast_object,
    gather,
    init_distributed,
    raise_together,
    rank_and_size,
    run_together,
    together,
)
from research_agent.engines import has_servers, make_engine
from research_agent.engines.base import SamplesElsewhere
from research_agent.errors import (
    CheckpointError,
    CollapseError,
    ConfigError,
    TooManyVoidError,
)
from research_agent.evaluation.evaluate import record_evaluation
from research_agent.evaluation.predictions import as_record
from research_agent.failures import saved_for_inspection
from research_agent.formats import RunFormat, StateFormat, read_object, require
from research_agent.learner import Learner
from research_agent.models.deferred import load_deferred
from research_agent.models.policy import (
    context_length,
    find_device,
    load_model,
    require_ends,
    save_settings,
)
from research_agent.models.source import model_source, starting_model
from research_agent.player import Player
from research_agent.player_process import PlayerProcess, connect_engine, load_engine
from research_agent.renderer import open_renderer
from research_agent.run_logger import METRICS, TIMINGS, RunLogger, append, read_lines, wandb_run
from research_agent.sharded import write_weights
from research_agent.system.files import folder_lock, write_atomic
from research_agent.system.signals import stop_signals
from research_agent.system.terminal import show
from research_agent.trace import Trace, span
from research_agent.trajectory import NOT_GROWN, Group, Trajectory

CHANGES = "changes.jsonl"  # settings with which a run was continued


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """How a run ended."""

    message: str
    numbers: Mapping[str, float | str]
    signal: int = 0  # number of the signal that stopped the run early; 0: none did


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
            signals = stack.enter_context(stop_signals())
            stack.enter_context(init_distributed(run.collective_timeout))
            _lock(run.output, stack)
            saved = self._newest_checkpoint()
            if finished := broadcast_object(self._finished()):
                return self._summary(f"{run.output} is finished: {finished}")
            self._open(saved, stack)
            logger = stack.enter_context(self._logger(saved))
            if run.eval_every and not saved:
                self._evaluate_start(logger)

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
                    alike(),
                ):
                    learned = self.learner.update(groups)
                updated = time.perf_counter()

                # Sync. The next step is sampled with the new weights.
                self.step += 1
                self._sync()
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
                if run.eval_every and (finished or self.step % run.eval_every == 0):
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
                watched = self.collapse if groups else None
                best = watched.add(self.step, metrics["reward"]) if watched else None
                if best is not None:
                    message = self._roll_back(best)
                    if logger:
                        logger.print(message)
                next_stage = best is None and self.curriculum.advance(
                    self.stages, metrics["reward"]
                )
                if next_stage:
                    self._start_stage()

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
        config, rollout, run = self.config, self.config.rollout, self.config.run
        rank, size = rank_and_size()
        torch.manual_seed(run.seed)
        rule = algorithm(config.algorithm.algorithm, **config.algorithm.algorithm_args)
        self.trace = Trace(run.trace) if run.trace and rank == 0 else None
        if self.trace:
            stack.callback(self.trace.close)

        # The player has as many environments as this process has episodes in flight.
        self.stages = parse_stages(config.rollout.stages)
        self.curriculum = CurriculumState()
        if saved and self.stages:
            self.curriculum = CurriculumState(**saved.state.get("stage", {}))
        unit = rollout.tree_plan.size
        share = -(-rollout.prompts_per_step * rollout.group_size // (size * unit)) * unit
        slots = min(share * (1 + rollout.max_staleness), config.sampling.max_in_flight or share)
        today = broadcast_object(date.today().isoformat())
        with together():
            kind = PlayerProcess if rollout.max_staleness else Player
            self.player: Player | PlayerProcess = kind(
                config, slots, self._stage_args(), self.trace
            )
            stack.callback(self.player.close)
            self.provenance = self.player.provenance()
            if saved:
                self._require_same_run(saved)

            # Policy: the model that learns, its reference, and the engine that samples.
            self.origin = starting_model(config.policy.model)
            if saved:
                self.origin = checkpoint.saved_origin(saved, config.policy.model)
            adapter = self._load_policy(saved, today)
            if rank == 0:
                config_file = run.output / "config.json"
                write_atomic(config_file, json.dumps(as_json(self.config), indent=1) + "\n")
            reference = None
            if rule.needs_reference and (adapter is not None or not config.learner.lora_rank):
                reference = self._load(self.origin, is_reference=True)
        self._start_player(slots, merge_adapter=adapter is None)
        with alike():
            self.learner = Learner(
                self.model,
                rule,
                config.learner,
                reference=reference,
                adapter=adapter,
                temperature=config.sampling.temperature,
                device=torch.device(find_device(config.policy.device)),
                trees=rollout.tree_branches > 0,
            )
        del reference
        if not saved:
            checkpoint.rehearse(run.output / "checkpoints", self._write_model)

        self.collapse = None if run.collapse is None else CollapseMonitor(run.collapse)
        if saved:
            with alike(), checkpoint.restoring(saved):
                self._restore(saved)
        if saved or adapter is not None or rollout.max_staleness or size > 1:
            self._sync()
        if saved and rollout.max_staleness >= saved.config["rollout"]["max_staleness"] > 0:
            steps = range(self.step, self.step + rollout.max_staleness + 1)
            with together(), checkpoint.restoring(saved):
                self.player.restore(saved.state["in_flight"], self._own_episodes(steps))

    def _restore(self, saved: Checkpoint) -> None:
        """Load the states of the learner, the random generator and the collapse monitor."""
        self.learner.load_state_dict(saved.state["learner"], saved.read)
        torch.set_rng_state(saved.state["random"])
        if self.collapse:
            self.collapse.history = [(int(s), float(r)) for s, r in saved.state["rewards"]]

    def _load_policy(self, saved: Checkpoint | None, today: str) -> str | None:
        """Open tokenizer and model; returns the adapter that the learner trains, if any."""
        config = self.config
        self._load_renderer(saved, today)
        adapter = None if config.learner.merge_adapter else model_source(self.origin).adapter
        if saved and adapter is None and not config.learner.lora_rank:
            self.model = self._load(saved.folder)
        else:
            self.model = self._load(self.origin, merge_adapter=adapter is None)
        require_ends(self.model, self.renderer)
        return adapter

    def _load_renderer(self, saved: Checkpoint | None, today: str) -> None:
        """Open the tokenizer. Its chat template writes the day on which the run started."""
        policy = self.config.policy
        before = saved.config["policy"].get("chat_template_date") if saved else None
        self.renderer = open_renderer(policy, self.origin, before or today)
        written = self.renderer.chat_template_date or None
        self.config = replace(self.config, policy=replace(policy, chat_template_date=written))

    def _load(
        self, name: str | Path, *, merge_adapter: bool = True, is_reference: bool = False
    ) -> Any:
        """Open a model: whole in one process, and without its weights on several ranks."""
        config = self.config
        if rank_and_size()[1] == 1:
            return load_model(name, device=config.policy.device, merge_adapter=merge_adapter)
        dtype = config.learner.precision if is_reference else "float32"
        return load_deferred(name, dtype=dtype, merge_adapter=merge_adapter)

    def _sync(self) -> None:
        """Give the sampler the learner's weights, in the number format that it samples with."""
        half = self.config.learner.precision == "bfloat16"
        weights = self.learner.weights(torch.bfloat16 if half else None)
        self.player.load_weights(weights, version=self.step)

    def _stage_args(self) -> Mapping[str, Any]:
        """Arguments of the environment that the present stage adds."""
        return self.stages[self.curriculum.stage].env_args if self.stages else {}

    def _start_player(self, slots: int, *, merge_adapter: bool) -> None:
        """Make the engine in the player's process, or here if this process gives it weights."""
        sampling, config, player = self.config.sampling, self.config, self.player
        here = isinstance(player, Player) and rank_and_size()[1] == 1
        # Otherwise the model here is sharded, or in another process than the player.
        if not has_servers(sampling.engine) and not here:
            load = partial(load_engine, make_engine, config, self.origin)
            with together():
                player.start(partial(load, slots=slots, merge_adapter=merge_adapter))
            return
        engine = make_engine(
            sampling.engine,
            self.model,
            self.renderer,
            max_slots=slots,
            max_context=context_length(self.model, sampling.max_prompt + sampling.max_response),
            dtype=config.learner.precision,
        )
        if isinstance(player, Player):
            player.start(lambda: (engine, self.renderer))
            return
        assert isinstance(engine, SamplesElsewhere)
        with together():
            player.start(partial(connect_engine, engine.elsewhere(), config, self.origin), engine)

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

    def _start_stage(self) -> None:
        """Open the stage's environments; its rewards are not compared with those of another."""
        with together():
            self.player.open_stage(self._stage_args())
            self.provenance = self.player.provenance()
        if self.collapse:
            self.collapse.history.clear()

    @contextmanager
    def _logger(self, saved: Checkpoint | None) -> Iterator[RunLogger | None]:
        """Open the logs; None on every rank but the first."""
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
            yield logger

    def _collect(self) -> tuple[list[Trajectory], list[Group]]:
        """Play the tasks of a step; returns all episodes, and the groups to learn from.

        An algorithm that selects groups reserves as many tasks per step as its rounds can need. A
        step leaves out those that it does not need, so its tasks never depend on other steps.
        Until the next call the player plays the tasks of the next ``max_staleness`` steps.
        """
        rollout, rule = self.config.rollout, self.learner.algorithm
        selects = rule if isinstance(rule, SelectsGroups) else None
        rounds = selects.max_rounds if selects else 1
        tasks_per_step = rollout.prompts_per_step * rounds
        later = self._own_episodes(range(self.step + 1, self.step + rollout.max_staleness + 1))
        next_task = self.step * tasks_per_step
        played: list[Trajectory] = []
        groups: list[Group] = []
        for _ in range(rounds):
            missing = rollout.prompts_per_step - len(groups)
            episodes = _episodes(next_task, missing, rollout.group_size)
            next_task += missing
            # Each rank plays its share, and all learn from all.
            work = partial(self.player.collect, _share(episodes, rollout), later)
            together = _in_order(run_together(work))
            trajectories = [t for t in together if t.stop_reason != NOT_GROWN]
            played += trajectories
            for group in _groups(trajectories):
                if selects is None or selects.keeps([t.reward for t in group.trajectories]):
                    groups.append(group)
            too_many_void = (
                step_metrics.void_fraction(played) > self.config.algorithm.max_void_fraction
            )
            if too_many_void or len(groups) == rollout.prompts_per_step:
                break
        return played, groups

    def _own_episodes(self, steps: range) -> list[Episode]:
        """This rank's share of the episodes of steps, without those of later rounds."""
        rollout, rule = self.config.rollout, self.learner.algorithm
        rounds = rule.max_rounds if isinstance(rule, SelectsGroups) else 1
        prompts, samples = rollout.prompts_per_step, rollout.group_size
        firsts = [step * prompts * rounds for step in steps]
        return [
            episode
            for first in firsts
            for episode in _share(_episodes(first, prompts, samples), rollout)
        ]

    def _require_few_void(self, trajectories: Sequence[Trajectory]) -> None:
        limit = self.config.algorithm.max_void_fraction
        fraction = step_metrics.void_fraction(trajectories)
        if fraction <= limit:
            return
        with together():
            self.player.clear()  # many of these episodes are void too
        self._save()
        raise_together(
            TooManyVoidError(
                f"{fraction:.0%} of the episodes of step {self.step + 1} were void, more than "
                f"--max-void-fraction {limit:.0%}: something that the environment needs is down. "
                f"Step {self.step} is saved in {self.config.run.output}; "
                "the same command continues when it is up"
            )
        )

    def _evaluate_start(self, logger: RunLogger | None) -> None:
        """Record how good the policy is before its first step."""
        metrics = self._evaluate()
        if logger:
            logger.record(0, metrics, {"seconds": 0.0})

    def _evaluate(self) -> dict[str, float]:
        """Play the held-out tasks with the present weights, each rank its share.

        Raises:
            ConfigError: the environment does not say how many tasks it has, and no limit is given.
        """
        run, (rank, size) = self.config.run, rank_and_size()
        tasks = run_together(self.player.num_eval_tasks)[rank]
        counts = [n for n in (tasks, run.eval_limit) if n is not None]
        if not counts:
            message = "this environment has no last task; say how many with --eval-limit"
            raise_together(ConfigError(message))
        work = partial(self.player.evaluate, _episodes(0, min(counts), 1)[rank::size])
        played = _in_order(run_together(work))
        found: dict[str, float] = {}
        with together():
            if rank == 0:
                folder = run.output / "evaluations" / f"step-{self.step:06d}"
                summary = record_evaluation(played, folder)
                if summary.episodes:  # otherwise all are void
                    found = {"reward": summary.reward, **summary.metrics}
        return step_metrics.prefixed("eval", found)

    def _write_model(self, folder: Path) -> None:
        """Write the policy and its tokenizer as transformers reads them; all ranks take part."""
        rank, size = rank_and_size()
        if size > 1:
            write_weights(folder, self.learner.weight_buckets())
            with together():
                if rank == 0:
                    save_settings(self.model, folder)
                    self.renderer.tokenizer.save_pretrained(folder)
            return
        weights = dict(self.learner.weights()) if self.learner.has_adapters else None
        self.model.save_pretrained(folder, state_dict=weights)
        self.renderer.tokenizer.save_pretrained(folder)

    def _save(self) -> None:
        config = self.config
        checkpoint.save(
            config.run.output / "checkpoints",
            self.step,
            write_model=self._write_model,
            state={
                "learner": self.learner.state_dict(),
                "random": torch.get_rng_state(),
                "seconds": self.seconds,
                "origin": self.origin,
                "environment": self.provenance,
                **({"rewards": self.collapse.history} if self.collapse else {}),
                **({"stage": asdict(self.curriculum)} if self.stages else {}),
                "in_flight": run_together(self.player.state),
            },
            config=as_json(config),
            keep=config.run.keep,
            best=self._best_step(),
            bucket_bytes=config.learner.bucket_bytes,
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
            raise_together(CollapseError(what))
        saved = checkpoint.load(good, deferred=("learner",))
        if not self.learner.has_adapters:
            self.learner.load_weights(good)
        self.learner.load_state_dict(saved.state["learner"], saved.read)
        stage = self.curriculum.stage
        self.curriculum = CurriculumState(**saved.state.get("stage", {}))
        if self.curriculum.stage != stage:
            self._start_stage()
        with together():
            self.player.clear()
        self._sync()
        self.collapse.history.clear()
        return f"{what}; the run continues from it"

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Find the newest checkpoint, the same on all ranks, and continue from its step."""
        run, output = self.config.run, self.config.run.output
        newest = checkpoint.latest(output / "checkpoints")
        if len(set(gather([newest]))) > 1:
            message = f"the ranks see different checkpoints in {output}; share the folder"
            raise_together(CheckpointError(message))
        if newest:
            saved = checkpoint.load(newest, deferred=("learner",))
            with alike(), checkpoint.restoring(saved):
                require(saved.config, RunFormat)
                require(saved.state, StateFormat)
            self.step, self.seconds = saved.step, float(saved.state["seconds"])
            with alike():
                # The environments are compared once they are open.
                found = changes(saved.config, self.config, same_environment=True)
                require_same(found, output, override=run.override)
            return saved
        started = output / "config.json"
        with together():
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


def _lock(output: Path, stack: ExitStack) -> None:
    """Keep other runs out of a folder until ``stack`` ends."""
    with together():
        if rank_and_size()[0] == 0:
            stack.enter_context(folder_lock(output))


def _episodes(first: int, tasks: int, samples: int) -> list[Episode]:
    return [(task, sample) for task in range(first, first + tasks) for sample in range(samples)]


def _share(episodes: Sequence[Episode], rollout: RolloutConfig) -> list[Episode]:
    """The episodes that this rank plays: every n-th one, or every n-th whole tree."""
    rank, size = rank_and_size()
    unit = rollout.tree_plan.size
    return [each for place, each in enumerate(episodes) if place // unit % size == rank]


def _in_order(parts: Sequence[Sequence[Trajectory]]) -> list[Trajectory]:
    """The trajectories of all ranks, by episode and sample."""
    return sorted(chain.from_iterable(parts), key=lambda t: (t.episode, t.sample))


def _groups(trajectories: Sequence[Trajectory]) -> list[Group]:
    """The samples of each task without void ones; a task with none left has no group."""
    usable = (trajectory for trajectory in trajectories if not trajectory.void)
    return [Group(episode, list(ts)) for episode, ts in groupby(usable, lambda t: t.episode)]
