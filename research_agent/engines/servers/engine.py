"""Several vLLM servers as one engine: tokens go out, tokens come back.

docs/how-to/rollouts.md says how to start servers, who may reach them, and how weights get there. On
a CPU they need ``--no-enable-chunked-prefill --max-num-batched-tokens CONTEXT`` too: a CPU cannot
sample with seeds from a prompt that it reads in pieces. The transfers from memory were tested with
doubles of CUDA and NCCL, and not on a GPU.

Under torchrun each rank samples its own turns on all servers. All ranks take part in giving
weights, and one of them talks to the servers about it (``weight_sync.py``).

A server that fails is left out, and its turns are sampled again elsewhere, from the same tokens and
seed. One that is started again is used from the next ``load_weights`` on. One address is one
server: through a router weights reach one of its servers only. And a server is for one run.

What is used of vLLM 0.32: ``/inference/v1/generate`` (token ids in; out come token ids, their
log-probabilities, and the version of the weights that sampled them), and of the development mode
``/server_info``, ``/collective_rpc`` (``reload_weights`` from a folder), ``/pause``, ``/resume``,
``/reset_prefix_cache``, ``/update_weight_version``, ``/weight_info``, ``/get_world_size``, and the
routes of vLLM's weight transfer (``weight_transfer.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from research_agent.distributed import gather, rank_and_size, together
from research_agent.engines.base import Completion, Finish, SamplingParams, make_completion
from research_agent.engines.checks import (
    not_finite,
    require_context,
    require_idle,
    require_room,
    require_temperature,
)
from research_agent.engines.remote import Turns
from research_agent.engines.servers.pool import Sampled, ServedWeights, ServerPool, Slot
from research_agent.engines.servers.serve import ServerProcess, vllm_settings
from research_agent.engines.servers.server import Needs, model_sizes
from research_agent.engines.servers.weight_sync import WeightSync, model_weights
from research_agent.errors import ConfigError
from research_agent.system.torchrun import torchrun

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from research_agent.engines.spec import EngineSpec, WeightTransfer
    from research_agent.renderer import Renderer

_STEP = 0.02  # seconds that a step waits for a turn; a collector has environments to look after
_NOT_FINITE = -9999.0  # vLLM's log-probability for minus infinity, and for none


class ServerEngine:
    """An ``Engine`` over vLLM servers; ``connect_servers`` makes one with weights.

    Args:
        renderer: the policy's tokenizer.
        urls: of the servers.
        max_context: tokens that a trajectory may have.
        sync: gives the servers weights. Without it somebody else does, and ``load_weights`` takes
            a ``ServedWeights``.
        max_in_flight: turns asked for at a time, times the number of servers.
        warns: whether to warn of servers that are lost; of several ranks one is enough.

    The draws of a turn are a function of its trajectory's seed and of the tokens held before it,
    up to floating-point rounding; which server samples it makes no difference.
    """

    keeps_turns = True
    """New weights come between two tokens of a turn; see ``KeepsTurns``."""

    def __init__(
        self,
        renderer: Renderer,
        urls: Sequence[str],
        max_context: int,
        sync: WeightSync | None = None,
        *,
        max_in_flight: int = 256,
        warns: bool = True,
    ) -> None:
        self.max_context = max_context
        self._urls = urls
        self._sync = sync
        self._renderer = renderer
        self._slots: dict[int, Slot] = {}
        self._warns = warns
        self._pool = ServerPool(urls, renderer.end_ids, max_in_flight, warns=warns)
        self._turns: Turns[Sampled] = Turns("servers", self._pool.closing)

    @property
    def busy(self) -> int:
        """Number of slots with a turn under way."""
        return len(self._turns)

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Append tokens to what the slot holds already, and sample a turn from there.

        Raises:
            ContextError: nothing to continue from, or no room left to sample a token.
            ValueError: the slot's turn is under way, or a temperature that vLLM would silently
                raise.
        """
        require_idle(slot, self._turns)
        require_temperature(params.temperature)
        held = self._slots.setdefault(slot, Slot())
        length = len(held.tokens) + len(tokens)
        require_room(slot, length, self.max_context)
        held.tokens += tokens
        held.params = replace(params, max_tokens=min(params.max_tokens, self.max_context - length))
        self._turns.begin(slot, self._pool.play(held))

    def step(self) -> list[Completion]:
        """Wait a moment for turns to be finished; return those that are.

        Raises:
            EngineError: no server is left, or all that were asked failed at a turn.
            NonFiniteError: a log-probability is not finite.
        """
        self.require_alive()
        return [self._complete(*turn) for turn in self._turns.finished(_STEP).items()]

    def release(self, slot: int) -> None:
        """Forget what the slot holds; a server that is at its turn stops."""
        self._turns.cancel(slot)
        self._slots.pop(slot, None)

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]] | ServedWeights, version: int
    ) -> None:
        """Give all servers new weights, from all ranks together; see ``WeightSync.push``.

        A server that cannot take them is left out until it can. Slots keep what they hold. Turns
        under way continue with the new weights, and are sampled again if their server is left out.

        Raises:
            EngineError: they cannot be written, or no server took them.
            ModelError: a name or shape that the model does not have, or a weight left out. From a
                folder the servers' weights are as before then.
        """
        if not isinstance(weights, ServedWeights):
            weights = self.push_weights(weights, version)
        self._turns.call(self._pool.use(weights))

    def push_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> ServedWeights:
        """Give all servers new weights, which an engine in another process samples with."""
        assert self._sync
        return self._sync.push(weights, version)

    def require_alive(self) -> None:
        """Raise an ``EngineError`` with its log if the server that this rank started has ended."""
        if self._sync:
            self._sync.require_alive()

    def engine_factory(self) -> Callable[[Renderer], ServerEngine]:
        """A function that makes an engine over the same servers, in another process."""
        return partial(
            ServerEngine, urls=self._urls, max_context=self.max_context, warns=self._warns
        )

    def close(self) -> None:
        """Delete the weights and leave the servers; a server that this rank started ends."""
        self._turns.close()
        if self._sync:
            self._sync.close()

    def _complete(self, slot: int, sampled: Sampled) -> Completion:
        """The turn as any engine would have ended it; here, as tokenizers are for one thread."""
        held = self._slots[slot]
        count, finish = self._cut(held, sampled)
        tokens, logprobs = sampled.tokens[:count], sampled.logprobs[:count]
        versions = sampled.versions[:count]
        if not all(logprob > _NOT_FINITE for logprob in logprobs):
            raise not_finite(versions[-1])
        held.tokens += tokens
        return make_completion(
            self._renderer,
            slot,
            tokens,
            logprobs,
            finish_reason=finish,
            version=versions[-1],
            versions=versions,
        )

    def _cut(self, held: Slot, sampled: Sampled) -> tuple[int, Finish]:
        """How many tokens the turn has, and why it ends there.

        A server knows nothing of what was said before an interruption, and its decoder is not the
        renderer's: the first token that ends the turn or completes a stop string is looked for
        again.
        """
        params, tokens = held.params, sampled.tokens
        resumed = held.tokens[len(held.tokens) - params.resumed_tokens :]
        flagged = self._renderer.stop_tokens(params.stop)
        for at, token in enumerate(tokens):
            if token in self._renderer.end_ids:
                return at + 1, "end"
            if token in flagged and self._renderer.stops(resumed + tokens[: at + 1], params.stop):
                return at + 1, "stop"
        return len(tokens), sampled.finish_reason


