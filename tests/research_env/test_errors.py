"""Errors pass between processes with their message and attributes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from research_env import errors
from research_env.adapters import FrameworkError
from research_env.datasets import load_dataset
from research_env.errors import ClosedError, ResearchEnvError, UnknownNameError
from research_env.judge.verdicts import JudgeError, NoReplyError
from research_env.retrieval.elasticsearch.session import AnswerError
from research_env.retrieval.http import TooLargeError
from research_env.testing import ConformanceError

TAKES_A_MESSAGE = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, ResearchEnvError)
    if each not in (UnknownNameError, ClosedError)
]


@pytest.mark.parametrize(
    "error",
    [
        *(each("line 3: no id") for each in TAKES_A_MESSAGE),
        *(each("x") for each in (AnswerError, ConformanceError, FrameworkError, JudgeError)),
        TooLargeError("too large"),
        UnknownNameError("split", "tset", ["train", "test"], "See the documentation."),
        ClosedError(),
        NoReplyError("refused", "403", refused=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_survives_pickle_and_copy(error: ResearchEnvError) -> None:
    error.add_note("in episode 3")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert (str(twin), repr(twin), twin.args) == (str(error), repr(error), error.args)
        assert vars(twin) == vars(error)
        # An ImportError keeps its message here, too.
        assert getattr(twin, "msg", None) == getattr(error, "msg", None)


def count_questions(split: str) -> int:
    return len(load_dataset("miniworld", split=split).questions)


def test_an_error_in_a_worker_leaves_its_pool_alive() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(UnknownNameError, match="split of miniworld 'tset'; known: dev, train"):
            pool.submit(count_questions, "tset").result()
        assert pool.submit(count_questions, "dev").result() == count_questions("dev")
