"""A vLLM server: the requests that control it, and whether it was started as a run needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from research_agent.engines.remote import Client, RequestError
from research_agent.errors import ContextError, EngineError

Carrier = Literal["folder", "nccl", "ipc"]
"""How weights get to servers."""

RELOAD_TIMEOUT = 600.0
"""Seconds that a server may take for new weights, or for its first turn."""
GENERATE = "inference/v1/generate"
START = (
    "Start it with VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1 vllm serve MODEL --host 127.0.0.1 "
    "--enable-scale-out --logprobs-mode processed_logprobs; if it asks for a key, put that in "
    "VLLM_API_KEY here"
)
BACKEND = {
    "nccl": """--weight-transfer-config '{"backend": "nccl"}', on GPUs other than the learner's""",
    "ipc": """--weight-transfer-config '{"backend": "ipc"}' and """
    "VLLM_ALLOW_INSECURE_SERIALIZATION=1, on the learner's GPUs",
}
"""How to start a server for each transfer from memory."""

READ_FILES = {"overrides": {"load_config": {"load_format": "auto"}}}
"""Arguments of vLLM's ``update_config`` for a server that started without weights."""

_TIMEOUT = 30.0  # seconds for the answer to a request that costs a server next to nothing


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


@dataclass(frozen=True)
class Needs:
    """What a run needs of its servers.

    Attributes:
        context: tokens that a trajectory may have.
        dtype: number format of the weights, such as bfloat16.
        sizes: "layers", "tokens" (of the vocabulary) and "width" of the model, where known.
        carrier: how weights get there.
    """

    context: int
    dtype: str
    sizes: Mapping[str, int]
    carrier: Carrier


@dataclass(eq=False)
class Server:
    """A server as the rank that gives it weights knows it."""

    url: str
    client: Client
    model: str = ""  # the name it gives the policy
    software: str = ""  # vLLM's version
    size: int = 1  # GPUs
    current: str = ""  # name of the weights it was given last
    problem: str = ""  # what went wrong last

    async def ask(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None = None,
        timeout: float = _TIMEOUT,
    ) -> Any:
        """Send a request.

        Raises:
            EngineError: it refuses what a server that was started as described would do.
            RequestError: it does not answer, or fails.
        """
        try:
            return await self.client.ask(method, path, payload, timeout=timeout)
        except RequestError as error:
            if error.retryable:
                raise
            raise EngineError(f"{self.url} refuses /{path}: {error}. {START}") from None

    async def weights(self) -> str:
        """The name of the weights that it says it has; raises as ``ask`` does."""
        info = await self.ask("GET", "weight_info")
        return str(info.get("weight_version")) if isinstance(info, dict) else ""

    async def inspect(self, needs: Needs) -> None:
        """Find out how the server was started.

        Raises:
            ContextError: its context is too short.
            EngineError: it is no vLLM server, or was started in another way.
            RequestError: it does not answer, or fails.
        """
        self.model, context = first_model(await self.ask("GET", "v1/models"), self.url)
        if context < needs.context:
            raise ContextError(
                f"{self.url} has a context of {context} tokens, too short for {needs.context}; "
                f"start it with --max-model-len {needs.context}, or shorten the run's prompt and "
                "response"
            )
        await self._refuse_router()
        self._check_settings(await self._settings(), needs)
        version = await self.ask("GET", "version")
        inspection = await self.ask("POST", "collective_rpc", {"method": "get_model_inspection"})
        size = await self.ask("GET", "get_world_size")
        try:
            self.software, self.size = str(version["version"]), int(size["world_size"])
            description = str(inspection["results"][0]) if inspection else ""
        except (LookupError, TypeError, ValueError):
            raise _no_vllm(self.url) from None
        _check_model(self.url, description, needs)

    async def reload(self, folder: Path) -> None:
        """Read the weights in a folder; raises as ``ask`` does."""
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            if not self.current:
                config = {"method": "update_config", "kwargs": READ_FILES}
                await self.ask("POST", "collective_rpc", config)
            await self.ask("POST", "collective_rpc", rpc, RELOAD_TIMEOUT)
        except RequestError as error:
            cure = "Can it read that folder? Elsewhere, set TMPDIR to one that all share"
            raise RequestError(f"no new weights from {folder}: {error}. {cure}") from None

    async def probe(self, tag: str, token: int) -> None:
        """Sample a token with the weights of a name; a server that fails at it dies of a turn.

        Raises:
            EngineError: it was started in another way.
            RequestError: it does not answer, fails, or has other weights.
        """
        sampling = {"temperature": 1.0, "max_tokens": 1, "logprobs": 0, "seed": 0}
        payload = {"token_ids": [token], "sampling_params": sampling}
        answer = await self.ask("POST", GENERATE, payload, RELOAD_TIMEOUT)
        try:
            (span,) = answer["choices"][0]["weight_versions"]
            found = span["version"]
        except (LookupError, TypeError, ValueError):
            raise _no_vllm(self.url) from None
        if found != tag:
            raise RequestError(f"it samples with the weights {found!r}, not {tag!r}")

    async def _settings(self) -> Mapping[str, Any]:
        path = "server_info?config_format=json"  # the first time it asks the machine, for seconds
        try:
            infos = [await self.client.ask("GET", path, timeout=RELOAD_TIMEOUT) for _ in range(2)]
            first, again = ({**info["vllm_config"], "env": info["vllm_env"]} for info in infos)
            if first.get("instance_id") == again.get("instance_id"):
                return first
            found = "another server each time"
        except RequestError as error:
            if error.retryable:
                raise
            found = str(error)
        except (LookupError, TypeError):
            found = "another answer than vLLM's"
        raise EngineError(
            f"{self.url} names models, but /server_info gives {found}: either it is a router or "
            "balancer, which carries turns only, or it was started without VLLM_SERVER_DEV_MODE=1. "
            f"Name each server itself. {START}"
        )

    async def _refuse_router(self) -> None:
        """Raise an ``EngineError`` if this is vllm-router; a server does not know the route."""
        try:
            answer = await self.client.ask("GET", "list_workers", timeout=_TIMEOUT)
        except RequestError as error:
            if error.retryable:
                raise
            return
        workers = answer.get("urls") if isinstance(answer, dict) else None
        if isinstance(workers, list):
            raise EngineError(
                f"{self.url} is a router, which carries turns only: weights would reach one of its "
                f"servers. Name them instead: server:{','.join(map(str, workers))}"
            )

    def _check_settings(self, settings: Mapping[str, Any], needs: Needs) -> None:
        try:
            model = settings["model_config"]
            dtype = str(model["dtype"]).removeprefix("torch.")
            quantization, logprobs = model["quantization"], model["logprobs_mode"]
            backend = (settings["weight_transfer_config"] or {}).get("backend")
            unpickles = settings["env"].get("VLLM_ALLOW_INSECURE_SERIALIZATION")
        except (LookupError, TypeError, AttributeError):
            raise _no_vllm(self.url) from None
        if dtype != needs.dtype or quantization:
            has = f"{quantization} quantization" if quantization else dtype
            raise EngineError(
                f"{self.url} has weights in {has}, and the run gives them in {needs.dtype}; start "
                f"it with --dtype {needs.dtype} and no quantization, or change --precision"
            )
        if logprobs != "processed_logprobs":
            raise EngineError(
                f"{self.url} gives log-probabilities of the kind {logprobs}, which are not those "
                f"at the sampling temperature. {START}"
            )
        if needs.carrier != "folder" and (
            backend != needs.carrier or (needs.carrier == "ipc" and not unpickles)
        ):
            raise EngineError(
                f"{self.url} takes no weights by {needs.carrier}; start it with "
                f"{BACKEND[needs.carrier]}"
            )


