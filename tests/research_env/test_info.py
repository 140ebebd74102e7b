"""Infos of many environments as one, against Gymnasium's own way."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from hypothesis import given
from hypothesis import strategies as st

from research_env.info import batch_infos

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "text": st.text(max_size=3),
    "final_obs": st.text(max_size=3),
    "count": st.integers(-9, 9),
    "score": st.floats(allow_nan=False),
    "void": st.booleans(),
    "ids": st.lists(st.text(max_size=2), max_size=3).map(tuple),
    "none": st.none(),
    "share": st.floats(0, 1).map(np.float32),
    "many": st.integers(-9, 9).map(np.int64),
    "pair": st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(np.array),
}
INFO = st.fixed_dictionaries(
    {"question": st.text(max_size=3)},
    optional={
        **VALUES,
        "metrics": st.dictionaries(st.sampled_from(["f1", "em"]), st.floats(0, 1)),
        "final_info": st.fixed_dictionaries({}, optional={**VALUES, "strata": st.just({"a": "b"})}),
    },
)


def plain(infos: Any) -> Any:
    """Arrays as their types and values, in the order of the keys."""
    if isinstance(infos, dict):
        return [(key, plain(value)) for key, value in infos.items()]
    return (str(infos.dtype), infos.tolist()) if isinstance(infos, np.ndarray) else infos


@given(st.dictionaries(st.integers(0, 4), INFO, max_size=5))
def test_infos_are_batched_as_gymnasium_does(infos: dict[int, dict[str, Any]]) -> None:
    env: VectorEnv[Any, Any, Any] = VectorEnv()
    env.num_envs = 5
    expected: dict[str, Any] = {}
    for i, info in infos.items():
        expected = env._add_info(expected, info, i)
    assert plain(batch_infos(infos, 5)) == plain(expected)


def test_what_a_sub_environment_has_not_is_zero_or_none() -> None:
    got = batch_infos({2: {"n": 3, "ids": ("a",)}, 0: {"n": 1}}, 3)
    assert {key: value.tolist() for key, value in got.items()} == {
        "n": [1, 0, 3],
        "_n": [True, False, True],
        "ids": [None, None, ("a",)],
        "_ids": [False, False, True],
    }
    assert batch_infos({}, 3) == {}
