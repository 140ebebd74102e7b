"""The space of texts, alone and through Gymnasium's vector environments."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.vector.utils import (
    batch_space,
    concatenate,
    create_empty_array,
    create_shared_memory,
    iterate,
    read_from_shared_memory,
    write_to_shared_memory,
)
from hypothesis import given
from hypothesis import strategies as st

from research_env import UnicodeText

write: Any = write_to_shared_memory  # Gymnasium's types know of arrays only
read: Any = read_from_shared_memory
ANY_TEXT = st.text(st.characters(), max_size=40)


class Echo(gym.Env[str, str]):
    """Observes its last action, twice over if asked to."""

    def __init__(self, times: int = 1) -> None:
        self.times = times
        self.action_space = UnicodeText(terminators=("!",))
        self.observation_space = UnicodeText(max_length=100)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return "start", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return action * self.times, 0.0, False, False, {}


def test_all_strings_and_only_strings_are_in_it() -> None:
    space = UnicodeText()
    for text in ("", "a", "漢字 🙂", "\x00", "\ud800", "x" * 1_000_000, "<search>"):
        assert text in space
    for other in (None, 1, b"a", ["a"], np.array("a")):
        assert other not in space


def test_samples_are_seeded_short_and_without_terminators() -> None:
    space, same = UnicodeText(terminators=("</search>",), seed=1), UnicodeText(seed=1)
    samples = [space.sample() for _ in range(50)]
    assert samples == [same.sample() for _ in range(50)]
    assert len(set(samples)) > 40
    assert all(sample in space and "</search>" not in sample for sample in samples)
    with pytest.raises(ValueError, match="neither a mask"):
        space.sample(mask=np.ones(3))  # type: ignore[arg-type]


def test_spaces_are_equal_by_what_they_hold() -> None:
    space = UnicodeText(terminators=["a", "b"])
    assert space == UnicodeText(terminators=("a", "b"), seed=3)
    assert space != UnicodeText(terminators=("a",))
    assert space != UnicodeText(terminators=("a", "b"), max_length=5)
    assert hash(space) == hash(UnicodeText(terminators=("a", "b")))
    for twin in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert twin == space
        assert twin.terminators == ("a", "b")


@given(st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_batches_json_and_shared_memory_keep_every_character(texts: list[str]) -> None:
    space, n = UnicodeText(max_length=100), len(texts)
    batched = batch_space(space, n)
    batch = concatenate(space, texts, create_empty_array(space, n))  # type: ignore[arg-type]
    assert batch == tuple(texts)
    assert batch in batched
    assert list(iterate(batched, batch)) == texts
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(texts)))) == texts

    memory = create_shared_memory(space, n, multiprocessing)
    view = read(space, memory, n)
    assert list(view) == [""] * n
    for i, text in enumerate(texts):
        write(space, i, "something longer that must not shine through", memory)
        write(space, i, text, memory)
    assert copy.deepcopy(view) == tuple(texts)
    assert view[0:n] == tuple(texts)


def test_a_text_too_long_for_shared_memory_says_what_to_do() -> None:
    space = UnicodeText(max_length=3)
    memory = create_shared_memory(space, 1, multiprocessing)
    with pytest.raises(ValueError, match=r"4 characters.*made for 3.*shared_memory=False"):
        write(space, 0, "abcd", memory)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_texts_cross_processes_unharmed(shared_memory: bool) -> None:
    texts = ("<search>ä\x00🙂</search>", "\ud83d lone")
    envs = AsyncVectorEnv([Echo] * 2, shared_memory=shared_memory)
    try:
        assert envs.reset()[0] == ("start", "start")
        assert envs.step(texts)[0] == texts
        assert envs.step(("", "x"))[0] == ("", "x")
    finally:
        envs.close()


def test_texts_go_through_the_synchronous_vector_environment() -> None:
    envs = SyncVectorEnv([lambda: Echo(2)] * 2)
    assert envs.reset()[0] == ("start", "start")
    assert envs.step(("ab", "é"))[0] == ("abab", "éé")
    assert envs.single_action_space == UnicodeText(terminators=("!",))
