"""A vLLM server: the requests that control it, and whether it was started as a run needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from research_agent.engines.servers.client import Client, RequestError
from research_agent.errors import ContextError, EngineError

if TYPE_CHECKING:
    from research_agent.engines.spec import WeightTransfer

RELOAD_TIMEOUT = 600.0
"""Seconds that a server may take for new weights, or for its first turn."""
SERVER_TIMEOUT = 60.0
"""Seconds to wait for a server when none is left, or none takes new weights."""
GENERATE = "inference/v1/generate"
START = (
    "Start it with VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1 vllm serve MODEL --host 127.0.0.1 "
    "--enable-scale-out --logprobs-mode processed_logprobs, in release 0.32. Name each server "
    "itself, no router and no balancer. If it asks for a key, put that in VLLM_API_KEY here"
)
BACKEND = {
    "nccl": """--weight-transfer-config '{"backend": "nccl"}', on GPUs other than the learner's""",
    "ipc": """--weight-transfer-config '{"backend": "ipc"}' and """
    "VLLM_ALLOW_INSECURE_SERIALIZATION=1, on the learner's GPUs",
}
"""How to start a server for each transfer from memory."""

READ_FILES = {"overrides": {"load_config": {"load_format": "auto"}}}
"""Arguments of vLLM's ``update_config`` for a server that started without weights."""


@dataclass(frozen=True)
class WeightTag:
    """The name that servers know weights by.

    Attributes:
        run: of the run whose weights they are.
        version: number of the weights in that run.
        call: how many times the run had given weights, this time included. A run that goes back
            gives the same version twice.
    """

    run: str
    version: int
    call: int

    def __str__(self) -> str:
        return f"{self.run}-{self.version}-{self.call}"

    def is_current(self, name: str) -> bool:
        """Whether a name is that of weights of the same run, given now or later."""
        run, _, rest = name.partition("-")
        version, _, call = rest.partition("-")
        return run == self.run and version.isdigit() and call.isdigit() and int(call) >= self.call


# The parts of vLLM's answers that are read; the rest is passed over undecoded.
class _Token(msgspec.Struct):
    token_id: int
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class Choice(msgspec.Struct):
    """The turn in an answer."""

    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[_Span] | None = None  # which weights sampled which tokens


class GenerateResponse(msgspec.Struct):
    """The answer to ``GENERATE``."""

    choices: tuple[Choice]


class _ModelConfig(msgspec.Struct):
    dtype: str
    max_model_len: int
    logprobs_mode: str
    quantization: str | None


class _Config(msgspec.Struct):
    instance_id: str
    model_config: _ModelConfig
    weight_transfer_config: dict[str, Any] | None


class _ServerInfo(msgspec.Struct):
    vllm_config: _Config
    vllm_env: dict[str, Any]


class _Version(msgspec.Struct):
    version: str


class _WorldSize(msgspec.Struct):
    world_size: int


class _Inspection(msgspec.Struct):
    results: list[str]


class _Workers(msgspec.Struct):
    urls: list[str]


@dataclass(frozen=True)
class Needs:
    """What a run needs of its servers.

    Attributes:
        context: tokens that a trajectory may have.
        dtype: number format of the weights, such as bfloat16.
        sizes: what ``model_sizes`` returned.
        transfer: how weights get there.
        token: one that a server can sample from, to try it.
    """

    context: int
    dtype: str
    sizes: Mapping[str, int | None]
    transfer: WeightTransfer
    token: int


def model_sizes(model: Any) -> dict[str, int | None]:
    """Sizes that the servers' model must have as well; None where the configuration has none."""
    names = {"layers": "num_hidden_layers", "tokens": "vocab_size", "width": "hidden_size"}
    config = model.config.get_text_config()
    return {size: getattr(config, name, None) for size, name in names.items()}


