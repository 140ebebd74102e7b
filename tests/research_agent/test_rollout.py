from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.active_rollout import trajectory_seed
from research_agent.config import SamplingConfig
from research_agent.engines.base import SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.engines.transformers import TransformersEngine
from research_agent.environments import Action, StepResult, make_environments
from research_agent.errors import ConfigError, ContextError, EnvironmentContractError
from research_agent.evaluation.predictions import as_record
from research_agent.renderer import Renderer
from research_agent.rollout import collect
from research_agent.step_metrics import of_episodes
from research_agent.trajectory import SKIPPED, Trajectory
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_qwen2
from tests.research_agent.toy_env import CopyLetter, CopyLetterVector

TOY = "tests.research_agent.toy_env:CopyLetter-v0"
DOORS = "tests.research_agent.doors_env"
NATIVE = "tests.research_agent.toy_env:CopyLetterNative-v0"
RENDERER = make_renderer(byte_tokenizer())
END = RENDERER.tokenizer.eos_token_id


Limits = partial(SamplingConfig, temperature=1.0, max_prompt=100, max_response=1000)
LIMITS = Limits()


def says(*turns: str, end: bool = True) -> ScriptedEngine:
    """An engine whose n-th turn of each trajectory is the n-th of turns, over and over."""

    def script(context: Sequence[int], params: SamplingParams) -> list[int]:
        text = turns[sum(t == END for t in context) % len(turns)]
        return RENDERER.encode_text(text) + ([END] if end else [])

    return ScriptedEngine(script, RENDERER)


def play(engine: ScriptedEngine, limits: SamplingConfig = LIMITS, **env_args: Any) -> Trajectory:
    environments = make_environments(TOY, 1, env_args)
    (trajectory,) = collect(engine, environments, RENDERER, [(1, 0)], limits)
    return trajectory


@pytest.mark.parametrize("env", [f"{DOORS}:Doors-v0", f"{DOORS}:DoorsSingle-v0"])
def test_turns_keep_their_rewards_and_the_names_of_their_states(env: str) -> None:
    """Task 5 has the way 1, 0, 1; "x" goes 1 and "a" goes 0."""
    environments = make_environments(env, 1)
    (trajectory,) = collect(says("x", "x", "a"), environments, RENDERER, [(5, 0)], Limits())
    assert [turn.text for turn in trajectory.turns] == ["x", "x", "a"]
    assert [turn.reward for turn in trajectory.turns] == [0.25, 0.0, 0.0]
    assert [turn.state_key for turn in trajectory.turns] == ["5:", "5:1", "5:11"]
    assert trajectory.reward == 0.25


def outline(trajectory: Trajectory) -> list[tuple[str, str]]:
    return [(s.provenance, s.text) for s in trajectory.segments]


def test_an_episode_token_by_token() -> None:
    trajectory = play(says("bz", "x"), turns=3)
    assert outline(trajectory) == [
        ("prompt", "b="),
        ("action", "bz"),
        ("observation", "?c="),
        ("action", "x"),
        ("observation", "?d="),
        ("action", "bz"),
    ]
    assert RENDERER.decode(trajectory.tokens) == "b=bz<|im_end|>?c=x<|im_end|>?d=bz<|im_end|>"
    mask = "..AAA...AA...AAA"
    assert trajectory.action_mask == [letter == "A" for letter in mask]
    assert trajectory.segments[1].logprobs == (0.0, 0.0, 0.0)
    assert trajectory.segments[0].logprobs is None
    assert (trajectory.episode, trajectory.sample) == (1, 0)
    assert trajectory.reward == 1.0  # given for the first of three turns, and not lost since
    assert [turn.reward for turn in trajectory.turns] == [1.0, 0.0, 0.0]
    assert [turn.state_key for turn in trajectory.turns] == ["", "", ""]
    assert trajectory.metrics == {"right": 1 / 3}
    assert (trajectory.terminated, trajectory.truncated) == (True, False)
    assert trajectory.stop_reason == "answer"
    assert not trajectory.void


