"""Open torchrun's store so that the ranks of one start share nothing with earlier starts."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed import DistError, DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from research_agent.errors import RankError
from research_agent.system.threads import in_thread

_GRACE = 5.0  # seconds beyond the timeout, so that torch's own error comes first


def open_store(timeout: timedelta) -> tuple[Store, int, int]:
    """Open the store that torchrun's variables name, for the ranks of this start only.

    Args:
        timeout: how long a rank waits for the others.

    Returns:
        The store, this rank's number, and the number of ranks.

    Raises:
        RankError: the address cannot be used, or another rank did not come in time.
    """
    try:
        # torch waits forever for a program that accepts connections and never answers.
        meeting = in_thread(lambda: next(rendezvous("env://", timeout=timeout)), "rendezvous")
        store, rank, size = meeting.result(timeout.total_seconds() + _GRACE)
        store.set_timeout(timeout)
        return unused_prefix(store, rank, size, timeout), rank, size
    except (DistError, TimeoutError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cause = str(error) or "no answer"
        message = (
            f"the ranks cannot meet at {place} ({cause.splitlines()[0]}). If another program "
            "has that port, give torchrun another --master-port"
        )
        raise RankError(message) from error


def unused_prefix(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """Agree on a prefix that no earlier start of the ranks has used.

    torchrun keeps one store over all its restarts, so a new process group could read the address
    of a dead rank. Its count of restarts does not identify a start, because each node counts its
    own. So rank 0 invents a prefix. Every other rank writes a random name and waits for the prefix
    under that name, where only the living rank 0 can write it.

    Args:
        store: the ranks' common store; it may hold what earlier starts wrote.
        rank: this rank's number.
        size: number of ranks.
        timeout: how long a rank waits for the others.

    Returns:
        The store under the prefix.

    Raises:
        torch.distributed.DistStoreError: another rank did not come in time.

    References:
        https://github.com/pytorch/pytorch/issues/135712
    """
    if rank:
        name = uuid4().hex
        store.set(f"name/{rank}", name)
        prefix = store.get(name).decode()
        store.set(f"{prefix}/{rank}", "")
    else:
        prefix = uuid4().hex
        deadline = time.monotonic() + timeout.total_seconds()
        for other in range(1, size):
            _answer(store, other, prefix, deadline)
    return PrefixStore(prefix, store)


def _answer(store: Store, other: int, prefix: str, deadline: float) -> None:
    """Tell a rank the prefix until it confirms: its name may still be one of an earlier start."""
    while not store.check([f"{prefix}/{other}"]):
        if time.monotonic() > deadline:
            raise DistStoreError(f"timed out: rank {other} did not start")
        if store.check([f"name/{other}"]):
            store.set(store.get(f"name/{other}").decode(), prefix)
        time.sleep(0.01)
