"""What each rank of ``test_server_ranks.py`` runs: server engines with sharded weights.

For each set of servers every rank prints a line of JSON: what it sampled, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from research_agent.distributed import full_tensor, init_distributed, make_mesh, shard
from research_agent.engines.base import SamplingParams
from research_agent.engines.servers import pool, serve, weight_sync
from research_agent.engines.servers.engine import connect_servers, serve_engine
from research_agent.engines.spec import parse_engine
from research_agent.errors import ResearchAgentError
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_qwen2


class Gathered:
    """The weights of a sharded model, times a number; all ranks go through them."""

    def __init__(self, model: Any, number: float) -> None:
        self._model, self._number = model, number
        self.seen = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._model.named_parameters():
            self.seen += 1
            yield name, full_tensor(weight.detach()) * self._number


def play(
    urls: list[str], name: str = "serve", dtype: str = "bfloat16", *, nodes: bool = False
) -> dict[str, Any]:
    """Sample four turns of this rank with two versions of the weights.

    Args:
        urls: addresses of the servers; without any, one is started.
        name: the engine that starts it; with settings, as if the machine had one GPU.
        dtype: number format of the servers' weights.
        nodes: each rank is a node of its own.
    """
    rank = dist.get_rank()
    if nodes:
        os.environ |= {"GROUP_RANK": str(rank), "LOCAL_RANK": "0"}
    renderer = make_renderer(byte_tokenizer(merges=True))
    model = tiny_qwen2(hidden=128)
    shard(model, list(model.model.layers), make_mesh(model.device))
    settings: dict[str, Any] = {"max_context": 200, "dtype": dtype}
    if urls:
        for module in (pool, weight_sync):
            module.SERVER_TIMEOUT = 0.5  # type: ignore[attr-defined]
        engine = connect_servers(model, renderer, urls, **settings)
    else:
        serve._PROGRAM = (sys.executable, "-m", "tests.research_agent.fake_vllm")
        if name != "serve":
            settings["device"] = torch.device("cuda")
            torch.cuda.device_count = lambda: 1
        engine = serve_engine(parse_engine(name), model, renderer, 4, **settings)
    turns, seen = [], []
    try:
        for version in (1, 2):
            weights = Gathered(model, version)
            engine.load_weights(weights, version)
            seen.append(weights.seen)
            for slot in range(4):
                seed = 4 * rank + slot
                prompt = renderer.encode_text(f"q{seed}")
                engine.submit(slot, prompt, SamplingParams(max_tokens=3, seed=seed))
            while engine.busy:
                turns += [(turn.slot, turn.tokens, turn.version) for turn in engine.step()]
            for slot in range(4):
                engine.release(slot)
        dist.barrier()  # before the rank that started the server ends it
        return {"turns": sorted(turns), "seen": seen, "servers": engine._urls}
    finally:
        engine.close()


if __name__ == "__main__":
    with init_distributed():
        for name, arguments in json.loads(sys.argv[1]).items():
            try:
                said = play(*arguments, nodes=name == "nodes")
            except ResearchAgentError as error:
                said = {"error": type(error).__name__, "message": str(error)}
            line = json.dumps({"name": name, "rank": dist.get_rank(), **said})
            print(line + "\n", end="", flush=True)  # in one piece: the other rank writes there too
            dist.barrier()
