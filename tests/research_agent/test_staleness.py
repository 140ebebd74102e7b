"""Sampling that runs ahead of learning: turns under way at new weights, versions, checkpoints."""

from __future__ import annotations

import copy
import itertools
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent import checkpoint, rollout_state
from research_agent.active_rollout import EpisodeKey, InFlight
from research_agent.batch import make_batch
from research_agent.cli import main
from research_agent.config import SamplingConfig
from research_agent.engines.base import Completion, Engine, SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.engines.transformers import TransformersEngine
from research_agent.environments import make_environments
from research_agent.learner import Learner
from research_agent.player_process import PlayerProcess
from research_agent.renderer import Renderer
from research_agent.rollout import RolloutLoop, collect, keeps_turns
from research_agent.run_logger import read_lines
from research_agent.trajectory import Group, Trajectory
from tests.forks import FORKS
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.test_rollout import END, RENDERER, Fake, Limits
from tests.research_agent.test_trainer import (
    flags,
    kill_within,
    refusal,
    run_alone,
    start,
)
from tests.research_agent.torchrun import in_two_processes

AHEAD = {
    "collection": (PlayerProcess, "collect"),
    "update": (Learner, "update"),
    "hand-over of the weights": (PlayerProcess, "load_weights"),
}

TOY = "tests.research_agent.toy_env:CopyLetter-v0"
pytestmark = pytest.mark.usefixtures("forks")


def tasks(step: int, prompts: int, samples: int) -> list[EpisodeKey]:
    return list(itertools.product(range(step * prompts, (step + 1) * prompts), range(samples)))


def plain(trajectory: Trajectory) -> Trajectory:
    """Without the numbers of the weights."""
    segments = tuple(replace(segment, versions=None) for segment in trajectory.segments)
    return replace(trajectory, segments=segments)


def versions(trajectory: Trajectory) -> list[int]:
    return [v for segment in trajectory.segments for v in segment.versions or ()]


def say(context: Sequence[int], params: SamplingParams) -> list[int]:
    """A turn that depends on the trajectory's seed and on all that was said, with stop strings."""
    words = ["a", "v bé", "abc!", "é!", "bbbbbbb", "vvv"]
    return [*RENDERER.encode_text(words[(params.seed + sum(context)) % len(words)]), END]


class Unable:
    """An engine with none of the optional abilities: it neither interrupts, keeps nor forks."""

    def __init__(self, engine: Engine) -> None:
        self.max_context = engine.max_context
        self.submit = engine.submit
        self.step = engine.step
        self.release = engine.release
        self.load_weights = engine.load_weights
        self.engine = engine

    @property
    def busy(self) -> int:
        return self.engine.busy


def load(loop: RolloutLoop, engine: Engine, version: int) -> None:
    """New weights, as the player gives them."""
    if keeps_turns(engine):
        engine.load_weights([], version)
        return
    loop.suspend()
    assert engine.busy == 0
    engine.load_weights([], version)
    loop.resume()