def connect_servers(
    model: Any,
    renderer: Renderer,
    urls: Sequence[str],
    max_context: int | None = None,
    *,
    transfer: WeightTransfer = "folder",
    dtype: str | None = None,
    device: torch.device | None = None,
    process: ServerProcess | None = None,
    max_in_flight: int = 256,
) -> ServerEngine:
    """Make an engine over servers and give them the model's weights; every rank calls it.

    Args:
        model: the policy, of the transformers library. The servers get its weights, unless these
            are on the meta device: then the first ones come by ``load_weights``. The model itself
            is left alone.
        renderer: its tokenizer.
        urls: such as ``http://localhost:8000``, one per server; this rank samples on them.
        max_context: tokens that a trajectory may have; the model's own limit by default.
        transfer: how weights get to the servers.
        dtype: number format of the servers' weights, such as bfloat16; the model's own by default.
        device: where the learner's weights are or will be; the model's own by default.
        process: the server that this rank has started, and gives weights to. Without any such
            server, rank 0 gives weights to all of ``urls``.
        max_in_flight: as for ``ServerEngine``.

    Raises:
        ConfigError: an address that cannot be used, or a model whose weights cannot go this way.
        ContextError: more context than the model or a server has.
        EngineError: no server can be used, or one that answers was started in another way.
        StoppedError: this is not rank 0, which has one of these errors.
    """
    bases = _addresses(urls)
    context = require_context(model, max_context)
    is_first = rank_and_size()[0] == 0
    gives = process is not None or is_first
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    needs = Needs(context, dtype, model_sizes(model), transfer, token=min(renderer.end_ids))
    sync = WeightSync(model, bases if gives else (), needs, device or model.device, process)
    engine = ServerEngine(
        renderer, bases, context, sync, max_in_flight=max_in_flight, warns=is_first
    )
    try:
        if not any(weight.is_meta for weight in model.parameters()):
            engine.load_weights(model_weights(model), 0)
    except BaseException:
        engine.close()
        raise
    return engine


