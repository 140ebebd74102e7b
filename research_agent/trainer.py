"""Training: collect, credit, learn, sync, log, save. Then again.

Everything that a step depends on is its number, the weights, and the optimiser's and torch's state;
a checkpoint holds just these, so a run that was killed continues to the same bits. Where collection
runs ahead of learning, the episodes under way are kept with them.
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
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from research_agent import checkpoint, rollout_state
from research_agent.algorithms import algorithm
from research_agent.algorithms.base import SelectsGroups
from research_agent.checkpoint import Checkpoint
from research_agent.collapse import CollapseMonitor
from research_agent.config import TrainConfig, as_json, require_same, validate
from research_agent.curriculum import CurriculumState, Stage, parse_stages
from research_agent.distributed import broadcast_object, gather, init_distributed, rank_and_size
from research_agent.engines import make_engine
from research_agent.engines.base import Engine
from research_agent.environments import Environments, make_environments
from research_agent.errors import (
    CheckpointError,
    CollapseError,
    ConfigError,
    NonFiniteError,
    ResearchAgentError,
    TooManyVoidError,
)
from research_agent.evaluation.evaluate import as_record, evaluate
from research_agent.files import write_atomic
from research_agent.learner import Learner
from research_agent.models.policy import load_model, require_ends
from research_agent.models.source import model_source, resolve_model
from research_agent.renderer import Renderer, load_renderer
from research_agent.rollout import Episode, InFlight, collect
from research_agent.run_logger import METRICS, TIMINGS, RunLogger, read_lines
from research_agent.trace import Trace, TracedEngine, TracedEnvironments, span
from research_agent.trajectory import Group, Trajectory


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """How a run ended."""

    message: str
    numbers: Mapping[str, float | str]
    signal: int = 0  # the one that asked the run to stop before its end


def train(config: TrainConfig) -> TrainSummary:
    """Train until the steps or the time are over, continuing what the output folder holds.

    Raises:
        CheckpointError: the folder holds a run of another configuration, or cannot be written.
        ConfigError: a setting has a value that cannot be used.
        TooManyVoidError: more episodes were void than ``max_void_fraction``; the state is saved.
    """
    validate(config)
    run = config.run
    with ExitStack() as stack:
        signals = stack.enter_context(_stop_signals())
        stack.enter_context(init_distributed())
        saved = _saved(config)
        step = saved.step if saved else 0
        seconds = float(saved.state["seconds"]) if saved else 0.0
        if over := broadcast_object(_over(config, step, seconds)):
            return _summary(config, f"{run.output} is finished: {over}")
        parts = stack.enter_context(_open(config, saved))
        tracker = stack.enter_context(_tracker(parts, saved))

        while not any(gather([bool(signals)])) and not over:
            start = time.perf_counter()

            # Collect. The tasks of a step are a function of its number.
            with saved_for_inspection(run.output, step, []), span(parts.trace, "collect"):
                trajectories, groups = _play(parts, step)
            collected = time.perf_counter()

            # Credit and learn. Advantages, weights and objective are the algorithm's.
            void_fraction = _void_fraction(trajectories)
            if void_fraction > config.algorithm.max_void_fraction:
                parts.in_flight.clear()  # much of it is void as well
                _save(parts, step, seconds)
                raise TooManyVoidError(_void_message(config, step, void_fraction))
            with saved_for_inspection(run.output, step, trajectories), span(parts.trace, "update"):
                learned = parts.learner.update(groups)
            updated = time.perf_counter()

            # Sync. The next step is sampled with the new weights.
            step += 1
            parts.engine.load_weights(parts.learner.weights(), version=step)
            end = time.perf_counter()
            seconds += end - start
            over = broadcast_object(_over(config, step, seconds))

            # Log.
            metrics = {
                **_describe(trajectories),
                **_staleness(groups, step - 1),
                **_stage(parts),
                **_named("learner", learned),
            }
            if tracker and run.eval_every and (over or step % run.eval_every == 0):
                metrics |= _evaluate(parts, step)
            timings = {
                "seconds": seconds,
                "collect": collected - start,
                "learn": updated - collected,
                "sync": end - updated,
                "episodes_per_second": len(trajectories) / (end - start),
            }
            shown = [as_record(trajectory) for trajectory in trajectories[: run.log_episodes]]
            if tracker:
                tracker.record(step, metrics, timings, shown)
            best = parts.watch.add(step, metrics["reward"]) if parts.watch and groups else None
            if best is not None:
                done = _set_back(parts, step, best)
                if tracker:
                    tracker.say(done)

            # The next stage of the run, where this one is over, has other tasks.
            moves_on = parts.position.moves_on(parts.stages, metrics["reward"])
            parts = _next_stage(parts, stack) if moves_on else parts

            # Save.
            is_best = "eval/reward" in metrics and step == _best(config)
            if broadcast_object(
                step % run.save_every == 0 or is_best or moves_on or best is not None
            ):
                _save(parts, step, seconds)
        _save(parts, step, seconds)

    if over:
        return _summary(config, f"{run.output} is finished: {over}")
    message = f"stopped after step {step} of {run.steps}; the same command continues it"
    return _summary(config, message, signals[0] if signals else 0)


@contextmanager
def _tracker(parts: _Parts, saved: Checkpoint | None) -> Iterator[RunLogger | None]:
    """The logs of the run, with its first evaluation; None in all processes but the first."""
    if rank_and_size()[0]:
        yield None
        return
    run, step = parts.config.run, saved.step if saved else 0
    with RunLogger(run.output, step, run.steps, show=not run.quiet, fresh=not saved) as tracker:
        tracker.say(f"{run.output}: {f'continuing after step {step}' if saved else 'starting'}")
        if run.eval_every and not saved:
            tracker.record(0, _evaluate(parts, 0), {"seconds": 0.0})
        yield tracker


@dataclass(frozen=True)
class _Parts:
    """What a run is made of."""

    config: TrainConfig
    origin: str  # the model that the run began with
    renderer: Renderer
    model: Any  # of transformers: the one that learns
    engine: Engine  # has weights of its own
    learner: Learner
    environments: Environments
    held_out: Environments | None  # of evaluations
    watch: CollapseMonitor | None  # for collapse
    stages: tuple[Stage, ...]  # of the run; none where it has only one
    position: CurriculumState  # in the stages
    in_flight: InFlight  # episodes of later steps; none unless collection runs ahead
    trace: Trace | None


def open_environments(env: str, count: int, env_args: Mapping[str, Any]) -> Environments:
    """Make environments, and put what they refuse into words.

    Raises:
        ConfigError: there is no such environment, or it refuses its arguments.
    """
    try:
        return make_environments(env, count, env_args)
    except ResearchAgentError:
        raise
    except Exception as error:  # the environment's own kinds of errors, which nobody here knows
        given = " ".join(f"{key}={value}" for key, value in env_args.items()) or "no arguments"
        raise ConfigError(f"cannot make {env} with {given}: {error}") from error


def context_of(model: Any, wanted: int) -> int:
    """Tokens that an episode may have: those wanted, or as many as the model has positions for."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return wanted if limit is None else min(wanted, limit)