@given(
    staleness=st.integers(0, 3),
    steps=st.integers(1, 5),
    prompts=st.integers(1, 3),
    samples=st.integers(1, 3),
    num_envs=st.integers(1, 9),
    chance=st.integers(0, 10**6),
    overlap=st.booleans(),
    max_turn_tokens=st.sampled_from([None, 3]),
    kind=st.sampled_from(["interrupts", "loses", "keeps"]),
)
@settings(max_examples=200, deadline=None)
def test_no_token_is_older_than_allowed_and_nothing_is_lost(
    *,
    staleness: int,
    steps: int,
    prompts: int,
    samples: int,
    num_envs: int,
    chance: int,
    overlap: bool,
    max_turn_tokens: int | None,
    kind: str,
) -> None:
    """Whenever new weights come, the trajectories are those of weights that never changed."""
    pick = random.Random(chance)
    engine: Engine = ScriptedEngine(
        say, RENDERER, delay=lambda: pick.randint(0, 9), keeps_turns=kind == "keeps"
    )
    if kind == "loses":
        engine = Unable(engine)
    limits = Limits(max_response=40, overlap=overlap, max_turn_tokens=max_turn_tokens)
    loop = RolloutLoop(engine, Fake(num_envs, pick), RENDERER, limits, seed=3)
    for step in range(steps):
        wanted = tasks(step, prompts, samples)
        later = [tasks(s, prompts, samples) for s in range(step + 1, step + staleness + 1)]
        loop.enqueue([*wanted, *itertools.chain(*later)])
        played = loop.finish(wanted)
        for _ in range(pick.randint(0, 9)):  # meanwhile the learner updates
            if loop.has_work:
                loop.advance()
        assert [(t.episode, t.sample) for t in played] == wanted
        alone = ScriptedEngine(say, RENDERER)
        expected = collect(alone, Fake(1, random.Random(0)), RENDERER, wanted, limits, seed=3)
        assert [plain(t) for t in played] == [plain(t) for t in expected]
        for trajectory in played:
            numbers = versions(trajectory)
            assert len(numbers) == trajectory.num_action_tokens
            assert numbers == sorted(numbers)
            assert all(step - staleness <= number <= step for number in numbers)
        assert loop.in_flight.episodes <= set(itertools.chain(*later))
        load(loop, engine, step + 1)


def test_an_engine_that_keeps_its_turns_is_given_each_token_once() -> None:
    submitted: list[int] = []

    class Counted(ScriptedEngine):
        def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
            submitted.append(len(tokens))
            super().submit(slot, tokens, params)

    pick = random.Random(3)
    engine = Counted(say, RENDERER, delay=lambda: pick.randint(0, 9), keeps_turns=True)
    loop = RolloutLoop(engine, Fake(5, pick), RENDERER, Limits(max_response=60))
    wanted = tasks(0, 10, 2)
    loop.enqueue(wanted)
    version = 0
    while loop.has_work:
        loop.advance()
        version += 1
        load(loop, engine, version)
    played = loop.finish(wanted)
    turns = [turn for trajectory in played for turn in trajectory.turns]
    assert len(submitted) == len(turns)
    given = [s for t in played for s in t.segments if s.provenance != "action"]
    assert sum(submitted) == sum(len(segment.tokens) for segment in given)
    assert any(len(set(turn.versions or ())) > 2 for turn in turns)
    assert all(versions(t) == sorted(versions(t)) for t in played)


def test_the_next_step_begins_while_long_episodes_go_on() -> None:
    begun: list[int] = []

    class Watched(Fake):
        def reset(self, assignments: Mapping[int, int], seed: int) -> Any:
            begun.extend(assignments.values())
            return super().reset(assignments, seed)

    delays = itertools.cycle([0, 0, 0, 30])
    engine = ScriptedEngine(
        lambda c, p: [*RENDERER.encode_text("abcd"), END], RENDERER, delay=lambda: next(delays)
    )
    loop = RolloutLoop(engine, Watched(4, random.Random(0)), RENDERER, Limits(overlap=True))
    loop.enqueue([(i, 0) for i in range(8)])
    loop.finish([(i, 0) for i in range(4)])
    assert begun[:4] == [0, 1, 2, 3]
    assert set(begun[4:]) == {4, 5, 6, 7}
    assert loop.in_flight.episodes == {(4, 0), (5, 0), (6, 0), (7, 0)}
    loop.suspend()
    assert any(rollout.partial_turns for rollout in loop.in_flight.active.values())