def serve_engine(
    spec: EngineSpec,
    model: Any,
    renderer: Renderer,
    max_slots: int,
    max_context: int | None = None,
    *,
    dtype: str | None = None,
    device: torch.device | None = None,
) -> ServerEngine:
    """Start a server on each node, and make an engine of them; every rank calls it.

    Args:
        spec: GPUs of each server, and its share of their memory.
        model: the policy, of the transformers library.
        renderer: its tokenizer.
        max_slots: trajectories that this rank samples at the same time.
        max_context: tokens that a trajectory may have; the model's own limit by default.
        dtype: number format of the servers' weights; the model's own by default.
        device: where the learner's weights are or will be; the model's own by default.

    Raises:
        ConfigError: a server would need more GPUs than a node has.
        ContextError: more context than the model has.
        EngineError: a server does not start.
        StoppedError: this is not rank 0, which has one of these errors.
    """
    context = require_context(model, max_context)
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    device = device or model.device
    ranks, node = torchrun("LOCAL_WORLD_SIZE", 1), torchrun("GROUP_RANK", 0)
    # By IPC each GPU of the server reads what the rank on that GPU holds. A GPU without a rank
    # would have nothing to read, and what a rank holds is not freed until it has been read.
    paired = device.type == "cuda" and spec.tp * spec.dp == ranks
    transfer: WeightTransfer = "ipc" if paired else "folder"
    process: ServerProcess | None = None
    with together():
        if torchrun("LOCAL_RANK", 0) == 0:
            settings = vllm_settings(
                spec, context, max_slots * ranks, dtype=dtype, device=device, transfer=transfer
            )
            process = ServerProcess(model, renderer, settings)
    started = gather([(node, process.url)] if process else [])
    urls = [url for number, url in started if number == node]
    return connect_servers(
        model,
        renderer,
        urls,
        context,
        transfer=transfer,
        dtype=dtype,
        device=device,
        process=process,
    )


def _addresses(urls: Sequence[str]) -> list[str]:
    """Write the addresses of servers all in the same way.

    Raises:
        ConfigError: there are none, or one comes twice.
    """
    bases = [url.strip().rstrip("/").removesuffix("/v1") for url in urls]
    if not bases or len(set(bases)) < len(bases):
        raise ConfigError(f"the servers are {', '.join(urls) or 'none'}; name each one once")
    return bases