@contextmanager
def _open(config: TrainConfig, saved: Checkpoint | None) -> Iterator[_Parts]:
    """Build the parts, with the weights and states of a checkpoint where there is one."""
    sampling, policy, run = config.sampling, config.policy, config.run
    rank, size = rank_and_size()
    if size > 1 and run.collapse is not None and run.on_collapse == "rollback":
        raise ConfigError("--on-collapse rollback works in one process only; stop, and start again")
    if size > 1 and sampling.max_staleness:
        raise ConfigError("--max-staleness works in one process only; leave it at 0 with torchrun")
    if rank == 0:
        run.output.mkdir(parents=True, exist_ok=True)
        write_atomic(run.output / "config.json", json.dumps(as_json(config), indent=1) + "\n")
    torch.manual_seed(run.seed)
    slots = -(-sampling.prompts_per_step * sampling.group_size // size)
    slots = min(slots * (1 + sampling.max_staleness), sampling.max_in_flight or slots)
    rule = algorithm(config.algorithm.algorithm, **config.algorithm.algorithm_args)
    with ExitStack() as stack:
        env, env_args = config.environment.env, config.environment.env_args
        stages, position = _stages(config, saved)
        environments = open_environments(env, slots, _arguments(config, stages, position))
        stack.callback(environments.close)
        held_out = None
        if run.eval_every and rank == 0:
            held_out = open_environments(env, slots, {**env_args, **run.eval_args})
            stack.callback(held_out.close)
        origin = saved.state["origin"] if saved else _origin(policy.model)
        load = partial(load_model, device=policy.device)
        adapter = None if policy.merge_adapter else model_source(origin).adapter
        model, renderer = _load_policy(config, saved, origin, adapter)
        reference = None
        if rule.needs_reference and (adapter is not None or not config.learner.lora_rank):
            # Several processes keep a part each, which goes to its device when the model is cut.
            reference = load_model(origin, device="cpu") if rank_and_size()[1] > 1 else load(origin)
        engine: Engine = make_engine(
            sampling.engine,
            model,
            renderer,
            max_slots=slots,
            max_context=context_of(model, sampling.max_prompt + sampling.max_response),
            dtype=config.learner.precision,
        )
        trace = Trace(run.trace) if run.trace and rank == 0 else None
        if trace:
            stack.callback(trace.close)
            engine = TracedEngine(engine, trace)
            environments = TracedEnvironments(environments, trace)
        learner = Learner(
            model,
            rule,
            reference=reference,
            temperature=sampling.temperature,
            adapter=adapter,
            **asdict(config.learner),
        )
        if saved:
            learner.load_state_dict(saved.state["learner"])
            torch.set_rng_state(saved.state["random"])
        if saved or adapter is not None:
            engine.load_weights(learner.weights(), version=saved.step if saved else 0)
        watch = None if run.collapse is None else CollapseMonitor(run.collapse)
        if watch and saved:
            watch.history = [(int(s), float(r)) for s, r in saved.state["rewards"]]
        in_flight = InFlight()
        if saved:
            begun = saved.state["in_flight"]
            in_flight = rollout_state.from_state(begun, environments, sampling, run.seed)
        yield _Parts(
            config=config,
            origin=origin,
            renderer=renderer,
            model=model,
            engine=engine,
            learner=learner,
            environments=environments,
            held_out=held_out,
            watch=watch,
            stages=stages,
            position=position,
            in_flight=in_flight,
            trace=trace,
        )


def _load_policy(
    config: TrainConfig, saved: Checkpoint | None, origin: str, adapter: str | None
) -> tuple[Any, Renderer]:
    """The model that learns, without adapters, and its tokenizer."""
    policy = config.policy
    renderer = load_renderer(resolve_model(origin), chat_template=policy.chat_template)
    if adapter is not None or config.learner.lora_rank or not saved:  # the weights stay
        model = load_model(origin, device=policy.device, merge_adapter=adapter is None)
    else:
        model = load_model(saved.folder, device=policy.device)
    require_ends(model, renderer)
    return model, renderer


def _stages(
    config: TrainConfig, saved: Checkpoint | None
) -> tuple[tuple[Stage, ...], CurriculumState]:
    """The stages of a run, and how far it is in them."""
    stages = parse_stages(config.environment.stages)
    return stages, CurriculumState(
        **saved.state["stage"]
    ) if saved and stages else CurriculumState()


def _arguments(
    config: TrainConfig, stages: Sequence[Stage], position: CurriculumState
) -> dict[str, Any]:
    """The environment's arguments in a stage."""
    own = stages[position.stage].env_args if stages else {}
    return {**config.environment.env_args, **own}


def _stage(parts: _Parts) -> dict[str, float]:
    """For the log: the number of the stage, where there are any."""
    return {"stage": parts.position.stage + 1.0} if parts.stages else {}


def _next_stage(parts: _Parts, stack: ExitStack) -> _Parts:
    """The parts with the environments of the stage that begins now; ``stack`` closes them."""
    parts.in_flight.clear()
    parts.environments.close()
    arguments = _arguments(parts.config, parts.stages, parts.position)
    count = parts.environments.num_envs
    environments = open_environments(parts.config.environment.env, count, arguments)
    stack.callback(environments.close)
    traced = TracedEnvironments(environments, parts.trace) if parts.trace else environments
    return replace(parts, environments=traced)


def _origin(model: str) -> str:
    """The model to start from; of another run the checkpoint that is its newest now."""
    newest = checkpoint.latest(Path(model).expanduser() / "checkpoints")
    return str(newest) if newest else model


def _play(parts: _Parts, step: int) -> tuple[list[Trajectory], list[Group]]:
    """Play the tasks of a step; returns all episodes, and the groups to learn from.

    An algorithm that selects groups has as many tasks for each step as its rounds can need, and
    those that a step does not need are left out: which tasks a step plays never depends on others.
    Slots with nothing left to play begin with the tasks of the next ``max_staleness`` steps.
    """
    sampling, rule = parts.config.sampling, parts.learner.algorithm
    selects = rule if isinstance(rule, SelectsGroups) else None
    rounds = selects.max_rounds if selects else 1
    tasks = sampling.prompts_per_step * rounds  # of a step
    later = range(step + 1, step + sampling.max_staleness + 1)
    next_ones = [
        e
        for s in later
        for e in _episodes(s * tasks, sampling.prompts_per_step, sampling.group_size)
    ]
    episode = step * tasks
    played: list[Trajectory] = []
    groups: list[Group] = []
    for _ in range(rounds):
        missing = sampling.prompts_per_step - len(groups)
        wanted = _episodes(episode, missing, sampling.group_size)
        episode += missing
        rank, size = rank_and_size()
        trajectories = collect(
            parts.engine,
            parts.environments,
            parts.renderer,
            wanted[rank::size],  # each process plays its share, and all learn from all
            sampling,
            seed=parts.config.run.seed,
            ahead=next_ones,
            in_flight=parts.in_flight,
        )
        trajectories = sorted(gather(trajectories), key=lambda t: (t.episode, t.sample))
        played += trajectories
        for group in _groups(trajectories):
            if selects is None or selects.keeps([t.reward for t in group.trajectories]):
                groups.append(group)
        down = _void_fraction(played) > parts.config.algorithm.max_void_fraction
        if down or len(groups) == sampling.prompts_per_step:
            break
    return played, groups


def _episodes(first: int, tasks: int, samples: int) -> list[Episode]:
    return [(task, sample) for task in range(first, first + tasks) for sample in range(samples)]


def _staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """By how many updates the weights that learned are newer than those that sampled, a token."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    sampled = [v for t in trajectories for segment in t.segments for v in segment.versions or ()]
    mean = sum(sampled) / len(sampled) if sampled else version
    return {
        "staleness": version - mean,
        "staleness_max": float(version - min(sampled, default=version)),
    }


def _void_fraction(trajectories: Sequence[Trajectory]) -> float:
    return sum(t.void for t in trajectories) / len(trajectories)


def _save(parts: _Parts, step: int, seconds: float) -> None:
    config = parts.config
    rank, size = rank_and_size()
    is_whole = size == 1 and not parts.learner.has_adapters
    weights = None if is_whole else dict(parts.learner.weights())  # of all processes together
    learner = parts.learner.state_dict()
    if rank:
        return

    def write_model(folder: Path) -> None:
        parts.model.save_pretrained(folder, state_dict=weights)
        parts.renderer.tokenizer.save_pretrained(folder)

    checkpoint.save(
        config.run.output / "checkpoints",
        step,
        write_model=write_model,
        state={
            "learner": learner,
            "random": torch.get_rng_state(),
            "seconds": seconds,
            "origin": parts.origin,
            **({"rewards": parts.watch.history} if parts.watch else {}),
            **({"stage": asdict(parts.position)} if parts.stages else {}),
            "in_flight": rollout_state.to_state(parts.in_flight),
        },
        config=as_json(config),
        keep=config.run.keep,
        best=_best(config),
    )


def _best(config: TrainConfig) -> int | None:
    """The step after which an evaluation gave the highest reward, the first of several."""
    records = read_lines(config.run.output / METRICS)
    evaluated = [r for r in records if r["step"] and r.get("eval/reward") is not None]
    return max(evaluated, key=lambda r: r["eval/reward"])["step"] if evaluated else None


def _set_back(parts: _Parts, step: int, best: int) -> str:
    """Undo a collapse as the configuration says; returns what was done.

    Raises:
        CollapseError: the run is to stop, or has no checkpoint to go back to.
    """
    run = parts.config.run
    good = checkpoint.latest(run.output / "checkpoints", up_to=best)
    what = (
        f"the reward collapsed: at step {step} it is below {run.collapse:g} of its best average, "
        f"that of step {best}; the newest checkpoint up to there is {good or 'none'}"
    )
    if run.on_collapse == "stop" or good is None or parts.watch is None:
        raise CollapseError(what)
    saved = checkpoint.load(good)
    with torch.no_grad():
        if not parts.learner.has_adapters:
            parts.model.load_state_dict(load_model(good, device="cpu").state_dict())
        parts.learner.load_state_dict(saved.state["learner"])
    parts.engine.load_weights(parts.learner.weights(), version=step)
    parts.in_flight.clear()
    parts.watch.history.clear()
    return f"{what}; the run goes on from it"


def _evaluate(parts: _Parts, step: int) -> dict[str, float]:
    """Play the held-out tasks with the weights of now."""
    run = parts.config.run
    if parts.held_out is None:
        return {}
    summary = evaluate(
        parts.engine,
        parts.held_out,
        parts.renderer,
        replace(parts.config.sampling, temperature=run.eval_temperature),
        run.output / "evaluations" / f"step-{step:06d}",
        limit=run.eval_limit,
        seed=run.seed,
        show=False,
    )
    if summary.episodes == 0:
        return {}  # all void: there is nothing to say
    return _named("eval", {"reward": summary.reward, **summary.metrics})


def _saved(config: TrainConfig) -> Checkpoint | None:
    """The newest checkpoint of this run, if there is one: the same in all processes."""
    output = config.run.output
    newest = checkpoint.latest(output / "checkpoints")
    if len(set(gather([newest]))) > 1:
        message = f"the processes see different checkpoints in {output}; share the folder"
        raise CheckpointError(message)
    if newest:
        saved = checkpoint.load(newest)
        require_same(saved.config, config, output)
        return saved
    begun = output / "config.json"
    if begun.exists() and read_lines(output / METRICS):
        require_same(json.loads(begun.read_text(encoding="utf-8")), config, output)
    return None


def _over(config: TrainConfig, step: int, seconds: float) -> str:
    """Why the run is over; empty while it is not."""
    if step >= config.run.steps:
        return f"{step} steps are done; give more --steps to go on"
    limit = config.run.time_limit
    if limit is not None and seconds >= limit:
        return f"its {limit:g} s are over, {step} steps are done; give a longer --time-limit"
    return ""


def _groups(trajectories: Sequence[Trajectory]) -> list[Group]:
    """The samples of each task, void ones left out; a task of which nothing is left is no group."""
    usable = (trajectory for trajectory in trajectories if not trajectory.void)
    return [Group(episode, list(ts)) for episode, ts in groupby(usable, lambda t: t.episode)]


def _describe(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Averages over the episodes of a step that are not void; shares are of all its episodes."""
    played = [t for t in trajectories if not t.void]
    count = max(len(played), 1)
    names = dict.fromkeys(name for t in played for name in t.metrics)  # in their own order
    return {
        "reward": sum(t.reward for t in played) / count,
        **{f"env/{n}": sum(t.metrics.get(n, 0.0) for t in played) / count for n in names},
        "turns": sum(s.provenance == "action" for t in played for s in t.segments) / count,
        "action_tokens": sum(t.num_action_tokens for t in played) / count,
        "tokens": sum(len(t.tokens) for t in played) / count,
        "void_fraction": 1 - len(played) / len(trajectories),
        "episodes": float(len(trajectories)),
        "truncated_share": sum(t.truncated for t in trajectories) / len(trajectories),
    }


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}