def first_model(answer: Any, url: str) -> tuple[str, int]:
    """Name and context of the first model in a server's answer to /v1/models.

    Raises:
        EngineError: it is no answer of vLLM's.
    """
    try:
        model = answer["data"][0]
        return str(model["id"]), int(model["max_model_len"])
    except (LookupError, TypeError, ValueError):
        raise _no_vllm(url) from None


def _no_vllm(url: str) -> EngineError:
    return EngineError(f"{url} is no vLLM server of release 0.32. {START}")


def _check_model(url: str, inspection: str, needs: Needs) -> None:
    """Compare vLLM's description of its model with the policy.

    Raises:
        EngineError: the server has another model.
    """
    found = {"tokens": r"org_vocab_size=(\d+)", "width": r"embedding_dim=(\d+)"}
    sizes = {
        name: int(match[1])
        for name, pattern in found.items()
        if (match := re.search(pattern, inspection))
    }
    # The list of layers has entries such as (0-26): or (27):. The last index counts.
    if layers := re.search(r"^( *)\(layers\): .*\n((?:\1 .*\n)*)", inspection, re.MULTILINE):
        entries = re.findall(rf"^{layers[1]}  \(([\d, -]+)\): ", layers[2], re.MULTILINE)
        numbers = [int(number) for entry in entries for number in re.findall(r"\d+", entry)]
        sizes["layers"] = max(numbers, default=-1) + 1
    differing = {name: size for name, size in sizes.items() if needs.sizes.get(name, size) != size}
    if differing:
        has, wanted = (
            ", ".join(f"{name} {size[name]}" for name in differing) for size in (sizes, needs.sizes)
        )
        raise EngineError(
            f"{url} has another model: {has}, and the policy {wanted}; start the server with the "
            "run's --model"
        )
