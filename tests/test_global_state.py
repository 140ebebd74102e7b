"""The check that tests leave no global state notices each kind of it."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import global_state


@pytest.mark.parametrize(
    ("leak", "mend", "said"),
    [
        (
            lambda: os.environ.update(RESEARCH_LEAK="1"),
            lambda: os.environ.pop("RESEARCH_LEAK"),
            "variable RESEARCH_LEAK",
        ),
        (lambda: os.chdir("/"), None, "working folder"),
        (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
            "default dtype",
        ),
        (
            lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN),
            lambda: signal.signal(signal.SIGALRM, signal.SIG_DFL),
            "handler of SIGALRM",
        ),
    ],
)
def test_a_leak_is_noticed(
    leak: Callable[[], object], mend: Callable[[], object] | None, said: str
) -> None:
    here, before = Path.cwd(), global_state.snapshot()
    leak()
    found = list(global_state.differences(before, global_state.snapshot()))
    (mend or (lambda: os.chdir(here)))()
    assert len(found) == 1 and said in found[0]
    assert not list(global_state.differences(before, global_state.snapshot()))


def test_a_process_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # No real one: an engine of earlier tests may hold the only group that a process can have.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    before = global_state.snapshot()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    found = list(global_state.differences(before, global_state.snapshot()))
    assert found == ["torch's process group was False and is True"]


def test_a_thread_is_noticed_unless_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    before, end = global_state.running(), threading.Event()
    monkeypatch.setattr(global_state, "_TIMEOUT", 0.0)
    thread = threading.Thread(target=end.wait, name="leaked")
    thread.start()
    assert global_state.leftovers(before) == {"thread leaked"}
    end.set()
    thread.join()
    assert global_state.leftovers(before) == set()


@pytest.mark.parametrize("run", [1, 2])
def test_random_numbers_begin_anew_in_each_test(run: int) -> None:
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
    assert drawn == (0.8444218515250481, 0.5488135039273248, 0.49625658988952637)