@contextmanager
def saved_for_inspection(
    output: Path, step: int, trajectories: Sequence[Trajectory]
) -> Iterator[None]:
    """Where learning meets a number that is not finite, write down what it learned from.

    Args:
        output: folder of the run; a new file in its ``failures`` gets the cause and the
            trajectories with their tokens and log-probabilities. Nothing there is overwritten.
        step: training steps done.
        trajectories: of the step.

    Raises:
        NonFiniteError: the one that was met; its message tells the file.
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


def _void_message(config: TrainConfig, step: int, share: float) -> str:
    return (
        f"{share:.0%} of the episodes of step {step + 1} were void, more than --max-void-fraction "
        f"{config.algorithm.max_void_fraction:.0%}: something that the environment needs is down. "
        f"Step {step} is saved in {config.run.output}; the same command continues when it is up"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one leaves at once.

    Outside the main thread, where Python takes no signals, the list stays empty.
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

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(config: TrainConfig, message: str, number: int = 0) -> TrainSummary:
    """Numbers from the logs, so that a finished run tells the same again."""
    output = config.run.output
    records, timings = read_lines(output / METRICS), read_lines(output / TIMINGS)
    numbers: dict[str, float | str] = {"steps": records[-1]["step"] if records else 0}
    if timings:
        numbers["seconds of training"] = timings[-1]["seconds"]
    for name in dict.fromkeys(name for record in records for name in record):
        if name == "reward" or name.startswith(("env/", "eval/")):
            of_name = [r[name] for r in records if r.get(name) is not None]
            if of_name:
                numbers |= {f"{name} first": of_name[0], f"{name} last": of_name[-1]}
    newest = checkpoint.latest(output / "checkpoints")
    numbers |= {
        "model": str(newest or ""),
        "logs": str(output / METRICS),
        "tensorboard": str(output / "tensorboard"),
    }
    return TrainSummary(message, numbers, number)
