"""Several ranks learn, save and resume what one process does, and each holds its share only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from research_agent import distributed
from tests.research_agent import fsdp_worker
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.fsdp_worker import CASES, MEASURED, RESUMED
from tests.research_agent.torchrun import in_processes

LAYERS = 16


def large_qwen2() -> Qwen2ForCausalLM:
    """A model whose weights are much more than the activations of a few tokens."""
    changes = {"num_hidden_layers": LAYERS, "tie_word_embeddings": False}
    return tiny_qwen2(64, hidden=64, initializer_range=0.02, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one, two and three ranks learn, save and resume."""
    pytest.importorskip("peft")
    place = tmp_path_factory.mktemp("ranks")
    tiny_qwen2(50).double().save_pretrained(place / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fsdp_worker.run(place)
    in_ranks(place, "learn")
    fsdp_worker.resume_all(place)
    torch.set_num_threads(threads)
    return place


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and three ranks hold meanwhile, and in which format."""
    place = tmp_path_factory.mktemp("measured")
    tiny_qwen2(50).save_pretrained(place / "model")
    large_qwen2().save_pretrained(place / "large")
    in_ranks(place, "measure")
    return place


def in_ranks(place: Path, what: str) -> None:
    words = [str(place), "RANK", what]
    ends, _, errors = in_processes(3, "tests.research_agent.fsdp_worker", *words)
    assert ends == [0, 0, 0], errors[-6000:]


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-6, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_ranks_come_to_the_weights_of_one_process(folder: Path, case: str, size: int) -> None:
    if case == "copies" and size == 3:
        pytest.skip("three copies differ in nothing from two")
    one, several = (torch.load(folder / f"{case}-{n}.pt") for n in (1, size))
    for which in ("weights", "after"):
        close(several[which], one[which])
    for ours, theirs in zip(one["metrics"], several["metrics"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9)
    if case == "packed":  # all ranks stopped, and none waited for the others
        assert "is nan" in one["cause"] and "is nan" in several["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("now", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("case", RESUMED)
def test_what_some_ranks_save_others_resume(folder: Path, case: str, before: int, now: int) -> None:
    if case == "copies" and 3 in (before, now):
        pytest.skip("three copies differ in nothing from two")
    found: dict[str, Any] = torch.load(folder / f"{case}-{before}-{now}.pt")
    went_on = torch.load(folder / f"{case}-{before}.pt")["after"]
    close(found, went_on)
    if before == now:
        assert all(torch.equal(found[name], weight) for name, weight in went_on.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_what_ranks_save_is_a_model_of_transformers(folder: Path, size: int) -> None:
    saved = folder / f"packed-{size}" / "step-000001"
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 1  # one file per bucket
    model, loaded = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float64, output_loading_info=True
    )
    assert not any(loaded.values())
    expected = torch.load(folder / f"packed-{size}.pt")["weights"]
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    settings = [
        json.loads((folder / f"packed-{n}" / "step-000001" / "config.json").read_text())
        for n in (1, size)
    ]
    assert settings[0] == settings[1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", MEASURED)
def test_no_rank_holds_more_than_its_shard_and_a_bucket(
    measured: Path, case: str, size: int
) -> None:
    """The policy alone; with a reference and a critic; with adapters beside it."""
    model = large_qwen2()
    bucket = fsdp_worker.BUCKET
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert bucket < whole / 3.5  # so that nothing whole fits into what is allowed
    one = sum(4 * -(-len(p) // size) * p[0].numel() for p in model.parameters())
    count = len(list(model.parameters()))
    for rank in range(size):
        found = torch.load(measured / f"bytes-{case}-{size}-{rank}.pt")
        shard, moments, peaks = found["shard"], found["moments"], found["peaks"]
        if case == "policy":
            assert shard <= one
            assert moments <= 2 * shard + 4 * count
        elif case == "critic":  # three models of which two learn; a head of 65 numbers
            assert shard <= 3 * one + 4 * 65
            assert moments <= 4 * one + 4 * (2 * count + 2 * 65 + 2)
        else:
            assert shard <= 1.1 * one
            assert moments < 0.2 * one
        resident = shard + moments
        # Loading proves the model, and a step runs it: then a table and two layers are gathered.
        assert peaks["load"] <= shard + bucket
        # The gradient of one model at a time is sharded as well; adapters' activations take less.
        assert peaks["step"] <= resident + found["policy"] + bucket
        # The first rank also gathers where everything is stored: names and places, as bytes.
        plan = 256 * found["files"] if case == "critic" and rank == 0 else 0
        assert peaks["save"] <= resident + bucket + plan
        assert peaks["send"] <= resident + bucket
        assert peaks["resume"] <= resident + bucket


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_weights_are_gathered_in_half_precision_and_kept_in_full(measured: Path, size: int) -> None:
    exact = fsdp_worker.half_precision(measured, "float32")["metrics"]
    for rank in range(size):
        found = torch.load(measured / f"half-{size}-{rank}.pt")
        assert found["gathered"] == torch.bfloat16
        assert found["kept"] == found["moments"] == {torch.float32}
        assert found["reference"] == {torch.bfloat16}
        assert found["critic"] == {(True, torch.float32)}
        assert found["critic_gathered"] == {torch.bfloat16}
        assert found["metrics"]["kl"] == 0.0  # both round alike
        assert found["metrics"]["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 2), (4, 2), (5, 2), (2, 3)])
def test_passes_are_dealt_out_evenly_and_each_counts_once(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank_and_size", lambda rank=rank: (rank, size))
        dealt.append(list(distributed.shard_batches(range(count))))
    assert len({len(passes) for passes in dealt}) == 1
    assert sorted(i for passes in dealt for i, counts in passes if counts) == list(range(count))
