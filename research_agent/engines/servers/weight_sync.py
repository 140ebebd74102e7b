"""New weights for all servers: all ranks take part, and agree on what came of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from research_agent.distributed import (
    Repeatable,
    broadcast_object,
    full_tensor,
    raise_together,
    rank_and_size,
    run_together,
    together,
)
from research_agent.engines.checks import WeightNames
from research_agent.engines.remote import Client, LoopThread
from research_agent.engines.servers.pool import ServedWeights, no_server
from research_agent.engines.servers.server import Carrier, Needs, Server, WeightTag
from research_agent.engines.servers.server_group import Outcome, ServerGroup
from research_agent.engines.servers.weight_transfer import Transfer
from research_agent.errors import EngineError
from research_agent.weight_files import WeightFolder

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN = 1.0  # seconds between attempts while no server takes the weights


def model_weights(model: Any) -> Iterable[tuple[str, Tensor]]:
    """Return a model's weights, whole; its parameters may be sharded, and all ranks ask then."""
    return Repeatable(
        lambda: ((name, full_tensor(p.detach())) for name, p in model.named_parameters())
    )


class WeightSync:
    """Gives weights to servers. Every rank has one and makes the same calls at the same time.

    Args:
        model: the policy.
        urls: the servers that this rank gives weights to; each server belongs to one rank.
        key: of the servers.
        carrier: how the weights get there.
        dtype: number format of the weights on the servers.
        context: tokens that a trajectory may have.
        token: one that a server can sample from, to try it.
        patience: seconds to wait for a server when none takes the weights.
        require_alive: raises an ``EngineError`` if a server that this rank started has ended.

    Raises:
        ConfigError: an address that cannot be used, or a model whose weights cannot go this way.
    """

    def __init__(
        self,
        model: Any,
        urls: Sequence[str],
        key: str | None,
        *,
        carrier: Carrier,
        dtype: torch.dtype,
        context: int,
        token: int,
        patience: float,
        require_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._names = WeightNames(model)
        self._transfer = self._folder = None
        with together():
            if carrier != "folder":
                self._transfer = Transfer(model, self._names, carrier, dtype)
            elif rank_and_size()[0] == 0:
                self._folder = WeightFolder(self._names, dtype)
            servers = [Server(url, Client(url, key)) for url in urls]
        root = broadcast_object(self._folder.root if self._folder else None)
        needs = Needs(context, str(dtype).removeprefix("torch."), _sizes(model), carrier)
        self._group = ServerGroup(servers, needs, root, token)
        self._loop = LoopThread("weights", [server.client for server in servers])
        self._patience = patience
        self._require_alive = require_alive
        self._run = broadcast_object(secrets.token_hex(4))
        self._calls = 0
        self._current = ""  # name of the weights that servers have

    def give(self, weights: Iterable[tuple[str, Tensor]], version: int) -> ServedWeights:
        """Give weights to all servers that can take them.

        Turns under way are paused meanwhile and then continue with the new weights.

        Args:
            weights: all of the model's. All ranks go through them together, once per attempt.
                After a transfer from memory that failed, an iterator cannot be sent again.
            version: their number.

        Raises:
            ContextError: a server has too short a context, at the first call.
            EngineError: no server took them, they cannot be written, or a server was started in
                another way, at the first call.
            ModelError: a name or shape that the model does not have, or a weight left out.
            StoppedError: this is not rank 0, which has the error.
        """
        self._calls += 1
        tag = WeightTag(self._run, version, self._calls)
        try:
            return self._give(weights, tag)
        except Exception:
            if not self._current:  # the run does not start: its servers stay as they were
                self._loop.call(self._group.cancel())
            raise
        finally:
            if self._folder:
                self._folder.prune({self._current})
            self._loop.call(self._group.keep(self._current))

    def close(self) -> None:
        """Delete the weights, and leave the servers, which keep running."""
        self._loop.close()
        if self._folder:
            self._folder.close()

    def _give(self, weights: Iterable[tuple[str, Tensor]], tag: WeightTag) -> ServedWeights:
        deadline = time.monotonic() + self._patience
        once = self._transfer is not None and iter(weights) is weights
        excluded, problems = self._group.excluded, dict[str, str]()
        excluded.clear()
        if not self._transfer:
            run_together(lambda: self._write(weights, str(tag)))
        while True:
            outcomes = run_together(self._prepare)
            _require_same_software(outcomes)
            sends = any(each.models for each in outcomes)
            sent = run_together(lambda: self._send(weights, str(tag))) if sends else []
            for outcome in (*outcomes, *sent):
                problems |= outcome.problems
            models = {url: model for each in sent for url, model in each.models.items()}
            if models:
                self._current = str(tag)
                left = {url: why for url, why in problems.items() if url not in models}
                return ServedWeights(tag, models, left)
            if broadcast_object(sends and bool(excluded) and not once):
                continue  # servers that failed are left out now
            if broadcast_object((sends and once) or time.monotonic() > deadline):
                raise_together(no_server(problems))
            excluded.clear()
            time.sleep(_AGAIN)

    def _prepare(self) -> Outcome:
        self._require_alive()
        return self._loop.call(self._group.prepare())

    def _write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> None:
        if self._folder:
            self._folder.write(weights, name)
            return
        for _ in self._names.checked(weights):  # to yield them is work of all ranks
            pass

    def _send(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Outcome:
        """Send the weights, and resume the servers of this rank that have them."""
        problems: dict[str, str] = {}
        if self._transfer:
            ready = self._group.ready
            problems, is_whole = self._transfer.send(weights, ready, self._loop.loop)
            if not is_whole:
                self._group.excluded.update(problems)
                why = "the transfer to it ended with that to another server"
                problems = {server.url: problems.get(server.url, why) for server in ready}
        return self._loop.call(self._group.resume(name, problems))


def _sizes(model: Any) -> dict[str, int]:
    """Sizes of a model that its servers must have as well."""
    config = model.config.get_text_config()
    names = {"layers": "num_hidden_layers", "tokens": "vocab_size", "width": "hidden_size"}
    found = {size: getattr(config, name, None) for size, name in names.items()}
    return {size: number for size, number in found.items() if isinstance(number, int)}


def _require_same_software(outcomes: Sequence[Outcome]) -> None:
    """Compare the versions of all servers; the outcomes are the same on all ranks.

    Raises:
        EngineError: they differ, on rank 0; on others ``StoppedError``.
    """
    software = {url: version for each in outcomes for url, version in each.software.items()}
    if len(set(software.values())) > 1:
        named = ", ".join(f"{url}: vLLM {version}" for url, version in software.items())
        raise_together(
            EngineError(f"the servers differ in version ({named}); start all with the same vLLM")
        )
