"""Trees of trajectories: where they branch, what is shared, and that nothing is paid for twice."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from research_agent import rollout_state
from research_agent.active_rollout import ActiveRollout, InFlight
from research_agent.batch import make_batch
from research_agent.cli import main
from research_agent.engines.base import Completion, SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.engines.transformers import TransformersEngine
from research_agent.environments import Environments, make_environments
from research_agent.errors import ConfigError, OverlongPromptError
from research_agent.rollout import RolloutLoop, collect
from research_agent.run_logger import METRICS, read_lines
from research_agent.trace import Trace, TracedEngine
from research_agent.trajectory import NOT_GROWN, SKIPPED, Group, Segment, Trajectory
from research_agent.tree_plan import TreePlan
from research_agent.trees import Forking, Trees
from tests.research_agent.conftest import (
    byte_tokenizer,
    make_renderer,
    save_letter_model,
    tiny_qwen2,
)
from tests.research_agent.doors_env import Doors
from tests.research_agent.test_rollout import Limits
from tests.research_agent.test_staleness import Unable, plain
from tests.research_agent.torchrun import in_two_processes

DOORS = "tests.research_agent.doors_env:Doors-v0"
RENDERER = make_renderer(byte_tokenizer())
END = RENDERER.tokenizer.eos_token_id


def say(context: Sequence[int], params: SamplingParams) -> list[int]:
    """A turn that depends on the sample's seed and on all that was said."""
    pick = random.Random(f"{params.seed} {list(context)}")
    return [*RENDERER.encode_text(pick.choice(["a", "bb", "x", "zz"])), END]


def scripted(delays: int = 0) -> ScriptedEngine:
    pick = random.Random(delays)
    return ScriptedEngine(say, RENDERER, delay=lambda: pick.randint(0, delays))


def play(
    plan: TreePlan,
    engine: Any = None,
    *,
    tasks: int = 2,
    trees: int = 2,
    slots: int | None = None,
    overlap: bool = False,
    environments: Environments | None = None,
    seed: int = 0,
    overlong_prompts: Literal["error", "skip"] = "error",
) -> list[Trajectory]:
    wanted = [(task, sample) for task in range(tasks) for sample in range(trees * plan.size)]
    environments = environments or make_environments(DOORS, slots or len(wanted), {"doors": 4})
    return collect(
        engine or scripted(),
        environments,
        RENDERER,
        wanted,
        Limits(overlap=overlap),
        plan=plan,
        seed=seed,
        overlong_prompts=overlong_prompts,
    )


def shared(t: Trajectory) -> int:
    return len(t.lineage)


def grouped(played: Sequence[Trajectory]) -> list[Group]:
    return [Group(e, list(g)) for e, g in itertools.groupby(played, attrgetter("episode"))]


