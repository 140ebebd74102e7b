"""Collection that runs ahead of learning: turns that are cut, versions, what survives a kill."""

from __future__ import annotations

import copy
import itertools
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent import checkpoint, rollout_state, trainer
from research_agent.batch import make_batch
from research_agent.cli import main
from research_agent.engines.base import Completion, Engine, SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.engines.transformers import TransformersEngine
from research_agent.environments import Environments, make_environments
from research_agent.renderer import Renderer
from research_agent.rollout import Episode, InFlight, Sampling, collect
from research_agent.run_logger import read_lines
from research_agent.trajectory import Group, Trajectory
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.test_collect import END, RENDERER, Fake, Limits
from tests.research_agent.test_trainer import (
    PHASES,
    final_bytes,
    flags,
    letters,
    refusal,
    run_until_killed,
    server,
    start,
)

__all__ = ["letters", "server"]  # fixtures

TOY = "tests.research_agent.toy_env:CopyLetter-v0"


def tasks(step: int, prompts: int, samples: int) -> list[Episode]:
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
    """An engine that cannot hand over turns before they are finished."""

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


@given(
    staleness=st.integers(0, 3),
    steps=st.integers(1, 5),
    prompts=st.integers(1, 3),
    samples=st.integers(1, 3),
    num_envs=st.integers(1, 9),
    chance=st.integers(0, 10**6),
    overlap=st.booleans(),
    max_turn_tokens=st.sampled_from([None, 3]),
    is_able=st.booleans(),
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
    is_able: bool,
) -> None:
    """Whatever is cut where, the trajectories are those that were never cut."""
    pick = random.Random(chance)
    engine: Engine = ScriptedEngine(say, RENDERER, delay=lambda: pick.randint(0, 9))
    if not is_able:
        engine = Unable(engine)
    environments = Fake(num_envs, pick)
    limits = Limits(max_response=40, overlap=overlap, max_turn_tokens=max_turn_tokens)
    in_flight = InFlight()
    for step in range(steps):
        wanted = tasks(step, prompts, samples)
        later = [tasks(s, prompts, samples) for s in range(step + 1, step + staleness + 1)]
        played = collect(
            engine,
            environments,
            RENDERER,
            wanted,
            limits,
            seed=3,
            ahead=list(itertools.chain(*later)),
            in_flight=in_flight,
        )
        assert engine.busy == 0
        assert [(t.episode, t.sample) for t in played] == wanted
        alone = ScriptedEngine(say, RENDERER)
        expected = collect(alone, Fake(1, random.Random(0)), RENDERER, wanted, limits, seed=3)
        assert [plain(t) for t in played] == [plain(t) for t in expected]
        for trajectory in played:
            numbers = versions(trajectory)
            assert len(numbers) == trajectory.num_action_tokens
            assert numbers == sorted(numbers)
            assert all(step - staleness <= number <= step for number in numbers)
        assert len(in_flight.done) + len(in_flight.active) <= staleness * prompts * samples
        engine.load_weights([], step + 1)


def test_collection_does_run_ahead() -> None:
    """Short episodes leave slots empty while long ones go on: then the next step begins."""
    begun: list[int] = []

    class Watched(Fake):
        def reset(self, assignments: Mapping[int, int], seed: int) -> Any:
            begun.extend(assignments.values())
            return super().reset(assignments, seed)

    delays = itertools.cycle([0, 0, 0, 30])
    engine = ScriptedEngine(
        lambda c, p: [*RENDERER.encode_text("abcd"), END], RENDERER, delay=lambda: next(delays)
    )
    in_flight = InFlight()
    later = [(4, 0), (5, 0), (6, 0), (7, 0)]
    collect(
        engine,
        Watched(4, random.Random(0)),
        RENDERER,
        [(i, 0) for i in range(4)],
        Limits(overlap=True),
        ahead=later,
        in_flight=in_flight,
    )
    assert begun[:4] == [0, 1, 2, 3]
    assert set(begun[4:]) == {4, 5, 6, 7}
    assert {key for key, _ in in_flight.done} | {p.episode for p in in_flight.active.values()} == {
        4,
        5,
        6,
        7,
    }
    assert any(play.partial_turns for play in in_flight.active.values())


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
    """Of a real model with random weights: same draws, same ends, stop strings across cuts."""
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
    in_flight = InFlight()
    played: list[Trajectory] = []
    for step in range(5):
        played += collect(
            engine,
            environments,
            renderer,
            tasks(step, 2, 3),
            Limits(max_turn_tokens=9),
            seed=5,
            ahead=tasks(step + 1, 2, 3) + tasks(step + 2, 2, 3),
            in_flight=in_flight,
        )
        engine.load_weights(models[step + 1].named_parameters(), step + 1)
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


