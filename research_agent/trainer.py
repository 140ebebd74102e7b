"""Training: collect, credit, learn, sync, log, save. Then again.

Everything that a step depends on is its number, the weights, and the optimiser's and torch's state;
a checkpoint holds just these, so a run that was killed continues to the same bits.
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

from research_agent import checkpoint
from research_agent.algorithms import algorithm
from research_agent.checkpoint import Checkpoint
from research_agent.codec import Codec, load_codec
from research_agent.collect import collect
from research_agent.config import TrainConfig, as_json, require_same, validate
from research_agent.engines import make_engine
from research_agent.engines.base import Engine
from research_agent.environments import Environments, make_environments
from research_agent.errors import ConfigError, ResearchAgentError, TooManyVoidError
from research_agent.evaluate import as_record, evaluate
from research_agent.learner import Learner
from research_agent.policy import load_model, resolve_model
from research_agent.tracking import METRICS, TIMINGS, Tracker, read_lines
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
        TooManyVoidError: more episodes were void than ``max_void_share``; the state is saved.
    """
    validate(config)
    sampling, run = config.sampling, config.run
    saved = _saved(config)
    step = saved.step if saved else 0
    seconds = float(saved.state["seconds"]) if saved else 0.0
    if over := _over(config, step, seconds):
        return _summary(config, f"{run.output} is finished: {over}")

    with ExitStack() as stack:
        signals = stack.enter_context(_stop_signals())
        parts = stack.enter_context(_open(config, saved))
        tracker = Tracker(run.output, step, run.steps, show=not run.quiet, fresh=not saved)
        stack.enter_context(tracker)
        tracker.say(f"{run.output}: {f'continuing after step {step}' if saved else 'starting'}")
        if run.eval_every and not saved:
            tracker.record(0, _evaluate(parts, 0), {"seconds": 0.0})

        while not signals and not over:
            start = time.perf_counter()

            # Collect. The tasks of a step are a function of its number.
            first = step * sampling.prompts
            wanted = [
                (episode, sample)
                for episode in range(first, first + sampling.prompts)
                for sample in range(sampling.samples)
            ]
            trajectories = collect(
                parts.engine, parts.environments, parts.codec, wanted, sampling, seed=run.seed
            )
            collected = time.perf_counter()

            # Credit and learn. Advantages, weights and objective are the algorithm's.
            void_share = sum(t.void for t in trajectories) / len(trajectories)
            if void_share > config.algorithm.max_void_share:
                _save(parts, step, seconds)
                raise TooManyVoidError(_void_message(config, step, void_share))
            learned = parts.learner.update(_groups(trajectories))

            # Sync. The next step is sampled with the new weights.
            step += 1
            parts.engine.load_weights(parts.model.named_parameters(), version=step)
            end = time.perf_counter()
            seconds += end - start
            over = _over(config, step, seconds)

            # Log.
            metrics = {**_describe(trajectories), **_named("learner", learned)}
            if run.eval_every and (over or step % run.eval_every == 0):
                metrics |= _evaluate(parts, step)
            timings = {
                "seconds": seconds,
                "collect": collected - start,
                "learn": end - collected,
                "episodes_per_second": len(trajectories) / (end - start),
            }
            shown = [as_record(trajectory) for trajectory in trajectories[: run.log_episodes]]
            tracker.record(step, metrics, timings, shown)

            # Save.
            if step % run.save_every == 0:
                _save(parts, step, seconds)
        _save(parts, step, seconds)

    if over:
        return _summary(config, f"{run.output} is finished: {over}")
    message = f"stopped after step {step} of {run.steps}; the same command continues it"
    return _summary(config, message, signals[0])


@dataclass(frozen=True)
class _Parts:
    """What a run is made of."""

    config: TrainConfig
    codec: Codec
    model: Any  # of transformers: the one that learns
    engine: Engine  # has weights of its own
    learner: Learner
    environments: Environments
    held_out: Environments | None  # of evaluations


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
    run.output.mkdir(parents=True, exist_ok=True)
    (run.output / "config.json").write_text(json.dumps(as_json(config), indent=1) + "\n")
    torch.manual_seed(run.seed)
    slots = sampling.prompts * sampling.samples
    slots = min(slots, sampling.slots or slots)
    rule = algorithm(config.algorithm.algorithm, **config.algorithm.algorithm_args)
    with ExitStack() as stack:
        env, env_args = config.environment.env, config.environment.env_args
        environments = open_environments(env, slots, env_args)
        stack.callback(environments.close)
        held_out = None
        if run.eval_every:
            held_out = open_environments(env, slots, {**env_args, **run.eval_args})
            stack.callback(held_out.close)
        codec = load_codec(resolve_model(policy.model), chat_template=policy.chat_template)
        load = partial(load_model, device=policy.device)
        model = load(saved.folder if saved else policy.model)
        reference = load(policy.model) if rule.needs_reference else None
        learner = Learner(
            model,
            rule,
            reference=reference,
            temperature=sampling.temperature,
            **asdict(config.learner),
        )
        if saved:
            learner.load_state_dict(saved.state["learner"])
            torch.set_rng_state(saved.state["random"])
        engine = make_engine(
            sampling.engine,
            model,
            codec,
            max_slots=slots,
            max_context=context_of(model, sampling.max_prompt + sampling.max_response),
        )
        yield _Parts(config, codec, model, engine, learner, environments, held_out)


def _save(parts: _Parts, step: int, seconds: float) -> None:
    config = parts.config

    def write_model(folder: Path) -> None:
        parts.model.save_pretrained(folder)
        parts.codec.tokenizer.save_pretrained(folder)

    checkpoint.save(
        config.run.output / "checkpoints",
        step,
        write_model=write_model,
        state={
            "learner": parts.learner.state_dict(),
            "random": torch.get_rng_state(),
            "seconds": seconds,
        },
        config=as_json(config),
        keep=config.run.keep,
    )


def _evaluate(parts: _Parts, step: int) -> dict[str, float]:
    """Play the held-out tasks with the weights of now."""
    run = parts.config.run
    if parts.held_out is None:
        return {}
    summary = evaluate(
        parts.engine,
        parts.held_out,
        parts.codec,
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
    """The newest checkpoint of this run, if the output folder has one."""
    output = config.run.output
    newest = checkpoint.latest(output / "checkpoints")
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
        "void_share": 1 - len(played) / len(trajectories),
        "truncated_share": sum(t.truncated for t in trajectories) / len(trajectories),
    }


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}


def _void_message(config: TrainConfig, step: int, share: float) -> str:
    return (
        f"{share:.0%} of the episodes of step {step + 1} were void, more than --max-void-share "
        f"{config.algorithm.max_void_share:.0%}: something that the environment needs is down. "
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
        if seen:
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