def test_a_plan_literal() -> None:
    """Two rounds of three branches: a tree has seven samples; 7 to 13 are the second one."""
    plan = TreePlan(branches=3, rounds=2)
    assert plan.size == 7
    assert [plan.root(sample) for sample in (0, 6, 7, 13)] == [0, 0, 7, 7]
    assert [plan.round(sample) for sample in range(7, 14)] == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("choose", ["random", "entropy"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_branches_share_what_came_before_and_nothing_else(choose: Any, rounds: int) -> None:
    plan = TreePlan(branches=2, rounds=rounds, choose=choose)
    played = play(plan, tasks=4)
    by_key = {(t.episode, t.sample): t for t in played}
    depths = Counter[int]()
    for t in played:
        root = plan.root(t.sample)
        assert t.tree == (None if t.sample == root else root)
        assert len(t.turns) == 4 and t.terminated
        assert t.reward == sum(turn.reward for turn in t.turns)
        assert [turn.state_key for turn in t.turns] == [
            f"{t.episode}:" + "".join("0" if u.text[0] <= "m" else "1" for u in t.turns[:k])
            for k in range(4)
        ]
        for k, sample in enumerate(t.lineage):
            source = by_key[t.episode, sample]
            assert plan.root(sample) == root and plan.round(sample) < plan.round(t.sample)
            assert t.turns[k] == source.turns[k]  # tokens, log-probabilities, reward and all
        depths[shared(t)] += t.sample != root
    assert len(depths) > 2  # branches leave at several depths, never after the last turn
    assert set(depths) <= {0, 1, 2, 3}


@pytest.mark.parametrize("rounds", [1, 2])
def test_trees_of_a_prompt_that_is_too_long_are_skipped_whole(
    rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = Doors.reset

    def reset_long(self: Doors, **options: Any) -> tuple[str, dict[str, Any]]:
        observation, info = reset(self, **options)
        return ("1=" * 60 if observation == "1=" else observation), info

    plan = TreePlan(branches=2, rounds=rounds)
    short = play(plan, tasks=3, slots=7)
    monkeypatch.setattr(Doors, "reset", reset_long)
    with pytest.raises(OverlongPromptError, match=r"episode 1 has 120 tokens"):
        play(plan, tasks=3, slots=7)
    played = play(plan, tasks=3, slots=7, overlong_prompts="skip")
    assert [(t.episode, t.sample) for t in played] == [(t.episode, t.sample) for t in short]
    for t, same in zip(played, short, strict=True):
        if t.episode == 1:
            assert (t.stop_reason, t.void, t.segments) == (SKIPPED, True, ())
        else:
            assert t == same


def test_nothing_that_is_shared_is_sampled_or_taken_again() -> None:
    """The environments take one step per node of the trees, not per turn of the trajectories."""
    environments = make_environments(DOORS, 12, {"doors": 4})
    played = play(TreePlan(branches=2), environments=environments)
    batch = make_batch(grouped(played))
    nodes = len(set(batch.turn_nodes.tolist()))
    vector: Any = environments._vector  # type: ignore[attr-defined]
    assert vector.steps == nodes < len(batch.turn_nodes) == 4 * len(played)
    for i, t in enumerate(played):
        own = batch.turn_nodes[batch.turn_seq_ids == i].tolist()
        assert [node < 4 * i for node in own] == [k < shared(t) for k in range(4)]
    assert batch.trees.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]


@settings(max_examples=20, deadline=None)
@given(
    slots=st.integers(5, 20),
    delays=st.integers(0, 4),
    overlap=st.booleans(),
    seed=st.integers(0, 3),
)
def test_timing_and_the_number_of_slots_change_nothing(
    slots: int, delays: int, overlap: bool, seed: int
) -> None:
    plan = TreePlan(branches=2, rounds=2)
    expected = play(plan, seed=seed)
    assert play(plan, scripted(delays), slots=slots, overlap=overlap, seed=seed) == expected


def test_chains_are_those_of_a_run_without_trees() -> None:
    """A chain's draws depend on its own sample, whatever grows beside it."""
    plan = TreePlan(branches=2)
    trees = play(plan)
    chains = [t for t in trees if t.tree is None]
    alone = collect(
        scripted(),
        make_environments(DOORS, 4, {"doors": 4}),
        RENDERER,
        [(t.episode, t.sample) for t in chains],
        Limits(),
    )
    assert alone == chains


def test_random_branches_leave_every_turn_equally_often() -> None:
    """Four states to leave from, a quarter each: 2,400 draws are within 5 standard deviations."""
    plan = TreePlan(branches=12)
    played = play(plan, tasks=8, trees=25)
    depths = Counter(shared(t) for t in played if t.tree is not None)
    count = depths.total()
    assert count == 2400
    sigma = (count * 0.25 * 0.75) ** 0.5
    assert all(abs(depths[k] - count / 4) < 5 * sigma for k in range(4))


class Surprised(ScriptedEngine):
    """Reports log-probabilities by the turn: unlikely ones at the third."""

    def step(self) -> list[Any]:
        return [
            replace(turn, logprobs=(self._logprob(turn),) * len(turn.tokens))
            for turn in super().step()
        ]

    def _logprob(self, turn: Any) -> float:
        asked = RENDERER.decode(self._held[turn.slot]).rpartition("?")[2].partition("=")[0]
        return -60.0 if len(asked) == 2 else -1.0


def test_entropy_prefers_the_turn_that_was_less_certain_than_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With beta at 1, and alpha near 0, only the third turn is worth a branch."""
    monkeypatch.setattr("research_agent.trees.BRANCH_PROBABILITY", 1e-6)
    monkeypatch.setattr("research_agent.trees.ENTROPY_WEIGHT", 1.0)
    plan = TreePlan(branches=4, choose="entropy")
    played = play(plan, Surprised(say, RENDERER), tasks=4)
    depths = Counter(shared(t) for t in played if t.tree is not None)
    assert depths[2] == depths.total()


def test_the_probability_of_a_branch_is_that_of_arpo() -> None:
    """By hand: alpha .5, beta .2; first turn 2 + 1 nats, this one 7; log of 1,000 tokens."""
    trees: Any = Trees(TreePlan(1, choose="entropy"), 0, make_environments(DOORS, 2), 1000)
    first = ActiveRollout(0, 0, 0, Limits())
    turn = Completion(0, (1, 2, 3), (-3.0, -4.0, 0.0), "", "stop", 0)
    assert trees._branch_probability(first, turn) == 0.5
    later = ActiveRollout(0, 0, 0, Limits(), [Segment("action", (5, 6), (-2.0, -1.0))])
    expected = 0.5 + 0.2 * (7 - 3) / math.log(1000)
    assert trees._branch_probability(later, turn) == pytest.approx(expected)
    cut = replace(turn, tokens=(1,), logprobs=(-3.0,))
    later.partial_turns, rest = [cut], replace(turn, tokens=(2, 3), logprobs=(-4.0, 0.0))
    assert trees._branch_probability(later, rest) == pytest.approx(expected)  # cut by new weights
    later.partial_turns = []
    calm = replace(turn, logprobs=(0.0, 0.0, 0.0))
    assert trees._branch_probability(later, calm) < 0.5


# ---------------------------------------------------------------------------------------------
# Budgets


def sampled(played: Sequence[Trajectory]) -> Counter[tuple[int, int]]:
    """Turns taken per tree."""
    counts = Counter[tuple[int, int]]()
    for t in played:
        counts[t.episode, t.sample if t.tree is None else t.tree] += len(t.own_turns)
    return counts


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.booleans(), st.integers(0, 3), st.integers(0, 4))
def test_no_tree_takes_more_turns_than_its_budget_unless_its_chain_does(
    budget: int, overlap: bool, seed: int, delays: int
) -> None:
    """Episodes have four turns, so what a branch costs is known: its source's rest."""
    plan = TreePlan(branches=3, rounds=2, max_turns=budget)
    unlimited = play(replace(plan, max_turns=None), seed=seed)
    played = play(plan, scripted(delays), seed=seed, overlap=overlap, slots=14)
    assert [(t.episode, t.sample) for t in played] == [(t.episode, t.sample) for t in unlimited]
    grown = [t for t in played if t.stop_reason != NOT_GROWN]
    assert all(t.void and not t.segments for t in played if t not in grown)
    assert all(count <= max(budget, 4) for count in sampled(grown).values())
    chains = [t for t in played if t.tree is None and t in grown]
    assert len(chains) == 4
    assert chains == [t for t in unlimited if t.tree is None]
    for t, free in zip(played, unlimited, strict=True):
        if plan.round(t.sample) == 1 and t in grown:
            assert t == free
    if budget >= 4 + 6 * 4:
        assert played == unlimited


def test_a_budget_of_tokens_counts_shared_ones_once() -> None:
    played = play(TreePlan(branches=4, max_tokens=16), tasks=4)
    whole = play(TreePlan(branches=4), tasks=4)
    grown = [t for t in played if t.stop_reason != NOT_GROWN]
    assert 8 < len(grown) < len(whole)
    tokens = Counter[tuple[int, int]]()
    for t in grown:
        own = sum(len(turn.tokens) for turn in t.own_turns)
        tokens[t.episode, t.sample if t.tree is None else t.tree] += own
    assert sum(tokens.values()) < sum(len(u.tokens) for t in whole for u in t.own_turns)
    make_batch(grouped(played))


def test_a_fork_prefills_nothing_and_samples_what_a_new_slot_would() -> None:
    """The transformers engine copies keys and values: what is forwarded is the new tokens alone."""
    model = tiny_qwen2(len(RENDERER.tokenizer))
    plan = TreePlan(branches=3)
    limits = Limits(max_turn_tokens=5)

    played, forwarded = [], []
    for forks in (True, False):
        engine = TransformersEngine(model, RENDERER, max_slots=8, max_context=256)
        used: Any = engine if forks else Unable(engine)
        wanted = [(task, sample) for task in range(2) for sample in range(4)]
        environments = make_environments(DOORS, 8, {"doors": 4})
        played.append(collect(used, environments, RENDERER, wanted, limits, plan=plan))
        forwarded.append(engine.forwarded_tokens)
    for one, other in zip(*played, strict=True):
        assert one.tokens == other.tokens and one.lineage == other.lineage
        for a, b in zip(one.turns, other.turns, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert any(shared(t) > 1 for t in played[0])
    assert forwarded[0] < forwarded[1]
    again = sum(
        sum(len(s.tokens) for s in _before(t, shared(t))) - 1
        for t in played[0]
        if t.tree is not None
    )
    assert forwarded[1] - forwarded[0] == again  # each prefix, but for its last token


def _before(t: Trajectory, turns: int) -> list[Any]:
    """The segments before a turn."""
    at = [i for i, s in enumerate(t.segments) if s.provenance == "action"][turns]
    return list(t.segments[:at])


def test_forks_that_make_no_sense_are_refused() -> None:
    engine = TransformersEngine(tiny_qwen2(300), RENDERER, max_slots=2, max_context=50)
    with pytest.raises(ValueError, match="slot 0 holds 0 tokens, not 3"):
        engine.fork(0, 1, 3)
    with pytest.raises(ValueError, match="slot 1 is busy or the source"):
        engine.fork(1, 1, 0)


def test_environments_that_cannot_branch_are_refused() -> None:
    single = make_environments("tests.research_agent.doors_env:DoorsSingle-v0", 6)
    with pytest.raises(ConfigError, match=r"no branch\(source, targets\), which trees need"):
        play(TreePlan(branches=2), environments=single)
    few = make_environments(DOORS, 2)
    with pytest.raises(ConfigError, match="a tree of 3 samples needs as many environments"):
        play(TreePlan(branches=2), environments=few)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"branches": -1}, "a tree's branches is -1"),
        ({"branches": 1, "rounds": 0}, "a tree's rounds is 0"),
        ({"branches": 1, "choose": "luck"}, "a tree chooses by 'luck'"),
        ({"branches": 1, "max_turns": 0}, "a tree's max_turns is 0"),
        ({"branches": 0, "max_tokens": 9}, "a tree's max_tokens is 9 with 0 branches"),
    ],
)
def test_plans_that_make_no_sense_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TreePlan(**setting)


