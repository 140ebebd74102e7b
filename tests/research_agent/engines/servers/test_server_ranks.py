"""Two ranks on two servers: weights are given once, by all, and errors are told once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from research_agent.engines.remote import turn_seed
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_qwen2
from tests.research_agent.fake_vllm import FakeVllm, script
from tests.research_agent.torchrun import in_two_processes

RENDERER = make_renderer(byte_tokenizer(merges=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"dtype": "float16"}, "weights in float16, and the run gives them in bfloat16"),
    "model": ({"sizes": (3, 264, 128)}, "another model: layers 3, and the policy layers 2"),
    "version": ({"software": "0.31.1"}, "the servers differ in version"),
    "dead": ({}, "no vLLM server can be used"),
}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, list[FakeVllm]]]:
    """Two servers that are right, and for each thing that may be wrong two, one of them wrong."""
    pairs = {"right": [FakeVllm(dtype="bfloat16"), FakeVllm(dtype="bfloat16")]}
    for name, (settings, _) in WRONG.items():
        wrong = FakeVllm(**({"dtype": "bfloat16"} | settings))
        pairs[name] = [FakeVllm(dtype="bfloat16"), wrong]
    for server in pairs["dead"]:
        server.stop()
    yield pairs
    for name, pair in pairs.items():
        for server in pair if name != "dead" else ():
            server.stop()


@pytest.fixture(scope="module")
def said(servers: dict[str, list[FakeVllm]]) -> dict[str, list[Any]]:
    """What the two ranks said of each pair."""
    urls: dict[str, list[Any]] = {
        name: [[server.url for server in pair]] for name, pair in servers.items()
    }
    urls["started"] = [[]]  # by the first rank
    urls["nodes"] = [[]]  # by each, as they are on two nodes
    urls["gpus"] = [[], "serve:tp=2"]
    out = in_two_processes("tests.research_agent.server_worker", json.dumps(urls))
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    lines.sort(key=lambda line: line["rank"])
    return {name: [line for line in lines if line["name"] == name] for name in urls}


def test_two_ranks_give_weights_once_and_sample_their_own_turns(
    servers: dict[str, list[FakeVllm]], said: dict[str, list[Any]]
) -> None:
    both = servers["right"]
    for started in ("started", "nodes"):
        for line, right in zip(said[started], said["right"], strict=True):
            assert (line["turns"], line["seen"]) == (right["turns"], right["seen"])
    one, same = (line["servers"] for line in said["started"])
    assert one == same and len(one) == 1
    first, second = (line["servers"] for line in said["nodes"])
    assert first != second and len(first) == len(second) == 1
    for rank, line in enumerate(said["right"]):
        expected = []
        for version in (1, 2):
            for slot in range(4):
                prompt = RENDERER.encode_text(f"q{4 * rank + slot}")
                seed = turn_seed(4 * rank + slot, len(prompt))
                expected.append([slot, script(prompt, seed, 3), version])
        assert line["turns"] == sorted(expected)
        # Each rank went through all weights, once per version.
        assert line["seen"] == [len(list(tiny_qwen2(hidden=128).named_parameters()))] * 2
    assert min(len(server.turns) for server in both) > 2  # both ranks use both
    model = tiny_qwen2(hidden=128)
    for server in both:
        assert len(server.folders()) == 3  # the first weights, and the two versions
        assert len({folder.parent for folder in server.folders()}) == 1  # rank 0 wrote them
        for name, weight in model.state_dict().items():
            assert torch.equal(server.weights[name], (weight * 2).bfloat16())
    assert both[0].version == both[1].version
    assert both[0].version.split("-")[1] == "2"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_server_stops_both_ranks_and_rank_0_tells(
    name: str, said: dict[str, list[Any]]
) -> None:
    first, second = said[name]
    assert (first["error"], second["error"]) == ("EngineError", "StoppedError")
    assert WRONG[name][1] in first["message"]


def test_more_gpus_than_there_are_stop_both_ranks(said: dict[str, list[Any]]) -> None:
    first, second = said["gpus"]
    assert (first["error"], second["error"]) == ("ConfigError", "StoppedError")
    assert "serve with 2 GPUs (tp times dp): 1 are visible here" in first["message"]