def drive(
    engine: Engine,
    slots: int,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    cuts: random.Random | None,
) -> list[tuple[tuple[int, ...], tuple[float, ...], str]]:
    """Play one turn per slot, cut at random moments; returns tokens, log-probabilities, end."""
    said: dict[int, list[Completion]] = {slot: [] for slot in range(slots)}
    for slot in range(slots):
        engine.submit(slot, prompts[slot], params)
    ends: dict[int, str] = {}
    while len(ends) < slots:
        for turn in engine.step():
            said[turn.slot].append(turn)
            ends[turn.slot] = turn.finish_reason
        if cuts and cuts.random() < 0.4 and isinstance(engine, TransformersEngine | ScriptedEngine):
            for turn in engine.interrupt():
                assert turn.finish_reason == "interrupted"
                said[turn.slot].append(turn)
            assert engine.busy == 0
            for slot in said.keys() - ends.keys():
                engine.release(slot)
                begun = [t for part in said[slot] for t in part.tokens]
                rest = replace(
                    params, max_tokens=params.max_tokens - len(begun), resumed_tokens=len(begun)
                )
                engine.submit(slot, [*prompts[slot], *begun], rest)
    return [
        (
            tuple(t for part in parts for t in part.tokens),
            tuple(value for part in parts for value in part.logprobs),
            ends[slot],
        )
        for slot, parts in said.items()
    ]


@pytest.mark.parametrize("stop", [(), ("é",), ("\x00", "ab")])
def test_turns_that_are_cut_go_on_as_if_they_had_not_been(
    stop: tuple[str, ...], renderer: Renderer
) -> None:
    """A real model with random weights: same draws, same ends, stop strings across cuts."""
    model, slots = tiny_qwen2(), 40
    prompts = [renderer.encode_text(f"p{slot}") for slot in range(slots)]
    params = SamplingParams(max_tokens=30, stop=stop, seed=5)
    whole = drive(TransformersEngine(model, renderer, slots), slots, prompts, params, None)
    cut = drive(
        TransformersEngine(model, renderer, slots), slots, prompts, params, random.Random(1)
    )
    assert [(tokens, end) for tokens, _, end in cut] == [(tokens, end) for tokens, _, end in whole]
    for one, other in zip(cut, whole, strict=True):
        assert one[1] == pytest.approx(other[1], abs=1e-4)
    assert len({end for _, _, end in whole}) > 1


def test_a_stop_string_may_begin_before_the_cut(merging_renderer: Renderer) -> None:
    """ "</", "s", ">." complete "</s>": cut after each of them."""
    text = "x</s>.z"
    tokens = merging_renderer.encode_text(text)
    steps = iter(range(1, 99))
    engine = ScriptedEngine(lambda c, p: tokens, merging_renderer, delay=lambda: 99)
    said: list[int] = []
    params = SamplingParams(stop=("</s>",))
    for at in steps:
        engine.submit(0, [1, *said], replace(params, resumed_tokens=len(said)))
        turns = [turn for _ in range(40) for turn in engine.step()] or engine.interrupt()
        said += turns[0].tokens
        engine.release(0)
        if at == 9:
            break
    whole = ScriptedEngine(lambda c, p: tokens, merging_renderer)
    whole.submit(0, [1, *said], replace(params, resumed_tokens=len(said)))
    (last,) = whole.step()
    assert merging_renderer.decode([*said, *last.tokens]) == "x</s>."
    assert last.finish_reason == "stop"


def full_logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0, :-1].double()
    return torch.log_softmax(logits, dim=-1)


def test_each_token_has_the_logprob_of_the_weights_that_sampled_it(renderer: Renderer) -> None:
    models = [tiny_qwen2()]
    for _ in range(5):
        models.append(copy.deepcopy(models[-1]))
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.mul_(1.02)
    engine = TransformersEngine(models[0], renderer, 5)
    environments = make_environments(TOY, 5, {"turns": 3})
    loop = RolloutLoop(engine, environments, renderer, Limits(max_turn_tokens=9), seed=5)
    played: list[Trajectory] = []
    for step in range(5):
        loop.enqueue([each for later in range(3) for each in tasks(step + later, 2, 3)])
        played += loop.finish(tasks(step, 2, 3))
        loop.advance()
        loop.suspend()
        engine.load_weights(models[step + 1].named_parameters(), step + 1)
        loop.resume()
    mixed = [s for t in played for s in t.segments if len(set(s.versions or ())) > 1]
    assert len(mixed) > 3  # actions of two versions
    for trajectory in played:
        tokens, numbers = trajectory.tokens, versions(trajectory)
        places = [i for i, acted in enumerate(trajectory.action_mask) if acted]
        under = {n: full_logprobs(models[n], tokens) for n in set(numbers)}
        right = [float(under[n][i - 1, tokens[i]]) for i, n in zip(places, numbers, strict=True)]
        batch = make_batch([Group(0, [trajectory])])
        assert batch.old_logprobs.tolist() == pytest.approx(right, abs=1e-4)


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    tensors = [name for name, value in other.items() if isinstance(value, torch.Tensor)]
    rest = [name for name in other if name not in tensors]
    return all(torch.equal(one[name], other[name]) for name in tensors) and all(
        one[name] == other[name] for name in rest
    )


