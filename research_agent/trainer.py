"""Training: collect, credit, learn, sync, log, save. Then again.

A step depends on its number, the weights, the optimizer's state and torch's random state. A
checkpoint holds these, so a killed run continues to the same bits. With ``max_staleness`` above 0
another process plays the episodes of later steps meanwhile: the checkpoint also holds the episodes
in flight, and timing decides which weights sample which tokens.

With several ranks (``torchrun``) every rank runs this file. A block under ``together`` may fail on
some ranks only, one under ``alike`` fails on all of them; either way rank 0 says why and all stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch

from research_agent import checkpoint, step_metrics
from research_agent.active_rollout import EpisodeKey
from research_agent.algorithms import make_algorithm
from research_agent.algorithms.base import SelectsGroups
from research_agent.checkpoint import Checkpoint
from research_agent.config import RolloutConfig, TrainConfig, as_json
from research_agent.config_changes import rolls_back
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
from research_agent.engines import make_engine
from research_agent.engines.base import ServerBacked
from research_agent.engines.spec import has_servers
from research_agent.errors import (
    CollapseError,
    ConfigError,
    TooManyVoidError,
)
from research_agent.evaluation.evaluate import record_evaluation
from research_agent.evaluation.predictions import as_record
from research_agent.failures import saved_for_inspection
from research_agent.learner import Learner
from research_agent.models.deferred import load_deferred
from research_agent.models.lora import merged
from research_agent.models.policy import (
    episode_context,
    find_device,
    load_model,
    require_ends,
    save_settings,
)
from research_agent.models.source import model_source, starting_model
from research_agent.player import Player
from research_agent.player_process import PlayerProcess, connect_engine, load_engine
from research_agent.renderer import open_renderer
from research_agent.run_folder import (
    TrainSummary,
    best_step,
    newest_checkpoint,
    output_lock,
    require_same_run,
    restoring,
    saved_origin,
    summarize,
    write_config,
)
from research_agent.run_logger import RunLogger, wandb_run
from research_agent.sharded import write_weights
from research_agent.system.signals import stop_signals
from research_agent.trace import Trace, span
from research_agent.trajectory import NOT_GROWN, Group, Trajectory


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
        curriculum: how far the run has come in its stages.
        rollback_steps: steps whose checkpoints a collapsed run may go back to, the ``keep`` newest.
            Those of an evaluation or a stopped run are not among them: they change no result.

    ``train`` sets these too:
        player: plays this rank's episodes: environments, and the engine that samples.
        fingerprints: what the environment says that its episodes depend on.
        origin: the model that the run began with.
        renderer: the policy's tokenizer.
        model: the policy that learns.
        learner: updates the policy.
        stages: parts of the run with environment arguments of their own; usually none.
        collapse_monitor: notices a collapse of the reward, if the configuration asks for it.
        trace: timeline of the run, on rank 0 if the configuration asks for it.

    Raises:
        ConfigError: a setting has a value that cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        validate(config)
        self.config = config
        self.step = 0
        self.seconds = 0.0
        self.curriculum = CurriculumState()
        self.rollback_steps: list[int] = []

    def train(self) -> TrainSummary:
        """Train until the steps or the time are used up, continuing what the output folder holds.

        Returns:
            How the run ended. A run that was asked to stop by a signal says which one.

        Raises:
            CheckpointError: the folder holds a run of another configuration, or cannot be written.
            CollapseError: the reward collapsed and the configuration says stop.
            ConfigError: the environment, model or algorithm refuses its settings.
            FolderInUseError: another run writes to the output folder.
            TooManyVoidError: more episodes were void than ``max_void_fraction`` allows. The state
                is saved.
        """
        run = self.config.run
        with ExitStack() as stack:
            signals = stack.enter_context(stop_signals())
            stack.enter_context(init_distributed(run.collective_timeout))
            with together():  # one run per folder
                if rank_and_size()[0] == 0:
                    stack.enter_context(output_lock(run.output))
            saved = newest_checkpoint(self.config)
            if saved:
                self.step, self.seconds = saved.step, float(saved.state["seconds"])
            if finished := broadcast_object(self._finished()):
                return summarize(run.output, self.step, f"{run.output} is finished: {finished}")
            self._open(saved, stack)
            with together():
                logger = stack.enter_context(self._logger(saved))
            if run.eval_every and not saved:
                metrics = self._evaluate()  # how good the policy is before its first step
                with together():
                    if logger:
                        logger.record(0, metrics, {"seconds": 0.0})

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
                with together():
                    is_best = logger is not None and self._log(
                        logger, metrics, timings, trajectories
                    )

                # A collapsed run stops or goes back; a finished stage gives way to the next.
                turning_point = self._watch(
                    metrics.get("reward"), learned_from=bool(groups), logger=logger
                )

                # Save.
                due = self.step % run.save_every == 0
                if broadcast_object(due or is_best or turning_point):
                    self._save(for_rollback=due or turning_point)
            self._save()

        if finished:
            return summarize(run.output, self.step, f"{run.output} is finished: {finished}")
        message = f"stopped after step {self.step} of {run.steps}; the same command continues it"
        return summarize(run.output, self.step, message, signals[0] if signals else 0)

    # The parts of a step, in the order of ``train``.

    def _collect(self) -> tuple[list[Trajectory], list[Group]]:
        """Play the tasks of a step; returns all episodes, and the groups to learn from.

        An algorithm that selects groups reserves as many tasks per step as its rounds can need. A
        step leaves out those that it does not need, so its tasks never depend on other steps.
        Until the next call the player plays the tasks of the next ``max_staleness`` steps.
        """
        rollout, algorithm = self.config.rollout, self.learner.algorithm
        selects = algorithm if isinstance(algorithm, SelectsGroups) else None
        later = self._own_episodes(range(self.step + 1, self.step + rollout.max_staleness + 1))
        next_task = self._first_task(self.step)
        played: list[Trajectory] = []
        groups: list[Group] = []
        for _ in range(self._rounds):
            missing = rollout.prompts_per_step - len(groups)
            episodes = _episodes(next_task, missing, rollout.group_size)
            next_task += missing
            # Each rank plays its share, and all learn from all.
            work = partial(self.player.collect, _share(episodes, rollout), later)
            trajectories = [t for t in _in_order(run_together(work)) if t.stop_reason != NOT_GROWN]
            played += trajectories
            for group in _groups(trajectories):
                if selects is None or selects.keeps([t.reward for t in group.trajectories]):
                    groups.append(group)
            void = step_metrics.void_fraction(played)
            too_many_void = void > self.config.algorithm.max_void_fraction
            if too_many_void or len(groups) == rollout.prompts_per_step:
                break
        return played, groups

    @property
    def _rounds(self) -> int:
        """Rounds of tasks that a step may play; more than one if the algorithm selects groups."""
        algorithm = self.learner.algorithm
        return algorithm.max_rounds if isinstance(algorithm, SelectsGroups) else 1

    def _first_task(self, step: int) -> int:
        """Number of the first task of a step."""
        return step * self.config.rollout.prompts_per_step * self._rounds

    def _own_episodes(self, steps: range) -> list[EpisodeKey]:
        """This rank's share of the episodes of steps, without those of later rounds."""
        rollout = self.config.rollout
        return [
            episode
            for first in map(self._first_task, steps)
            for episode in _share(
                _episodes(first, rollout.prompts_per_step, rollout.group_size), rollout
            )
        ]

    def _require_few_void(self, trajectories: Sequence[Trajectory]) -> None:
        """Stop the run, with its state saved, if too many episodes of a step are void."""
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

    def _sync(self) -> None:
        """Give the sampler the learner's weights, in the number format that it samples with."""
        dtype = torch.bfloat16 if self.config.learner.precision == "bfloat16" else None
        weights = self.learner.weights(dtype)
        self.player.load_weights(weights, version=self.step)

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
        metrics: dict[str, float] = {}
        with together():
            if rank == 0:
                folder = run.output / "evaluations" / f"step-{self.step:06d}"
                summary = record_evaluation(played, folder, self.renderer, self.player.shows())
                if summary.episodes:  # otherwise all are void
                    metrics = {"reward": summary.reward, **summary.metrics}
        return step_metrics.prefixed("eval", metrics)

    def _log(
        self,
        logger: RunLogger,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        trajectories: Sequence[Trajectory],
    ) -> bool:
        """Log a step; returns whether its evaluation is the best so far."""
        run = self.config.run
        shown = [as_record(each) for each in trajectories[: run.log_episodes]]
        logger.record(self.step, metrics, timings, shown)
        return "eval/reward" in metrics and self.step == best_step(run.output)

    def _watch(self, reward: float | None, *, learned_from: bool, logger: RunLogger | None) -> bool:
        """Note the reward of a step; returns whether the run went back or began its next stage."""
        good_step = None  # the step that a collapsed run goes back to
        if self.collapse_monitor and learned_from and reward is not None:
            good_step = self.collapse_monitor.add(self.step, reward)
        if good_step is not None:
            message = self._roll_back(good_step)
            if logger:
                logger.print(message)
            return True
        next_stage = self.curriculum.advance(self.stages, reward)
        if next_stage:
            self._start_stage()
        return next_stage

    def _roll_back(self, good_step: int) -> str:
        """Go back to the newest checkpoint up to a step; returns a message for the log.

        Raises:
            CollapseError: the configuration says stop, or there is no such checkpoint.
        """
        run = self.config.run
        up_to = good_step
        if rolls_back(run):
            up_to = max((step for step in self.rollback_steps if step <= good_step), default=-1)
        # Ranks may see a shared folder at different times: they go where the first one goes.
        folder = broadcast_object(checkpoint.latest(run.output / "checkpoints", up_to=up_to))
        message = (
            f"the reward collapsed: at step {self.step} it is below {run.collapse:g} of its best "
            f"average, that of step {good_step}; the newest checkpoint up to there is "
            f"{folder or 'none'}"
        )
        if run.on_collapse == "stop" or folder is None or self.collapse_monitor is None:
            raise_together(CollapseError(message))
        saved = checkpoint.load(folder, deferred=("learner",))
        if not self.learner.has_adapters:
            self.learner.load_weights(folder)
        self.learner.load_state_dict(saved.state["learner"], saved.read)
        stage = self.curriculum.stage
        self.curriculum = CurriculumState(**saved.state.get("stage", {}))
        if self.curriculum.stage != stage:
            self._start_stage()
        with together():
            self.player.clear()
        self._sync()
        self.collapse_monitor.history.clear()
        return f"{message}; the run continues from it"

    def _start_stage(self) -> None:
        """Open the stage's environments; its rewards are not compared with those of another."""
        with together():
            self.player.open_stage(self._stage_args())
            self.fingerprints = self.player.fingerprints()
        if self.collapse_monitor:
            self.collapse_monitor.history.clear()

    def _stage_args(self) -> Mapping[str, Any]:
        """Arguments of the environment that the present stage adds."""
        return self.stages[self.curriculum.stage].env_args if self.stages else {}

    def _save(self, *, for_rollback: bool = False) -> None:
        """Write the checkpoint of the present step; ``for_rollback`` as in ``rollback_steps``."""
        config = self.config
        if for_rollback and rolls_back(config.run):
            self.rollback_steps = [*self.rollback_steps, self.step][-config.run.keep :]
        checkpoint.save(
            config.run.output / "checkpoints",
            self.step,
            write_model=self._write_model,
            state={
                "learner": self.learner.state_dict(),
                "random": torch.get_rng_state(),
                "seconds": self.seconds,
                "origin": self.origin,
                "environment": self.fingerprints,
                **({"rewards": monitor.history} if (monitor := self.collapse_monitor) else {}),
                **({"stage": asdict(self.curriculum)} if self.stages else {}),
                **({"rollback_steps": self.rollback_steps} if rolls_back(config.run) else {}),
                "in_flight": run_together(self.player.state),
            },
            config=as_json(config),
            keep=config.run.keep,
            best=best_step(config.run.output),
            also_keep=self.rollback_steps,
            bucket_bytes=config.learner.bucket_bytes,
        )

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
        weights = dict(merged(self.model)) if self.learner.has_adapters else None
        self.model.save_pretrained(folder, state_dict=weights)
        self.renderer.tokenizer.save_pretrained(folder)

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

    # What is made before the first step.

    def _open(self, saved: Checkpoint | None, stack: ExitStack) -> None:
        """Make everything that a step uses, with the weights and states of a checkpoint."""
        config, rollout, run = self.config, self.config.rollout, self.config.run
        rank, size = rank_and_size()
        torch.manual_seed(run.seed)
        with alike():
            algorithm = make_algorithm(
                config.algorithm.algorithm, **config.algorithm.algorithm_args
            )
        with together():
            self.trace = Trace(run.trace) if run.trace and rank == 0 else None
        if self.trace:
            stack.callback(self.trace.close)
        self.stages = parse_stages(rollout.stages)
        if saved and self.stages:
            with alike(), restoring(saved, config):
                self.curriculum = CurriculumState(**saved.state.get("stage", {}))
                self._stage_args()
        self.collapse_monitor = None if run.collapse is None else CollapseMonitor(run.collapse)

        # The player has as many environments as this process has episodes in flight.
        tree = rollout.tree_plan.size
        share = -(-rollout.prompts_per_step * rollout.group_size // (size * tree)) * tree
        slots = min(share * (1 + rollout.max_staleness), config.sampling.max_in_flight or share)
        today = broadcast_object(date.today().isoformat())
        with together():
            kind = PlayerProcess if rollout.max_staleness else Player
            self.player: Player | PlayerProcess = kind(
                config, slots, self._stage_args(), self.trace
            )
            stack.callback(self.player.close)
            self.fingerprints = self.player.fingerprints()
            changed = require_same_run(saved, config, self.fingerprints) if saved else None

            # Policy: the model that learns, its reference, and the engine that samples.
            self.origin = starting_model(config.policy.model)
            if saved:
                self.origin = saved_origin(saved, config)
            self._load_renderer(saved, today)
            adapter = self._load_policy(saved)
            reference = None
            if algorithm.needs_reference and (adapter is not None or not config.learner.lora_rank):
                reference = self._load(self.origin, is_reference=True)
        self._start_player(slots, merge_adapter=adapter is None)
        with alike():
            self.learner: Learner = Learner(
                self.model,
                algorithm,
                config.learner,
                reference=reference,
                adapter=adapter,
                temperature=config.sampling.temperature,
                device=self._device,
                trees=rollout.tree_branches > 0,
            )
        if not saved:
            checkpoint.rehearse(run.output / "checkpoints", self._write_model)
        else:
            self._restore(saved)
        # Otherwise the engine samples with the learner's weights already.
        if saved or adapter is not None or rollout.max_staleness or size > 1:
            self._sync()
        if saved and rollout.max_staleness >= saved.config["rollout"]["max_staleness"] > 0:
            steps = range(self.step, self.step + rollout.max_staleness + 1)
            with together(), restoring(saved, config):
                self.player.restore(saved.state["in_flight"], self._own_episodes(steps))
        with together():
            write_config(self.config, self.step, changed)

    @property
    def _device(self) -> torch.device:
        """Where this rank learns."""
        return torch.device(find_device(self.config.policy.device))

    def _load_renderer(self, saved: Checkpoint | None, today: str) -> None:
        """Open the tokenizer. Its chat template writes the day on which the run started."""
        policy = self.config.policy
        first_day = saved.config["policy"].get("chat_template_date") if saved else None
        self.renderer = open_renderer(policy, self.origin, first_day or today)
        written = self.renderer.chat_template_date or None
        self.config = replace(self.config, policy=replace(policy, chat_template_date=written))

    def _load_policy(self, saved: Checkpoint | None) -> str | None:
        """Open the model that learns; returns the adapter that the learner trains, if any."""
        learner = self.config.learner
        adapter = None if learner.merge_adapter else model_source(self.origin).adapter
        if saved and adapter is None and not learner.lora_rank:
            self.model: Any = self._load(saved.folder)
        else:
            self.model = self._load(self.origin, merge_adapter=adapter is None)
        require_ends(self.model, self.renderer)
        return adapter

    def _load(
        self, name: str | Path, *, merge_adapter: bool = True, is_reference: bool = False
    ) -> Any:
        """Open a model: whole in one process, and without its weights on several ranks."""
        config = self.config
        if rank_and_size()[1] == 1:
            return load_model(name, device=config.policy.device, merge_adapter=merge_adapter)
        dtype = config.learner.precision if is_reference else "float32"
        return load_deferred(name, dtype=dtype, merge_adapter=merge_adapter)

    def _start_player(self, slots: int, *, merge_adapter: bool) -> None:
        """Make the engine in the player's process, or here if this process gives it weights.

        Args:
            slots: episodes played at the same time.
            merge_adapter: add an adapter to the weights of its base.
        """
        sampling, config, player = self.config.sampling, self.config, self.player
        # An engine in this process samples with the learner's own model, if that is not sharded.
        shares_model = isinstance(player, Player) and rank_and_size()[1] == 1
        if not has_servers(sampling.engine) and not shares_model:
            load = partial(load_engine, make_engine, config, self.origin)
            with together():
                player.start(partial(load, slots=slots, merge_adapter=merge_adapter))
            return
        with alike():
            engine = make_engine(
                sampling.engine,
                self.model,
                self.renderer,
                max_slots=slots,
                max_context=episode_context(self.model, sampling),
                dtype=config.learner.precision,
                device=self._device,
            )
        if isinstance(player, Player):
            player.start(lambda: (engine, self.renderer))
            return
        assert isinstance(engine, ServerBacked)
        with together():
            player.start(
                partial(connect_engine, engine.engine_factory(), config, self.origin), engine
            )

    def _restore(self, saved: Checkpoint) -> None:
        """Load the states of the learner, the random generator and the collapse monitor."""
        with alike(), restoring(saved, self.config):
            self.learner.load_state_dict(saved.state["learner"], saved.read)
            torch.set_rng_state(saved.state["random"])
            if self.collapse_monitor:
                history = [(int(s), float(r)) for s, r in saved.state.get("rewards", ())]
                self.collapse_monitor.history = history
            if rolls_back(self.config.run):
                steps = saved.state.get("rollback_steps", [saved.step])
                self.rollback_steps = [int(step) for step in steps]

    @contextmanager
    def _logger(self, saved: Checkpoint | None) -> Iterator[RunLogger | None]:
        """Open the logs; None on every rank but the first."""
        if rank_and_size()[0]:
            yield None
            return
        run = self.config.run
        wandb = None
        if run.wandb is not None:
            wandb = wandb_run(run.wandb, run.output, as_json(self.config))
        with RunLogger(
            run.output, self.step, run.steps, show=not run.quiet, fresh=not saved, wandb=wandb
        ) as logger:
            begin = f"continuing after step {self.step}" if saved else "starting"
            logger.print(f"{run.output}: {begin}")
            yield logger


def _episodes(first: int, tasks: int, samples: int) -> list[EpisodeKey]:
    """All samples of some tasks, from the task ``first`` on."""
    return [(task, sample) for task in range(first, first + tasks) for sample in range(samples)]


def _share(episodes: Sequence[EpisodeKey], rollout: RolloutConfig) -> list[EpisodeKey]:
    """The episodes that this rank of n plays: every n-th one, or every n-th whole tree."""
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