def test_what_is_under_way_survives_a_checkpoint(tmp_path: Path) -> None:
    """Saved, loaded and gone on with in new environments, it ends as if it had not been."""

    def begin(environments: Environments, limits: Sampling) -> tuple[ScriptedEngine, InFlight]:
        pick = random.Random(4)
        engine = ScriptedEngine(say, RENDERER, delay=lambda: pick.choice([0, 1, 30]))
        in_flight = InFlight()
        collect(
            engine,
            environments,
            RENDERER,
            wanted[:2],
            limits,
            ahead=wanted[2:],
            in_flight=in_flight,
        )
        engine.load_weights([], 1)
        return engine, in_flight

    wanted = tasks(0, 12, 2)
    for overlap in (False, True):
        limits = Limits(max_response=60, overlap=overlap)
        engine, in_flight = begin(Fake(9, random.Random(0)), limits)
        kinds = (
            in_flight.done,
            in_flight.active,
            [p for p in in_flight.active.values() if p.partial_turns],
        )
        assert all(kinds)
        assert bool(in_flight.awaiting_env) == overlap
        state = {"in_flight": rollout_state.to_state(in_flight)}
        folder = checkpoint.save(
            tmp_path / str(overlap),
            1,
            write_model=lambda folder: None,
            state=state,
            config={},
            keep=1,
        )
        fresh = Fake(9, random.Random(7))
        saved = checkpoint.load(folder).state["in_flight"]
        loaded = rollout_state.from_state(saved, fresh, limits, 0)
        assert same(rollout_state.to_state(loaded), state["in_flight"])
        assert loaded.done == in_flight.done
        again = collect(engine, fresh, RENDERER, wanted[2:], limits, in_flight=loaded)
        one = ScriptedEngine(say, RENDERER)
        expected = collect(one, Fake(1, random.Random(0)), RENDERER, wanted[2:], limits)
        assert [plain(t) for t in again] == [plain(t) for t in expected]
        assert {v for t in again for v in versions(t)} == {0, 1}


def test_an_episode_whose_environment_answers_otherwise_is_begun_anew() -> None:
    limits = Limits(max_response=60, overlap=True)
    engine = ScriptedEngine(say, RENDERER, delay=itertools.cycle([0, 30, 3, 30, 9]).__next__)
    in_flight = InFlight()
    later = tasks(0, 20, 1)
    collect(
        engine,
        Fake(8, random.Random(0)),
        RENDERER,
        [(99, 0)],
        limits,
        ahead=later,
        in_flight=in_flight,
    )
    answered = {p.key for p in in_flight.active.values() if len(p.segments) > 1}
    assert answered
    assert len(answered) < len(in_flight.active)
    state = rollout_state.to_state(in_flight)
    other = Fake(8, random.Random(0), observation="!")  # a search engine that finds other things
    loaded = rollout_state.from_state(state, other, limits, 0)
    kept = {play.key for play in loaded.active.values()}
    assert kept == {play.key for play in in_flight.active.values()} - answered
    done = collect(engine, other, RENDERER, later, limits, in_flight=loaded)
    said = [s.text for t in done if (t.episode, t.sample) in answered for s in t.segments]
    assert not any("?" in text for text in said)


STALE = "--env-args turns=3 --max-response 16 --max-in-flight 50 --max-staleness 2"


def test_training_learns_from_tokens_that_are_not_too_old(letters: Path, tmp_path: Path) -> None:
    main(flags(letters, tmp_path / "run", *STALE.split(), "--steps", "12"))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[0]["staleness_max"] == records[0]["staleness"] == 0
    assert max(r["staleness_max"] for r in records) == 2
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


@pytest.mark.parametrize(
    "more",
    [
        "--old-logprobs sampler",
        "--old-logprobs recomputed --importance-sampling-cap 2",
        "--algorithm dapo --algorithm-args max_rounds=2",  # its second rounds come unforeseen
    ],
)
def test_a_run_ahead_in_parts_equals_one_run_to_the_bit(
    letters: Path, tmp_path: Path, more: str
) -> None:
    for output, steps in (("whole", "6"), ("parts", "1"), ("parts", "4"), ("parts", "6")):
        words = f"{STALE} {more} --steps {steps}"
        main([*flags(letters, tmp_path / output), *words.split()])
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    state = checkpoint.load(tmp_path / "whole" / "checkpoints" / "step-000006").state["in_flight"]
    assert state["done"]
    assert any(each["partial_turns"] for each in state["active"])
    assert any(len(each["segments"]) > 1 for each in state["active"])


@pytest.mark.slow
def test_a_run_ahead_that_is_killed_equals_one_that_never_was(
    server: Any, letters: Path, tmp_path: Path
) -> None:
    words = {n: [*flags(letters, tmp_path / n), *STALE.split(), "--steps", "24"] for n in "ab"}
    rng, log = random.Random(0), str(tmp_path / "log")
    moments = [(phase, rng.randint(1, 2), rng.random()) for phase in PHASES]
    for moment in moments:
        process = server.Process(target=run_until_killed, args=(words["a"], log, *moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, Path(log).read_text()
    assert read_lines(tmp_path / "a" / "metrics.jsonl")[-1]["step"] < 23  # there is work left
    for name in "ab":
        process = start(server, words[name], Path(log))
        process.join()
        assert process.exitcode == 0, Path(log).read_text()
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


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


def test_several_processes_are_refused(
    letters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "rank_and_size", lambda: (0, 2))
    words = flags(letters, tmp_path / "run", "--max-staleness", "1")
    assert "--max-staleness works in one process only" in refusal(capsys, words)
