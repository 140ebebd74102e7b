"""Checkpoints of every common kind open as the model that they are, and train."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from research_agent.cli import main
from research_agent.errors import ConfigError, ModelError
from research_agent.evaluation.fingerprint import model_fingerprint
from research_agent.learner import Learner
from research_agent.models.lora import adapters
from research_agent.models.policy import load_model, require_ends
from research_agent.models.source import model_source, resolve_model
from research_agent.renderer import load_renderer
from research_agent.run_logger import read_lines
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_llama, tiny_qwen2
from tests.research_agent.model_files import edit_json, save_adapter, save_gguf, save_model

TOKENS = torch.tensor([[5, 17, 3, 99, 42, 8, 120]])
COPY = "tests.research_agent.toy_env:CopyLetter-v0"


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def train(model: Path, output: Path, *more: str) -> Path:
    """Two steps of a toy environment; returns the newest checkpoint."""
    words = f"train miniworld --env {COPY} --model {model} --output {output} --algorithm-args"
    words += " kl_coef=0 entropy_coef=0.1 --prompts-per-step 2 --group-size 2 --max-prompt 16"
    words += " --max-response 8 --max-turn-tokens 2 --learning-rate 0.01 --warmup-steps 0 --steps 2"
    words += " --save-every 1 --eval-every None --quiet --device cpu"
    main([*words.split(), *more])
    assert len(read_lines(output / "metrics.jsonl")) == 2
    return output / "checkpoints" / "step-000002"


def refusal(capsys: pytest.CaptureFixture[str], model: Path, output: Path, *more: str) -> str:
    with pytest.raises(SystemExit) as caught:
        train(model, output, *more)
    assert caught.value.code == 2
    assert not (output / "metrics.jsonl").exists()
    return capsys.readouterr().err


def test_sharded_weights(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = save_model(tmp_path / "m", model, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits_of(load_model(folder, device="cpu")), logits_of(model))
    assert (train(folder, tmp_path / "run") / "model.safetensors").is_file()


def test_weights_in_bfloat16_only(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_llama().to(torch.bfloat16))
    model = load_model(folder, device="cpu")
    assert model.dtype == torch.float32
    rounded = tiny_llama()
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16())
    assert torch.equal(logits_of(model), logits_of(rounded))
    assert (
        load_file(train(folder, tmp_path / "run") / "model.safetensors")["model.norm.weight"].dtype
        is torch.float32
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_padded_beyond_the_tokenizer(tmp_path: Path, tied: bool) -> None:
    words = len(byte_tokenizer())
    model = tiny_qwen2(words + 61, context=64, tie_word_embeddings=tied)
    folder = save_model(tmp_path / "m", model)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    saved = load_file(train(folder, tmp_path / "run") / "model.safetensors")
    assert saved["model.embed_tokens.weight"].shape == (words + 61, 32)
    assert ("lm_head.weight" in saved) is not tied


def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = tiny_llama(len(byte_tokenizer(merges=True)))
    path = save_gguf(tmp_path / "tiny.gguf", model)
    with torch.no_grad():  # as Q8_0 rounds: 32 numbers share a scale in float16
        for weight in model.parameters():
            if weight.ndim == 2 and weight.shape[1] % 32 == 0:
                blocks = weight.view(-1, 32)
                scale = blocks.abs().amax(1, keepdim=True) / 127
                rounded = (blocks / scale).round() * scale.half().float()
                weight.copy_(rounded.view_as(weight))
    loaded = load_model(path, device="cpu")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=0.01, rtol=0.01)
    renderer = load_renderer(path, chat_template=True)
    ours = make_renderer(byte_tokenizer(merges=True), chat_template=True)
    assert renderer.encode_text("abab ab 2015") == ours.encode_text("abab ab 2015")
    assert renderer.encode_prompt("Hi") == ours.encode_prompt("Hi")
    assert renderer.end_ids == ours.end_ids
    assert model_source(tmp_path).gguf_file == "tiny.gguf"  # its folder will do
    assert model_fingerprint(str(path)).startswith("sha256 ")
    trained = train(path, tmp_path / "run")
    assert "quantization_config" not in json.loads((trained / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(trained).num_parameters() == model.num_parameters()


def test_gguf_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\3\4 and so on")
    with pytest.raises(ModelError, match=r"a\.gguf is no GGUF file: it begins with b'PK"):
        load_model(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 200)
    with pytest.raises(ModelError, match="holds 2 GGUF files; name one"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=r"b\.gguf' cannot be opened"):
        load_model(tmp_path / "b.gguf")
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ModelError, match="join the parts"):
        load_model(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(ModelError, match="there is no model folder"):
        load_model("missing.gguf")


def test_an_adapter_is_trained_on(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    start = logits_of(load_model(adapter, device="cpu"))  # merged
    assert not torch.allclose(start, logits_of(load_model(base, device="cpu")), atol=0.1)
    trained = train(adapter, tmp_path / "run")
    state = json.loads((trained / "state.json").read_text())
    assert "adapters" in json.dumps(state)
    first, last = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    assert first.keys() == last.keys()  # the adapter is added in
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank(last[name] - first[name]) == 4
    begun = load_model(adapter, device="cpu").state_dict()[name]
    assert not torch.allclose(last[name], begun, atol=1e-4)  # it learned
    assert torch.equal(first["model.embed_tokens.weight"], last["model.embed_tokens.weight"])


def test_an_adapter_s_dropout_does_not_disturb_learning(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base, lora_dropout=0.5)
    train(adapter, tmp_path / "run", "--learning-rate", "0")
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["learner/sampling_logprob_difference"] < 1e-4


def test_an_adapter_begins_as_it_is_and_resumes_to_the_bit(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    still = train(adapter, tmp_path / "still", "--learning-rate", "0")
    loaded = logits_of(load_model(still, device="cpu"))
    torch.testing.assert_close(loaded, logits_of(load_model(adapter, device="cpu")))
    once = train(adapter, tmp_path / "once")
    with pytest.raises(AssertionError):  # one step only
        train(adapter, tmp_path / "twice", "--steps", "1")
    twice = train(adapter, tmp_path / "twice")
    files = ("model.safetensors", "state/state.safetensors")
    assert [(once / f).read_bytes() for f in files] == [(twice / f).read_bytes() for f in files]


def test_the_reference_of_an_adapter_is_the_adapter_and_not_its_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    output = tmp_path / "run"
    train(adapter, output, "--algorithm-args", "kl_coef=0.1", "--learning-rate", "0")
    divergence = [line["learner/kl"] for line in read_lines(output / "metrics.jsonl")]
    assert divergence == pytest.approx([0, 0], abs=1e-6)


def test_an_adapter_is_merged_on_request(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    trained = load_file(train(adapter, tmp_path / "run", "--merge-adapter") / "model.safetensors")
    start = load_model(adapter, device="cpu").state_dict()
    moved = trained["model.embed_tokens.weight"] - start["model.embed_tokens.weight"]
    assert 0 < moved.abs().max() < 0.1  # every weight learns, from the merged ones


def test_adapters_that_cannot_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    message = refusal(capsys, adapter, tmp_path / "a", "--lora-rank", "8")
    assert "lora_rank is 8, and the adapter to train on has rank 4" in message
    full = save_adapter(tmp_path / "full", base, modules_to_save=["lm_head"])
    message = refusal(capsys, full, tmp_path / "b")
    assert "sets modules_to_save" in message and "--merge-adapter" in message
    other = save_model(tmp_path / "other", tiny_qwen2(hidden=64))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(other))
    assert "does not fit Qwen2ForCausalLM" in refusal(capsys, adapter, tmp_path / "c")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "names the base model None" in refusal(capsys, adapter, tmp_path / "d")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    assert "there is no model folder" in refusal(capsys, adapter, tmp_path / "e")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot be opened" in refusal(capsys, adapter, tmp_path / "f")


def test_a_base_beside_its_adapter_is_found(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="../base")
    assert Path(model_source(adapter).place).resolve() == base
    assert load_renderer(adapter).end_ids == load_renderer(base).end_ids


def test_the_fingerprint_of_an_adapter_tells_its_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    before = model_fingerprint(str(adapter))
    weights = load_file(base / "model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, base / "model.safetensors")
    assert model_fingerprint(str(adapter)) != before


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8"])
def test_quantized_models_are_refused_before_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    folder = save_model(tmp_path / "m", tiny_llama())
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    message = refusal(capsys, folder, tmp_path / "run")
    assert (
        f"quantized ({method})" in message and "give the model that they were made from" in message
    )


@pytest.mark.parametrize(
    "odd",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"pad_token_id": -1},
    ],
)
def test_what_only_concerns_generation_is_repaired(tmp_path: Path, odd: dict[str, Any]) -> None:
    folder = save_model(tmp_path / "m", tiny_llama())
    end = byte_tokenizer().eos_token_id
    edit_json(folder / "generation_config.json", eos_token_id=[end, 7], **odd)
    with pytest.warns(UserWarning, match=rf"cannot be saved .*({'|'.join(odd)})"):
        trained = train(folder, tmp_path / "run")
    kept = json.loads((trained / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [end, 7]
    assert not odd.keys() & {k for k, v in kept.items() if v is not None}


def test_an_end_token_beyond_the_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "m", tiny_llama())
    edit_json(folder / "generation_config.json", eos_token_id=[3, 300])
    message = refusal(capsys, folder, tmp_path / "run")
    assert "the end token 300 is beyond the model's 264 tokens" in message
    require_ends(tiny_llama(), make_renderer(byte_tokenizer()))


@pytest.mark.parametrize("theirs", ["kernels-community/flash-attn", "flash_attention_2", "nobody"])
def test_the_attention_is_ours_whatever_a_configuration_names(tmp_path: Path, theirs: str) -> None:
    folder = save_model(tmp_path / "m", tiny_llama())
    edit_json(folder / "config.json", attn_implementation=theirs, _attn_implementation=theirs)
    model = load_model(folder, device="cpu")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(model), logits_of(tiny_llama()))


def test_code_of_a_model_folder_is_never_run(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_llama())
    mark = tmp_path / "was-run"
    (folder / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_json(
        folder / "config.json",
        model_type="x",
        auto_map={"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"},
    )
    with pytest.raises(ModelError, match="cannot be opened"):
        load_model(folder, device="cpu")
    assert not mark.exists()


def test_an_adapter_learns_alone(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    adapter = save_adapter(tmp_path / "adapter", base)
    from research_agent.algorithms import make_algorithm

    model = load_model(adapter, device="cpu", merge_adapter=False)
    rule = make_algorithm("grpo", kl_coef=0.0, entropy_coef=0.0)
    learner = Learner(model, rule, adapter=str(adapter))
    assert learner.has_adapters
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns == set(adapters(model))
    with pytest.raises(ConfigError, match="give one, or set its KL to 0"):
        Learner(
            load_model(base, device="cpu"),
            make_algorithm("grpo", kl_coef=0.1),
            adapter=str(adapter),
        )


def test_ordinary_models_warn_of_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(folder, device="cpu")


# --- mistyped names -------------------------------------------------------------------------------


def test_a_mistyped_name_suggests_starters_and_folders_and_asks_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "notes").mkdir()  # no model
    for mistyped, meant in {
        "miniworld-stater": "did you mean miniworld-starter",
        "runs/mien": "did you mean runs/mine",
        "./runs/min": "did you mean runs/mine",
    }.items():
        with pytest.raises(ModelError, match=meant):
            resolve_model(mistyped)
    for named in ("gpt2", "notes", "Qwen/Qwen2.5-7B"):
        assert resolve_model(named) == named


def test_a_name_in_a_local_folder_is_sought_on_no_hub_unless_its_cache_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "runs").mkdir()
    said = r"no model folder runs/other\. .* \(hf download runs/other .* runs is a local folder\)"
    with pytest.raises(ModelError, match=said):
        resolve_model("runs/other")
    (tmp_path / "hub" / "models--runs--other").mkdir(parents=True)
    assert resolve_model("runs/other") == "runs/other"


def test_a_folder_without_model_and_tokenizer_is_said_to_hold_none(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")  # as in the folder of an evaluation
    with pytest.raises(ModelError, match=r"holds no model: it has no config\.json; give a folder"):
        load_renderer(tmp_path)
