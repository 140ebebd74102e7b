from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from research_agent.batch import make_batch, micro_batches
from research_agent.errors import ModelError
from research_agent.models import policy, source
from research_agent.models.policy import (
    TokenLogprobs,
    batch_logprobs,
    load_model,
    token_logprobs,
)
from research_agent.trajectory import Group
from tests.research_agent.conftest import tiny_gpt2, tiny_llama, tiny_qwen2
from tests.research_agent.rollouts import action, observation, prompt, random_groups, trajectory

VOCABULARY = 50


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_whole_models_logits(make: Callable[[int], Any], temperature: float) -> None:
    model = make(VOCABULARY)
    batch = make_batch(random_groups(0))
    for micro in micro_batches(batch, max_tokens=64):
        got, entropy = token_logprobs(model, micro, temperature)
        for at, row in enumerate(micro.part.tokens):  # alone, unpadded, every logit
            logits = model(input_ids=row[None]).logits[0] / temperature
            logprobs = logits.log_softmax(-1)
            for place in micro.part.positions[micro.part.seq_ids == at]:
                here = (micro.part.seq_ids == at) & (micro.part.positions == place)
                expected = logprobs[place - 1]
                torch.testing.assert_close(got[here][0], expected[row[place]])
                spread = torch.special.entr(expected.exp()).sum()
                torch.testing.assert_close(entropy[here][0], spread)


def test_pieces_change_nothing_and_are_bounded() -> None:
    """With 50 words and 120 logits at once, the head sees two action positions at a time."""
    model = tiny_gpt2(VOCABULARY).double()
    batch = make_batch(random_groups(1))
    (micro,) = micro_batches(batch, max_tokens=10**6)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(len(inputs[0]))
    )

    def gradients(max_logits: int) -> tuple[list[torch.Tensor], list[int]]:
        rows.clear()
        logprobs, entropy = token_logprobs(model, micro, max_logits=max_logits)
        seen = rows.copy()
        model.zero_grad()
        value = logprobs.square().sum() + entropy.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return [logprobs, entropy, *(p.grad.clone() for p in model.parameters())], seen

    whole, once = gradients(policy.MAX_LOGITS)
    pieces, often = gradients(120)
    # Only at positions that predict an action token, and each of them once.
    assert once == [len(batch.targets)]
    assert max(often) == 2 and sum(often) == len(batch.targets)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_low_precision_models_give_float32_logprobs() -> None:
    model = tiny_qwen2(VOCABULARY).to(torch.bfloat16)
    (micro,) = micro_batches(make_batch(random_groups(2)), max_tokens=10**6)
    logprobs, entropy = token_logprobs(model, micro)
    assert logprobs.dtype == entropy.dtype == torch.float32
    states = model.base_model(input_ids=micro.tokens).last_hidden_state.flatten(0, 1)
    logits = model.get_output_embeddings()(states[micro.logit_index]).float()
    expected = logits.log_softmax(-1).gather(1, micro.part.targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


def test_batch_logprobs_are_in_the_order_of_the_batch() -> None:
    model = tiny_qwen2(VOCABULARY)
    batch = make_batch(random_groups(3))
    expected = torch.cat(
        [
            token_logprobs(model, next(micro_batches(batch.select([i]), 1)))[0]
            for i in range(len(batch))
        ]
    )
    got = batch_logprobs(TokenLogprobs(model), batch, max_tokens=40)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected.detach())


def test_literal() -> None:
    """Weights of zero make every token as likely as any other."""
    model = tiny_qwen2(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = make_batch([Group(0, [trajectory(prompt(1), action([2]), observation(3))])])
    (micro,) = micro_batches(batch, 10)
    logprobs, entropy = token_logprobs(model, micro)
    uniform = torch.tensor([4.0]).log()
    torch.testing.assert_close((logprobs, entropy), (-uniform, uniform))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_qwen2(VOCABULARY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_a_folder(folder: Path) -> None:
    model = load_model(folder, device="cpu")
    expected = tiny_qwen2(VOCABULARY).state_dict()
    assert not model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert load_model(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_load_a_starter_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "STARTERS", folder.parent)
    assert source.resolve_model("model") == str(folder)
    assert source.resolve_model("..") == ".."
    assert source.resolve_model("owner/model") == "owner/model"
    assert load_model("model", device="cpu").config.vocab_size == VOCABULARY


def test_folders_that_hold_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, weights)
    with pytest.raises(ModelError, match=r"lacks \d+ of its weights, among them 'model.layers.1"):
        load_model(folder)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be opened"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"but no weights; put its model\.safetensors there"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'no-such-model' cannot be opened"):
        load_model("no-such-model")


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 1}))
    with pytest.raises(ModelError):
        load_model(folder)
