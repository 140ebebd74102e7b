"""Ranks that meet in a store which earlier starts have used."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed import DistStoreError

from research_agent.errors import RankError
from research_agent.system import rendezvous
from research_agent.system.rendezvous import open_store, unused_prefix

TIMEOUT = timedelta(seconds=20)


def meet(store: Store, size: int) -> list[Store]:
    """All ranks at once, each with the store that it gets."""
    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(unused_prefix, store, i, size, TIMEOUT) for i in range(size)]
        return [rank.result() for rank in ranks]


def test_no_start_sees_what_another_one_wrote() -> None:
    store = HashStore()
    for start, size in enumerate((3, 3, 2)):
        places = meet(store, size)
        assert not places[0].check(["address"])
        places[-1].set("address", str(start))
        assert [place.get("address") for place in places] == [str(start).encode()] * size


def test_a_rank_that_was_killed_before_the_others_came_is_forgotten() -> None:
    store = HashStore()
    store.set("name/1", "killed")
    first, second = meet(store, 2)
    second.set("address", "new")
    assert first.get("address") == b"new"


def test_a_rank_that_does_not_start_is_named() -> None:
    with pytest.raises(DistStoreError, match="timed out: rank 1 did not start"):
        unused_prefix(HashStore(), 0, 2, timedelta(seconds=0.05))


@pytest.mark.parametrize(("rank", "said"), [(0, "in use"), (1, "no answer")])
def test_a_port_that_another_program_has_is_named(
    rank: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts connections, and says nothing."""
    monkeypatch.setattr(rendezvous, "_GRACE", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**variables, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankError, match=rf"127.0.0.1:{port} .*{said}.*--master-port"):
            open_store(timedelta(seconds=1) if rank else TIMEOUT)
    for thread in threading.enumerate():  # the closed port frees it
        if thread.name == "rendezvous":
            thread.join()