@dataclass(eq=False)
class Server:
    """A server as the rank that gives it weights knows it."""

    url: str
    client: Client
    software: str = ""  # vLLM's version
    size: int = 1  # GPUs
    current: str = ""  # name of the weights it was given last; empty if it must be inspected
    problem: str = ""  # what went wrong last; empty if nothing did

    async def inspect(self, needs: Needs) -> None:
        """Find out how the server was started.

        Raises:
            ContextError: its context is too short.
            EngineError: it is no vLLM server, or was started in another way.
            RequestError: it does not answer, or fails.
        """
        await self._refuse_router()
        self._check_settings(await self._settings(), needs)
        ask = self.client.ask
        self.software = (await ask("GET", "version", form=_Version)).version
        self.size = (await ask("GET", "get_world_size", form=_WorldSize)).world_size
        rpc = {"method": "get_model_inspection"}
        inspection = await ask("POST", "collective_rpc", rpc, form=_Inspection)
        self._check_model(inspection.results[0], needs.sizes)

    async def reload(self, folder: Path) -> None:
        """Read the weights in a folder."""
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        config = {"method": "update_config", "kwargs": READ_FILES}
        try:
            await self.client.ask("POST", "collective_rpc", config)
            await self.client.ask("POST", "collective_rpc", rpc, timeout=RELOAD_TIMEOUT)
        except RequestError as error:
            cure = "Can it read that folder? Elsewhere, set TMPDIR to one that all share"
            raise RequestError(f"no new weights from {folder}: {error}. {cure}") from None

    async def probe(self, tag: str, token: int) -> None:
        """Sample a token with the weights of a name; a server that fails at it dies of a turn.

        Raises:
            RequestError: it does not answer, fails, or has other weights.
        """
        sampling = {"temperature": 1.0, "max_tokens": 1, "logprobs": 0, "seed": 0}
        payload = {"token_ids": [token], "sampling_params": sampling}
        answer = await self.client.ask(
            "POST", GENERATE, payload, timeout=RELOAD_TIMEOUT, form=GenerateResponse
        )
        found = [span.version for span in answer.choices[0].weight_versions or ()]
        if found != [tag]:
            raise RequestError(f"it samples with the weights {found}, not {tag!r}")

    async def _refuse_router(self) -> None:
        """Raise an ``EngineError`` if this is vllm-router."""
        workers: list[str] = []
        with suppress(RequestError):  # a server does not know the route
            workers = (await self.client.ask("GET", "list_workers", form=_Workers)).urls
        if workers:
            raise EngineError(
                f"{self.url} is a router, which carries turns only: weights would reach one of its "
                f"servers. Name them instead: server:{','.join(workers)}"
            )

    async def _settings(self) -> _ServerInfo:
        """How the server says that it was started; asked twice, a balancer asks two of them."""
        path = "server_info?config_format=json"
        first, again = [  # the first time the server asks the machine, for seconds
            await self.client.ask("GET", path, timeout=RELOAD_TIMEOUT, form=_ServerInfo)
            for _ in range(2)
        ]
        if first.vllm_config.instance_id != again.vllm_config.instance_id:
            raise EngineError(
                f"at {self.url} another process answers each time. If it is one server with "
                "--data-parallel-size, start it with --api-server-count 1. A router or balancer "
                f"carries turns only. {START}"
            )
        found: _ServerInfo = first
        return found

    def _check_settings(self, info: _ServerInfo, needs: Needs) -> None:
        model, transfer = info.vllm_config.model_config, info.vllm_config.weight_transfer_config
        dtype = model.dtype.removeprefix("torch.")
        if model.max_model_len < needs.context:
            raise ContextError(
                f"{self.url} has a context of {model.max_model_len} tokens, too short for "
                f"{needs.context}; start it with --max-model-len {needs.context}, or shorten the "
                "run's prompt and response"
            )
        if dtype != needs.dtype or model.quantization:
            has = f"{model.quantization} quantization" if model.quantization else dtype
            raise EngineError(
                f"{self.url} has weights in {has}, and the run gives them in {needs.dtype}; start "
                f"it with --dtype {needs.dtype} and no quantization, or change --precision"
            )
        if model.logprobs_mode != "processed_logprobs":
            raise EngineError(
                f"{self.url} gives log-probabilities of the kind {model.logprobs_mode}, which are "
                f"not those at the sampling temperature. {START}"
            )
        takes = {"folder", (transfer or {}).get("backend")}
        if not info.vllm_env.get("VLLM_ALLOW_INSECURE_SERIALIZATION"):
            takes.discard("ipc")
        if needs.transfer not in takes:
            raise EngineError(
                f"{self.url} takes no weights by {needs.transfer}; start it with "
                f"{BACKEND[needs.transfer]}"
            )

    def _check_model(self, inspection: str, wanted: Mapping[str, int | None]) -> None:
        """Compare vLLM's description of its model with the policy's sizes, where both are known.

        Raises:
            EngineError: the server has another model.
        """
        found = {
            name: int(match[1])
            for name, pattern in _SIZES.items()
            if (match := re.search(pattern, inspection))
        }
        if last := _LAST_LAYERS.findall(inspection):
            found["layers"] = max(map(int, last)) + 1
        differing = [name for name in found if wanted[name] not in (None, found[name])]
        if differing:
            has = ", ".join(f"{name} {found[name]}" for name in differing)
            needed = ", ".join(f"{name} {wanted[name]}" for name in differing)
            raise EngineError(
                f"{self.url} has another model: {has}, and the policy {needed}; start the server "
                "with the run's --model"
            )


_SIZES = {"tokens": r"org_vocab_size=(\d+)", "width": r"embedding_dim=(\d+)"}
# Equal layers share a line, such as "(0-26, 28): 28 x Qwen2DecoderLayer(".
_LAST_LAYERS = re.compile(r"(\d+)\): (?:\d+ x )?\w+DecoderLayer\(")