def under_way(
    wanted: Sequence[EpisodeKey],
    ahead: Sequence[EpisodeKey],
    limits: SamplingConfig,
    delays: Iterator[int],
) -> tuple[ScriptedEngine, InFlight]:
    """What is under way when the wanted episodes have ended, and the engine with new weights."""
    engine = ScriptedEngine(say, RENDERER, delay=delays.__next__)
    loop = RolloutLoop(engine, Fake(9, random.Random(0)), RENDERER, limits)
    loop.enqueue([*wanted, *ahead])
    loop.finish(wanted)
    loop.suspend()
    engine.load_weights([], 1)
    return engine, loop.in_flight


def play_on(
    engine: Engine,
    environments: Fake,
    in_flight: InFlight,
    limits: SamplingConfig,
    rest: list[EpisodeKey],
) -> list[Trajectory]:
    loop = RolloutLoop(engine, environments, RENDERER, limits, in_flight=in_flight)
    loop.enqueue(rest)
    loop.resume()
    return loop.finish(rest)


def through_a_checkpoint(state: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    saved = checkpoint.save(
        folder, 1, write_model=lambda folder: None, state=state, config={}, keep=1
    )
    return checkpoint.load(saved).state


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_under_way_survives_a_checkpoint(tmp_path: Path, overlap: bool) -> None:
    """Saved, loaded and continued in new environments, it ends as if it had not been."""
    wanted = tasks(0, 12, 2)
    limits = Limits(max_response=60, overlap=overlap)
    pick = random.Random(4)
    delays = (pick.choice([0, 1, 30]) for _ in itertools.count())
    engine, in_flight = under_way(wanted[:2], wanted[2:], limits, delays)
    assert in_flight.done
    assert any(p.partial_turns for p in in_flight.active.values())
    assert bool(in_flight.awaiting_env) == overlap
    for key in [key for key, trajectory in in_flight.done.items() if trajectory.void]:
        del in_flight.done[key]  # these are played again
    state = rollout_state.to_state(in_flight)
    saved = through_a_checkpoint({"in_flight": [state]}, tmp_path)["in_flight"]
    fresh = Fake(9, random.Random(7))
    loaded = rollout_state.from_state(saved, fresh, limits, 0, wanted)
    assert same(rollout_state.to_state(loaded), state)
    assert loaded.done == in_flight.done
    again = play_on(engine, fresh, loaded, limits, wanted[2:])
    one = ScriptedEngine(say, RENDERER)
    expected = collect(one, Fake(1, random.Random(0)), RENDERER, wanted[2:], limits)
    assert [plain(t) for t in again] == [plain(t) for t in expected]
    assert {v for t in again for v in versions(t)} == {0, 1}


@pytest.mark.parametrize(("before", "after", "num_envs"), [(1, 2, 9), (2, 1, 18), (3, 2, 4)])
def test_another_number_of_ranks_takes_up_the_same_episodes(
    before: int, after: int, num_envs: int
) -> None:
    """Each episode is with one rank; those that find no environment are left out."""
    limits, wanted = Limits(max_response=60), tasks(0, 2, 2)
    every = tasks(1, 20, 2)
    saved = [
        under_way(wanted, every[rank::before], limits, itertools.cycle([3, 30, 1, 0, 9]))[1]
        for rank in range(before)
    ]
    states = [rollout_state.to_state(in_flight) for in_flight in saved]
    loaded = [
        rollout_state.from_state(
            states, Fake(num_envs, random.Random(rank)), limits, 0, every[rank::after]
        )
        for rank in range(after)
    ]
    kept = [each for in_flight in loaded for each in in_flight.episodes]
    assert len(kept) == len(set(kept))
    assert set(kept) <= {each for in_flight in saved for each in in_flight.episodes}
    for rank, in_flight in enumerate(loaded):
        assert in_flight.episodes <= set(every[rank::after])
        assert len(in_flight.active) <= num_envs
    done = [in_flight.done for in_flight in saved]
    assert {k: t for each in loaded for k, t in each.done.items()} == {
        k: t for each in done for k, t in each.items() if not t.void
    }
    active = [len(in_flight.active) for in_flight in saved]
    if num_envs >= sum(active):
        assert sum(len(in_flight.active) for in_flight in loaded) == sum(active)


def test_a_void_episode_of_a_checkpoint_is_played_again() -> None:
    """Otherwise a run that void episodes have stopped would stop again at once."""
    later = tasks(0, 4, 1)
    _, in_flight = under_way([(99, 0)], later, Limits(max_response=60), itertools.cycle([0, 30]))
    void = min(in_flight.done)
    in_flight.done[void] = replace(in_flight.done[void], void=True)
    state = rollout_state.to_state(in_flight)
    fake = Fake(9, random.Random(0))
    loaded = rollout_state.from_state([state], fake, Limits(), 0, later)
    assert loaded.done == {k: t for k, t in in_flight.done.items() if not t.void}
    assert loaded.done and void not in loaded.done


def test_an_episode_whose_environment_answers_otherwise_begins_anew() -> None:
    limits = Limits(max_response=60, overlap=True)
    later = tasks(0, 20, 1)
    engine, in_flight = under_way([(99, 0)], later, limits, itertools.cycle([0, 30, 3, 30, 9]))
    answered = {p.key for p in in_flight.active.values() if len(p.segments) > 1}
    assert answered
    assert len(answered) < len(in_flight.active)
    state = rollout_state.to_state(in_flight)
    other = Fake(9, random.Random(0), observation="!")  # a search engine that finds other things
    loaded = rollout_state.from_state([state], other, limits, 0, later)
    kept = {rollout.key for rollout in loaded.active.values()}
    assert kept == {rollout.key for rollout in in_flight.active.values()} - answered
    done = play_on(engine, other, loaded, limits, later)
    said = [s.text for t in done if (t.episode, t.sample) in answered for s in t.segments]
    assert not any("?" in text for text in said)


STALE = "--env-args turns=3 --max-response 16 --max-in-flight 50 --max-staleness 2"


def test_training_learns_from_tokens_that_are_not_too_old(letters: Path, tmp_path: Path) -> None:
    main(flags(letters, tmp_path / "run", *STALE.split(), "--steps", "12"))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[0]["staleness_max"] == records[0]["staleness"] == 0
    assert max(r["staleness_max"] for r in records) >= 1
    assert all(0 <= r["staleness"] <= r["staleness_max"] <= 2 for r in records)
    assert records[-1]["staleness"] > 0
    assert records[-1]["reward"] > 2 * records[0]["reward"]
    assert all(r["episodes"] == 32 for r in records)


def test_without_staleness_every_token_is_new(letters: Path, tmp_path: Path) -> None:
    more = ["--steps", "2", "--max-in-flight", "7", "--overlap"]
    main(flags(letters, tmp_path / "run", *more))
    main(flags(letters, tmp_path / "run", *more, "--steps", "3"))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["staleness_max"] for r in records] == [0.0, 0.0, 0.0]