# ---------------------------------------------------------------------------------------------
# Ahead of learning


AHEAD = TreePlan(branches=2, rounds=2)


def keys_of(step: int) -> list[tuple[int, int]]:
    """Two tasks of two trees per step."""
    return [(2 * step + task, sample) for task in range(2) for sample in range(2 * AHEAD.size)]


def alone(keys: list[tuple[int, int]], plan: TreePlan = AHEAD) -> list[Trajectory]:
    environments = make_environments(DOORS, 10, {"doors": 4})
    return collect(scripted(), environments, RENDERER, keys, Limits(), plan=plan)


@settings(max_examples=20, deadline=None)
@given(
    slots=st.integers(5, 30),
    chance=st.integers(0, 99),
    overlap=st.booleans(),
    choose=st.sampled_from(["random", "entropy"]),
)
def test_trees_grow_on_while_weights_change(
    slots: int, chance: int, overlap: bool, choose: Any
) -> None:
    """Cut in the middle of turns, they are those that grow without a break."""
    plan, pick = replace(AHEAD, choose=choose), random.Random(chance)
    engine = ScriptedEngine(say, RENDERER, delay=lambda: pick.randint(0, 5))
    environments = make_environments(DOORS, slots, {"doors": 4})
    loop = RolloutLoop(engine, environments, RENDERER, Limits(overlap=overlap), plan=plan)
    for step in range(3):
        loop.enqueue([*keys_of(step), *keys_of(step + 1)])
        played = loop.finish(keys_of(step))
        for _ in range(pick.randint(0, 20)):
            if loop.has_work:
                loop.advance()
        assert [plain(t) for t in played] == [plain(t) for t in alone(keys_of(step), plan)]
        assert all(step - 1 <= v <= step for t in played for u in t.turns for v in u.versions or ())
        loop.suspend()
        assert engine.busy == 0 and not any(engine._held.values())
        engine.load_weights([], step + 1)
        loop.resume()