def test_a_chat_template_gets_the_messages() -> None:
    renderer = make_renderer(byte_tokenizer(), chat_template=True)
    environments = make_environments(TOY, 1)
    (trajectory,) = collect(says("b"), environments, renderer, [(1, 0)], Limits())
    prompt = trajectory.segments[0]
    assert (
        renderer.decode(prompt.tokens) == "<|im_start|>user\nb=<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.text == "b="


def test_terminators_end_a_turn() -> None:
    trajectory = play(says("b!c", end=False), turns=2, end="!")
    assert outline(trajectory)[1] == ("action", "b!")
    assert trajectory.reward == 1.0


@pytest.mark.parametrize(
    ("limits", "texts", "reward", "reason"),
    [
        # The last action is cut, and still given to the environment, which would go on.
        (Limits(max_response=2), ["b=", "bc"], 1.0, "length"),
        # 4 of the action and 3 of the observation leave no room for a token after it.
        (Limits(max_response=7), ["b=", "bcd"], 1.0, "length"),
        (Limits(max_response=8), ["b=", "bcd", "?c=", "b"], 1.0, "length"),
        (Limits(max_response=12), ["b=", "bcd", "?c=", "bcd"], 1.0, "length"),
        # The environment ends with the cut action: then its word counts.
        (Limits(max_response=15), ["b=", "bcd", "?c=", "bcd", "?d=", "b"], 1.0, "answer"),
        (Limits(max_response=17), ["b=", "bcd", "?c=", "bcd", "?d=", "bcd"], 1.0, "answer"),
        (Limits(max_turn_tokens=1), ["b=", "b", "?c=", "b", "?d=", "b"], 1.0, "answer"),
    ],
)
def test_budgets(limits: SamplingConfig, texts: list[str], reward: float, reason: str) -> None:
    trajectory = play(says("bcd"), limits, turns=3)
    assert [text for _, text in outline(trajectory)] == texts
    assert trajectory.reward == reward
    assert trajectory.stop_reason == reason
    assert trajectory.truncated == (reason == "length")
    assert sum(len(s.tokens) for s in trajectory.segments[1:]) <= limits.max_response


class Scored(CopyLetter):
    """One that scores an episode which is cut."""

    def truncate(self, reason: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        info = {"metrics": {"right": 0.25}, "stop_reason": reason, "void": False}
        return "", -3.0, False, True, info


class ScoredVector(CopyLetterVector):
    def truncate(self, env_ids: Sequence[int], reason: str) -> list[tuple[Any, ...]]:
        return [(i, *Scored.truncate(self.envs[i], reason)) for i in env_ids]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("budget", ["length", "context"])
def test_an_episode_that_is_cut_is_scored_by_its_environment(native: bool, budget: str) -> None:
    gym.register(
        "Scored-v0",
        entry_point=f"{__name__}:Scored",
        vector_entry_point=ScoredVector if native else None,
    )
    try:
        environments = make_environments("Scored-v0", 1, {"turns": 3})
    finally:
        del gym.registry["Scored-v0"]
    engine, limits = says("bcd"), Limits(max_response=12)
    if budget == "context":
        engine.max_context, limits = 14, Limits()
    (trajectory,) = collect(engine, environments, RENDERER, [(1, 0)], limits)
    assert [text for _, text in outline(trajectory)] == ["b=", "bcd", "?c=", "bcd"]
    assert trajectory.reward == 1.0 - 3.0
    assert trajectory.metrics == {"right": 0.25}
    assert (trajectory.stop_reason, trajectory.truncated) == (budget, True)
    assert (trajectory.terminated, trajectory.void) == (False, False)


def test_the_context_is_a_budget() -> None:
    engine = says("bcd")
    engine.max_context = 9  # prompt 2, action 4, observation 3: full
    trajectory = play(engine, turns=3)
    assert [text for _, text in outline(trajectory)] == ["b=", "bcd"]
    assert (trajectory.stop_reason, trajectory.truncated) == ("context", True)


def test_prompts_that_do_not_fit_are_named() -> None:
    with pytest.raises(ContextError, match=r"prompt of episode 1 has 2 tokens, not 1 to 1 "):
        play(says("b"), Limits(max_prompt=1))
    engine = says("b")
    engine.max_context = 2
    with pytest.raises(ContextError, match=r"episode 1 has 2 tokens"):
        play(engine)
    assert engine.busy == 0


def test_prompts_that_do_not_fit_are_skipped_on_request() -> None:
    environments = make_environments("tests.research_agent.quiz_env:Quiz-v0", 1, {"long": 1})
    episodes = [(0, 0), (1, 0), (2, 0)]
    limits = Limits(max_prompt=20)
    played = collect(says("a"), environments, RENDERER, episodes, limits, overlong_prompts="skip")
    skipped = [trajectory for trajectory in played if trajectory.stop_reason == SKIPPED]
    numbers = of_episodes(skipped)  # nothing was played, and nothing was cut short
    assert "reward" not in numbers and numbers["truncated_fraction"] == 0
    assert [trajectory.stop_reason == SKIPPED for trajectory in played] == [False, True, False]
    assert [len(trajectory.segments) for trajectory in played] == [2, 0, 2]
    assert [trajectory.void for trajectory in played] == [False, True, False]


@pytest.mark.parametrize("env", [TOY, NATIVE])
def test_numbers_of_numpy_become_pythons(env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = CopyLetter.step

    def with_numpy(self: CopyLetter, action: str) -> tuple[Any, ...]:
        observation, reward, terminated, truncated, info = step(self, action)
        return observation, np.float32(reward), np.bool_(terminated), np.bool_(truncated), info

    monkeypatch.setattr(CopyLetter, "step", with_numpy)
    environments = make_environments(env, 1)
    (trajectory,) = collect(says("b"), environments, RENDERER, [(1, 0)], LIMITS)
    assert json.loads(json.dumps(as_record(trajectory)))["reward"] == 1.0
    assert trajectory.terminated is True and trajectory.truncated is False


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (None, "the environment's step returns None; return observation, reward"),
        (("", 1.0, True, {}), r"the environment's step returns \('', 1.0, True, {}\); return"),
        (("", 1.0, True, False, None), "the environment's info is None; return a dict"),
        (("", None, True, False, {}), "the environment's reward is None; return a number"),
        (("", "good", True, False, {}), "the environment's reward is 'good'; return a number"),
        (
            ("", 1.0, True, False, {"metrics": {"em": "high"}}),
            "the environment's metric em is 'high'; return a number",
        ),
        (("", 1.0, True, False, {"metrics": [1.0]}), r"the environment's metrics are \[1.0\]; ret"),
    ],
)
def test_a_step_that_returns_something_else_is_refused(
    step: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CopyLetter, "step", lambda *_: step)
    with pytest.raises(EnvironmentContractError, match=f"^{said}"):
        play(says("b"))


class Fake:
    """Environments that answer in any order, some of them failing."""

    num_tasks: int | None = None
    terminators: tuple[str, ...] = ("!",)

    def __init__(self, num_envs: int, pick: random.Random, observation: str = "?") -> None:
        self.num_envs = num_envs
        self.pick = pick
        self.observation = observation
        self.episode: dict[int, int] = {}
        self.turns: dict[int, int] = {}
        self.ready: list[StepResult] = []

    def reset(
        self, assignments: Mapping[int, int], seed: int
    ) -> dict[int, tuple[str, Mapping[str, Any]]]:
        self.episode |= assignments
        self.turns |= dict.fromkeys(assignments, 0)
        return {i: (f"task {n} of {seed}", {"state_key": f"{n}:"}) for i, n in assignments.items()}

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        for i, action in zip(env_ids, actions, strict=True):
            assert isinstance(action, str)
            self.turns[i] += 1
            over = self.turns[i] > len(action) % 4
            void = over and action.startswith("v")
            key = f"{self.episode[i]}:{self.turns[i]}:{len(action)}"
            info = {"void": void, "stop_reason": "down" if void else "", "state_key": key}
            self.ready.append(
                StepResult(i, self.observation * len(action), len(action), over, False, info)
            )

    def recv(self, min_results: int) -> list[StepResult]:
        count = self.pick.randint(min(min_results, len(self.ready)), len(self.ready))
        self.pick.shuffle(self.ready)
        results, self.ready = self.ready[:count], self.ready[count:]
        return results

    def close(self) -> None:
        pass


@given(
    script=st.lists(st.text("abv!é", min_size=1, max_size=6), min_size=1, max_size=5),
    num_envs=st.integers(1, 6),
    episodes=st.integers(0, 7),
    samples=st.integers(1, 3),
    chance=st.integers(0, 10**6),
    overlap=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_order_of_completion_changes_nothing(
    *,
    script: list[str],
    num_envs: int,
    episodes: int,
    samples: int,
    chance: int,
    overlap: bool,
) -> None:
    wanted = list(itertools.product(range(episodes), range(samples)))

    def say(context: Sequence[int], params: SamplingParams) -> list[int]:
        return [*RENDERER.encode_text(script[(params.seed + len(context)) % len(script)]), END]

    def run(envs: int, pick: random.Random | None) -> list[Trajectory]:
        late = (lambda: pick.randint(0, 3)) if pick else (lambda: 0)
        return collect(
            ScriptedEngine(say, RENDERER, delay=late),
            Fake(envs, pick or random.Random(0)),
            RENDERER,
            wanted,
            Limits(max_response=40, overlap=overlap and pick is not None),
            seed=3,
        )

    played = run(num_envs, random.Random(chance))
    assert [(t.episode, t.sample) for t in played] == wanted
    assert played == run(1, None)
    for trajectory in played:
        assert trajectory.segments[0].text == f"task {trajectory.episode} of 3"
        assert trajectory.void == (trajectory.stop_reason == "down")
        assert trajectory.reward == sum(
            len(s.text) for s in trajectory.segments if s.provenance == "action"
        )


def test_waiting_for_all_makes_the_batches_independent_of_timing() -> None:
    """Without overlap the engine sees the same submissions whatever the environments' order."""

    def log(pick: int) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []

        class Watched(ScriptedEngine):
            def step(self) -> Any:
                seen.append(tuple(sorted(self._turns)))
                return super().step()

        engine = Watched(lambda c, p: [*RENDERER.encode_text("abc"), END], RENDERER)
        fake = Fake(3, random.Random(pick))
        collect(engine, fake, RENDERER, [(i, 0) for i in range(5)], Limits())
        return seen

    assert log(1) == log(2) == log(3)


@pytest.mark.parametrize("overlap", [False, True])
def test_no_slot_is_empty_while_an_episode_waits(overlap: bool) -> None:
    """A slot whose episode ended has the next one before the engine's next step."""
    pick = random.Random(3)
    begun: list[int] = []
    empty: list[int] = []

    class Counted(Fake):
        def reset(self, assignments: Mapping[int, int], seed: int) -> Any:
            begun.extend(assignments.values())
            return super().reset(assignments, seed)

        def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
            super().send(env_ids, actions)
            waiting.update(env_ids)

        def recv(self, min_results: int) -> list[StepResult]:
            results = super().recv(min_results)
            waiting.difference_update(result.env_id for result in results)
            return results

    class Watched(ScriptedEngine):
        def step(self) -> Any:
            if len(begun) < 60:
                empty.append(12 - self.busy - len(waiting))
            return super().step()

    waiting: set[int] = set()
    engine = Watched(
        lambda c, p: [*RENDERER.encode_text("abc"), END], RENDERER, delay=lambda: pick.randint(0, 4)
    )
    episodes = [(i, 0) for i in range(60)]
    collect(engine, Counted(12, pick), RENDERER, episodes, Limits(overlap=overlap))
    assert len(empty) > 10
    assert set(empty) == {0}


@pytest.mark.slow
def test_thousands_of_episodes_in_flight_have_bounded_memory() -> None:
    """4,096 slots, 5,000 episodes: what is held grows with those under way and the results only."""
    slots, most = 4096, 0

    class Measured(Fake):
        def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
            nonlocal most
            super().send(env_ids, actions)
            most = max(most, len(self.ready))

        def recv(self, min_results: int) -> list[StepResult]:
            results, self.ready = self.ready, []
            return results

    pick = random.Random(0)
    text = [*RENDERER.encode_text("abcde"), END]
    engine = ScriptedEngine(lambda c, p: text, RENDERER, delay=lambda: pick.randint(0, 3))
    environments = Measured(slots, pick)
    episodes = [(i, 0) for i in range(5000)]
    tracemalloc.start()
    try:
        played = collect(engine, environments, RENDERER, episodes, Limits(overlap=True))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(held / 5000, (peak - held) / slots)
    assert len(played) == 5000
    assert most <= slots
    assert not environments.ready
    # A finished episode of 25 tokens is some 2.4 kB; one under way takes less than that.
    assert held < 5000 * 5_000
    assert peak - held < slots * 5_000


def test_seeds_of_trajectories() -> None:
    triples = list(itertools.product(range(4), repeat=3))
    assert len({trajectory_seed(*triple) for triple in triples}) == len(triples)
    assert trajectory_seed(1, 2, 3) == trajectory_seed(1, 2, 3)


def test_slots_are_used_again_and_parity_holds(renderer: Renderer) -> None:
    """Twelve episodes of a real model in five slots equal the same in one."""
    episodes = [(episode, sample) for episode in range(4) for sample in range(3)]

    def run(slots: int) -> list[Trajectory]:
        engine = TransformersEngine(tiny_qwen2(), renderer, slots)
        environments = make_environments(TOY, slots, {"turns": 3})
        return collect(engine, environments, renderer, episodes, Limits(max_turn_tokens=6), seed=5)

    for one, many in zip(run(1), run(5), strict=True):
        assert one.tokens == many.tokens
        assert one.reward == many.reward
    samples = {tuple(t.tokens) for t in run(5) if t.episode == 0}
    assert len(samples) == 3


def test_results_are_told_as_they_end() -> None:
    ended: list[Trajectory] = []
    environments = make_environments(TOY, 2, {})
    trajectories = collect(
        says("b"),
        environments,
        RENDERER,
        [(0, 0), (1, 0), (5, 2)],
        Limits(),
        on_finish=ended.append,
    )
    assert ended == trajectories
    assert [t.reward for t in trajectories] == [0.0, 1.0, 1.0]  # episode 5 is task 1 again


@pytest.mark.parametrize("env_id", [TOY, NATIVE])
def test_both_kinds_of_environments(env_id: str) -> None:
    environments = make_environments(env_id, 3, {"turns": 2, "end": "!"})
    assert (environments.num_envs, environments.num_tasks) == (3, 4)
    assert environments.terminators == ("!",)
    begun = environments.reset({0: 2, 2: 5}, seed=1)
    assert {i: observation for i, (observation, _) in begun.items()} == {0: "c=", 2: "b="}
    assert [m["content"] for m in begun[2][1]["messages"]] == ["b="]
    environments.send([2, 0], ["b", "b"])
    results = {r.env_id: r for r in environments.recv(2)}
    assert {i: (r.observation, r.reward) for i, r in results.items()} == {
        0: ("?d=", 0.0),
        2: ("?c=", 1.0),
    }
    assert environments.reset({0: 3}, seed=1)[0][0] == "d="
    environments.send([0, 2], ["d", "x"])
    results = {r.env_id: r for r in environments.recv(2)}
    assert not results[0].terminated
    assert results[2].terminated
    assert results[2].info["metrics"] == {"right": 0.5}
    environments.close()


def test_an_environment_without_the_option_is_seeded_with_the_episode() -> None:
    class Rolls(gym.Env[str, str]):
        action_space = observation_space = gym.spaces.Text(9)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, Any]:
            super().reset(seed=seed)
            return f"{self.np_random.integers(10**6)}", {}

    gym.register("Rolls-v0", entry_point=Rolls)  # type: ignore[arg-type]
    environments = make_environments("Rolls-v0", 3)
    assert environments.num_tasks is None
    begun = environments.reset({0: 7, 1: 7, 2: 8}, seed=1)
    texts = [begun[i][0] for i in range(3)]
    assert texts[0] == texts[1] != texts[2]
    assert environments.reset({0: 7}, seed=2)[0][0] != texts[0]


def test_environments_that_cannot_be_played_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"CopyLeter-v0'.*Did you mean: `CopyLetter`"):
        make_environments("tests.research_agent.toy_env:CopyLeter-v0", 1)
    with pytest.raises(ConfigError, match=r"no environment 'Nothing-v0'"):
        make_environments("Nothing-v0", 1)
    with pytest.raises(ConfigError, match=r"no environment 'no_such_module:A-v0'"):
        make_environments("no_such_module:A-v0", 1)
    for name, module in (("./my_env.py:A-v0", "./my_env.py"), (":A-v0", "")):
        with pytest.raises(ConfigError, match=f"no environment '{name}': '{module}' is no name"):
            make_environments(name, 1)
    with pytest.raises(EnvironmentContractError, match=r"observes ndarray .* not text"):
        make_environments("CartPole-v1", 1).reset({0: 0}, seed=0)


def test_an_environment_that_goes_on_in_the_step_that_ends_an_episode_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = []
    monkeypatch.setattr(CopyLetterVector, "close_extras", lambda _: closed.append(1))
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        monkeypatch.setattr(CopyLetterVector, "metadata", {"autoreset_mode": mode})
        assert make_environments(NATIVE, 2).num_envs == 2
    monkeypatch.setattr(CopyLetterVector, "metadata", {"autoreset_mode": AutoresetMode.SAME_STEP})
    with pytest.raises(EnvironmentContractError, match=r"mode SameStep, .* in the mode NextStep"):
        make_environments(NATIVE, 2)
    assert closed == [1]