def require_each_once(output: Path, steps: int, staleness: int) -> None:
    """Each step learned from its own tasks, each episode once, and from no token too old."""
    records = read_lines(output / "metrics.jsonl")
    records = [record for record in records if record["step"]]  # 0 is an evaluation
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert all(0 <= r["staleness"] <= r["staleness_max"] <= staleness for r in records)
    assert all(record["void_fraction"] == 0 for record in records)
    played = read_lines(output / "trajectories.jsonl")
    for step in range(steps):
        keys = [(r["episode"], r["sample"]) for r in played if r["step"] == step + 1]
        assert sorted(keys) == tasks(step, 4, 8)


def saved_episodes(output: Path, step: int) -> list[set[EpisodeKey]]:
    """The episodes in flight in a checkpoint, rank by rank."""
    states = checkpoint.load(output / "checkpoints" / f"step-{step:06d}").state["in_flight"]
    return [
        {(each["episode"], each["sample"]) for each in (*state["active"], *state["done"])}
        for state in states
    ]


def test_a_run_ahead_in_parts_plays_each_episode_once(letters: Path, tmp_path: Path) -> None:
    more = f"{STALE} --old-logprobs recomputed --importance-sampling-cap 2 --log-episodes 99"
    output = tmp_path / "run"
    main([*flags(letters, output), *more.split(), "--steps", "2"])
    (kept,) = saved_episodes(output, 2)
    assert kept
    assert kept <= {*tasks(2, 4, 8), *tasks(3, 4, 8)}
    main([*flags(letters, output), *more.split(), "--steps", "5"])
    require_each_once(output, 5, staleness=2)