def test_what_an_engine_copied_for_a_branch_is_submitted_again_after_a_cut() -> None:
    model, limits = tiny_qwen2(len(RENDERER.tokenizer)), Limits(max_turn_tokens=5)
    plan, keys = TreePlan(branches=3), [(task, sample) for task in range(2) for sample in range(4)]

    def playing() -> RolloutLoop:
        engine = TransformersEngine(model, RENDERER, max_slots=8, max_context=256)
        environments = make_environments(DOORS, 8, {"doors": 4})
        return RolloutLoop(engine, environments, RENDERER, limits, plan=plan)

    whole, cut = playing(), playing()
    whole.enqueue(keys)
    cut.enqueue(keys)
    while cut.has_work:
        for _ in range(3):
            cut.advance()
        cut.suspend()
        cut.resume()
    both = zip(whole.finish(keys), cut.finish(keys), strict=True)
    assert all(one.tokens == other.tokens and one.lineage == other.lineage for one, other in both)


def test_whole_trees_survive_a_checkpoint_and_others_grow_anew() -> None:
    later = [*keys_of(1), *keys_of(2)]
    plan = replace(AHEAD, max_turns=14)  # some branches do not fit
    pick = random.Random(0)
    engine = ScriptedEngine(say, RENDERER, delay=lambda: pick.choice([0, 0, 30]))
    environments = make_environments(DOORS, 20, {"doors": 4})
    loop = RolloutLoop(engine, environments, RENDERER, Limits(), plan=plan)
    loop.enqueue([*keys_of(0), *later])
    loop.finish(keys_of(0))
    while len({t.stop_reason for t in loop.in_flight.done.values()}) < 2:
        loop.advance()
    done, state = loop.in_flight.done, rollout_state.to_state(loop.in_flight)
    assert loop.in_flight.active
    fresh = make_environments(DOORS, 20, {"doors": 4})
    kept = rollout_state.from_state([state], fresh, Limits(), 0, later, plan=plan)
    trees = Counter((e, plan.root(s)) for e, s in kept.done)
    assert set(trees.values()) == {plan.size} and not kept.active
    assert kept.done.items() < done.items()
    again = RolloutLoop(scripted(), fresh, RENDERER, Limits(), in_flight=kept, plan=plan)
    again.enqueue(later)
    assert list(map(plain, again.finish(later))) == list(map(plain, alone(later, plan)))
    failed = {key: replace(t, void=True) for key, t in done.items()}
    state = rollout_state.to_state(InFlight(done=failed))
    assert not rollout_state.from_state([state], fresh, Limits(), 0, later, plan=plan).done


