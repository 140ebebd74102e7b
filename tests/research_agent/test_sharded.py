"""Weights read and written without a whole copy are those that transformers reads and writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from research_agent.algorithms.grpo import GRPO
from research_agent.config import LearnerConfig
from research_agent.errors import ModelError
from research_agent.learner import Learner
from research_agent.models.deferred import load_deferred
from research_agent.models.lora import add_adapters, merged
from research_agent.models.policy import load_model
from research_agent.sharded import allocate, deferred_folder, read_weights
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.sharded_worker import CASES, logprobs
from tests.research_agent.torchrun import in_two_processes

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def random_model(name: str, config_name: str = "", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_name or name}Config")(**SMALL | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def gemma4() -> Any:
    """It multiplies the output of each layer by a buffer, here not by the initial 1."""
    model = random_model(
        "Gemma4",
        "Gemma4Text",
        vocab_size_per_layer_input=64,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
    )
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.25)
    return model


def glm4_moe() -> Any:
    """It chooses experts by a buffer, here not the initial zeros."""
    model = random_model(
        "Glm4Moe",
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        **EXPERTS,
    )
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))
    return model


def gpt_neox() -> Any:
    """Its head has another name in its files than in the module."""
    return random_model("GPTNeoX")


MODELS = {"gemma4": gemma4, "glm4_moe": glm4_moe, "gpt_neox": gpt_neox}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks compute and save of models that transformers has saved."""
    place = tmp_path_factory.mktemp("two")
    for case in CASES:
        MODELS[case]().save_pretrained(place / case)
    in_two_processes("tests.research_agent.sharded_worker", str(place))
    return place


def filled(folder: Path) -> Any:
    """The model that one rank reads from a folder, which must be possible shard by shard."""
    model = load_deferred(folder)
    source = deferred_folder(model)
    assert source is not None
    allocate(model, torch.device("cpu"))
    model.tie_weights()  # a module that is not sharded loses its ties there
    read_weights(model, source)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("when", ["opened", "again", "rolled back"])
def test_two_ranks_have_the_policy_of_transformers(two_ranks: Path, case: str, when: str) -> None:
    expected = logprobs(AutoModelForCausalLM.from_pretrained(two_ranks / case))
    for rank in (0, 1):
        found = torch.load(two_ranks / f"{case}-{rank}.pt")
        assert torch.allclose(found[when], expected, atol=1e-5)
        assert not torch.allclose(found["changed"], expected, atol=1e-2)


@pytest.mark.slow
def test_a_critic_of_two_ranks_begins_with_the_buffers_of_the_policy(two_ranks: Path) -> None:
    for rank in (0, 1):
        buffers = torch.load(two_ranks / f"gemma4-{rank}.pt")["critic"]
        assert [buffer.tolist() for buffer in buffers.values()] == [[0.25], [0.25]]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_two_ranks_save_is_the_whole_model(two_ranks: Path, case: str) -> None:
    saved = two_ranks / f"{case}-run" / "step-000001"
    model, loaded = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(loaded.values())
    expected = AutoModelForCausalLM.from_pretrained(two_ranks / case).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_rank_reads_the_buffers(tmp_path: Path) -> None:
    model = gemma4()
    model.save_pretrained(tmp_path)
    assert torch.allclose(logprobs(filled(tmp_path)), logprobs(model), atol=1e-5)


def test_a_model_whose_files_lack_a_buffer_is_refused(tmp_path: Path) -> None:
    gemma4().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.layer_scalar"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with (
        pytest.warns(UserWarning, match=r"do not hold 'model\.layers\.1\.layer_scalar'"),
        pytest.raises(ModelError, match=r"lacks 1 of its weights.*'model\.layers\.1\.layer_scalar"),
    ):
        load_deferred(tmp_path)


def test_merged_adapters_come_with_the_buffers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = gemma4()
    expected = logprobs(model)
    add_adapters(model, 2)
    model.save_pretrained(tmp_path, state_dict=dict(merged(model)))
    assert torch.allclose(logprobs(load_model(tmp_path, device="cpu")), expected, atol=1e-5)


def test_an_engine_gets_parameters_alone() -> None:
    """A server is told before which weights will come; buffers do not change."""
    model = gemma4()
    learner = Learner(model, GRPO(kl_coef=0.0), LearnerConfig(packing="off"))
    assert [name for name, _ in learner.weights()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00009-of-00009.safetensors"])
def test_a_file_that_transformers_does_not_read_changes_nothing(
    tmp_path: Path, name: str, sharded: bool
) -> None:
    model = tiny_qwen2(50)
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB" if sharded else "1GB")
    tiny_qwen2(50, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model" / name)
    found = dict(filled(tmp_path / "model").named_parameters())
    assert all(torch.equal(found[n], p) for n, p in model.named_parameters())


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    model = tiny_qwen2(50)
    model.save_pretrained(tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = dict(filled(tmp_path).named_parameters())
    assert all(torch.equal(found[n], p) for n, p in model.named_parameters())


def test_a_weight_in_two_files_is_refused_with_their_names(tmp_path: Path) -> None:
    tiny_qwen2(50).save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    doubled = load_file(tmp_path / first) | load_file(tmp_path / second)
    save_file(doubled, tmp_path / second, {"format": "pt"})
    with pytest.raises(ModelError, match=f"in each of .*{first} and .*{second}; move the file"):
        load_deferred(tmp_path)


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3Moe", "GPTNeoX"])
def test_a_learner_goes_back_to_what_one_process_saved(tmp_path: Path, name: str) -> None:
    experts = {**EXPERTS, "num_experts": 4}
    model = random_model(name, **experts if name == "Qwen3Moe" else {})
    model.save_pretrained(tmp_path)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner = Learner(model, GRPO(kl_coef=0.0), LearnerConfig(packing="off"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    learner.load_weights(tmp_path)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