def test_rounds_that_come_unforeseen_play_no_episode_twice(letters: Path, tmp_path: Path) -> None:
    more = f"{STALE} --algorithm dapo --algorithm-args max_rounds=2 --log-episodes 99 --steps 4"
    main([*flags(letters, tmp_path / "run"), *more.split()])
    played = read_lines(tmp_path / "run" / "trajectories.jsonl")
    keys = [(record["episode"], record["sample"]) for record in played]
    assert len(keys) == len(set(keys)) > 4 * 32  # some steps had a second round
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(record["staleness_max"] for record in records) in (1, 2)


def run_ahead_until_killed(
    words: list[str], log: str, phase: str, calls: int, share: float
) -> None:
    kill_within(AHEAD[phase], calls, share)
    run_alone(words, log)


@pytest.mark.slow
def test_a_run_ahead_that_is_killed_plays_each_episode_once(letters: Path, tmp_path: Path) -> None:
    more = [*STALE.split(), "--steps", "12", "--log-episodes", "99"]
    words, log = flags(letters, tmp_path / "run", *more), str(tmp_path / "log")
    rng = random.Random(0)
    for phase in AHEAD:
        arguments = (words, log, phase, rng.randint(1, 2), rng.random())
        process = FORKS.Process(target=run_ahead_until_killed, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, Path(log).read_text()
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] < 12  # there is work left
    process = start(words, Path(log))
    process.join()
    assert process.exitcode == 0, Path(log).read_text()
    require_each_once(tmp_path / "run", 12, staleness=2)


@pytest.mark.slow
def test_two_ranks_run_ahead_and_one_continues(letters: Path, tmp_path: Path) -> None:
    more = [*STALE.split(), "--log-episodes", "99", "--eval-every", "4"]
    for steps in ("3", "6"):
        in_two_processes(
            "research_agent.cli", *flags(letters, tmp_path / "run", *more, "--steps", steps)
        )
    first, second = saved_episodes(tmp_path / "run", 6)
    assert first and second
    assert not first & second
    main(flags(letters, tmp_path / "run", *more, "--steps", "8"))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "eval/reward" in r] == [0, 3, 4, 6, 8]
    assert max(r["staleness_max"] for r in records[1:]) >= 1
    require_each_once(tmp_path / "run", 8, staleness=2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--max-staleness -1", "--max-staleness is -1; it must not be negative"),
        ("--max-staleness 1 --old-logprobs recomputed", "add --importance-sampling-cap 2, or take"),
    ],
)
def test_what_no_run_can_have_is_refused(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, said: str
) -> None:
    assert said in refusal(capsys, flags(letters, tmp_path / "run", *more.split()))