# ---------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_letter_model(tmp_path_factory.mktemp("doors"), "azxy=?01234567")


def run_words(model: Path, output: Path, *more: str, algorithm: str = "tree_grpo") -> list[str]:
    words = f"train miniworld --env {DOORS} --model {model} --output {output}"
    words += f" --algorithm {algorithm} --algorithm-args kl_coef=0 --tree-branches 2"
    words += " --prompts-per-step 4 --group-size 6 --max-prompt 8 --max-response 40"
    words += " --max-turn-tokens 2 --learning-rate 0.003 --warmup-steps 0 --save-every 1"
    words += " --eval-every None --quiet --device cpu"
    return [*words.split(), *more]


def run(model: Path, output: Path, *more: str, algorithm: str = "tree_grpo") -> Path:
    main(run_words(model, output, *more, algorithm=algorithm))
    return output


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("tree_grpo", []), ("arpo", ["--tree-choice", "entropy", "--tree-max-turns", "5"])],
)
def test_a_run_in_two_parts_equals_one_run_to_the_bit(
    model: Path, tmp_path: Path, algorithm: str, more: list[str]
) -> None:
    whole = run(model, tmp_path / "whole", "--steps", "3", *more, algorithm=algorithm)
    parts = run(model, tmp_path / "parts", "--steps", "1", *more, algorithm=algorithm)
    run(model, parts, "--steps", "3", *more, algorithm=algorithm)
    weights = [
        load_file(folder / "checkpoints/step-000003/model.safetensors") for folder in (whole, parts)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [read_lines(folder / METRICS) for folder in (whole, parts)]
    assert lines[0] == lines[1]
    assert all(line["learner/grad_norm"] > 0 for line in lines[0])
    for line in lines[0]:
        assert line["episodes"] == 24 if not more else 8 <= line["episodes"] < 24
        assert line["void_fraction"] == 0
        assert line["sampled_turns"] <= (24 * 3 if not more else 8 * 5)


def test_a_trace_changes_nothing_and_still_copies_what_branches_share(
    model: Path, tmp_path: Path
) -> None:
    plain = run(model, tmp_path / "plain", "--steps", "1")
    traced = run(model, tmp_path / "traced", "--steps", "1", "--trace", str(tmp_path / "t.json"))
    assert read_lines(plain / METRICS) == read_lines(traced / METRICS)
    engine = TransformersEngine(tiny_qwen2(300), RENDERER, max_slots=2, max_context=50)
    trace = Trace(tmp_path / "own.json")
    assert isinstance(TracedEngine(engine, trace), Forking)
    assert not isinstance(TracedEngine(scripted(), trace), Forking)
    trace.close()


@pytest.mark.usefixtures("forks")
def test_a_run_ahead_in_parts_plays_each_sample_once(model: Path, tmp_path: Path) -> None:
    more = ["--max-staleness", "1", "--log-episodes", "99"]
    output = run(model, tmp_path / "run", *more, "--steps", "2")
    run(model, output, *more, "--steps", "4")
    records = read_lines(output / METRICS)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert max(record["staleness_max"] for record in records) == 1
    assert all(record["sampled_turns"] < 24 * 3 for record in records)  # branches share turns
    played = [
        (r["step"], r["episode"], r["sample"]) for r in read_lines(output / "trajectories.jsonl")
    ]
    assert sorted(played) == [
        (step, 4 * (step - 1) + task, sample)
        for step in range(1, 5)
        for task in range(4)
        for sample in range(6)
    ]


@pytest.mark.slow
def test_two_ranks_play_whole_trees(model: Path, tmp_path: Path) -> None:
    """Six trees, three per rank; the updates are those of one process."""
    more = ["--steps", "2", "--prompts-per-step", "3", "--log-episodes", "99"]
    one = run(model, tmp_path / "one", *more)
    two = tmp_path / "two"
    in_two_processes("research_agent.cli", *run_words(model, two, *more))
    for ours, theirs in zip(*(read_lines(folder / METRICS) for folder in (one, two)), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--group-size", "8"], "a group of 8 samples is no number of trees of 3"),
        (["--tree-branches", "-1"], "a tree's branches is -1"),
        (["--env", "tests.research_agent.toy_env:CopyLetter-v0"], "no branch(source, targets)"),
        (["--max-in-flight", "2"], "raise --max-in-flight"),
    ],
)
def test_runs_that_cannot_grow_trees_are_refused(
    model: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(model, tmp_path / "run", "--steps", "1", *more)
    assert message in capsys.readouterr().err


def test_search_episodes_grow_trees() -> None:
    """The environment of this repository offers branches: shared searches run once."""
    environments = make_environments(
        "research_env:ReSearch-MiniWorld-v0",
        6,
        {"template": "question", "top_k": 1, "turn_reward": "first_search", "reward": "em"},
    )

    def look_up(context: Sequence[int], params: SamplingParams) -> list[int]:
        asked = RENDERER.decode([t for t in context if t != END]).count("<search>")
        word = random.Random(f"{params.seed} {asked}").choice(["company", "city", "founder"])
        text = f"<search>{word}</search>" if asked < 3 else "<answer>\\boxed{x}</answer>"
        return [*RENDERER.encode_text(text), END]

    engine = ScriptedEngine(look_up, RENDERER)
    plan = TreePlan(branches=2)
    wanted = [(0, sample) for sample in range(6)]
    played = collect(
        engine,
        environments,
        RENDERER,
        wanted,
        Limits(max_prompt=1000, max_response=3000),
        plan=plan,
    )
    by_sample = {t.sample: t for t in played}
    for t in played:
        assert t.terminated and t.metrics["searches"] == 3.0
        assert t.reward == t.metrics["turn_reward/first_search"] == 1.0
        for k, sample in enumerate(t.lineage):
            assert t.turns[k] == by_sample[sample].turns[k]
    assert any(t.lineage for t in played)
    environments.close()
