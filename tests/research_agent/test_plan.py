"""What a run would need, on GPUs that nobody has to have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from research_agent.cli import main
from research_agent.config import TrainConfig
from research_agent.errors import ConfigError
from research_agent.models.policy import MAX_LOGITS_GPU
from research_agent.plan import HEAD_LOGITS, SHAPES, parse_gpus, plan, shape_of
from research_agent.presets import PRESETS

SMALL = ("miniworld", "smollm2-wiki")
PAPERS = [name for name in PRESETS if name not in SMALL and not name.endswith("-mini")]


def with_vllm(name: str) -> TrainConfig:
    return replace(PRESETS[name], sampling=replace(PRESETS[name].sampling, engine="vllm"))


def test_sizes_are_those_that_the_authors_publish() -> None:
    published = {"Qwen/Qwen2.5-3B": 3.09, "Qwen/Qwen2.5-7B": 7.61, "Qwen/Qwen2.5-32B": 32.8}
    published["meta-llama/Llama-3.1-8B"] = 8.03
    for name, shape in SHAPES.items():
        assert shape.parameters / 1e9 == pytest.approx(published[name], rel=0.005)
    assert SHAPES["Qwen/Qwen2.5-7B"].kv_numbers == 2 * 28 * 4 * 128
    assert HEAD_LOGITS == MAX_LOGITS_GPU


def test_sizes_come_from_a_folder(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    small = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        tie_word_embeddings=True,
    )
    small.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    counted = sum(p.numel() for p in Qwen2ForCausalLM(small).parameters() if p.ndim == 2)
    assert shape.parameters == counted

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        shape_of(str(tmp_path))
    with pytest.raises(ConfigError, match=r"'nobody/knows' are not known.*Qwen2.5-7B"):
        shape_of("nobody/knows")


def test_what_is_kept_by_hand() -> None:
    found = plan(with_vllm("research-7b"), "8xH200")
    weights = SHAPES["Qwen/Qwen2.5-7B"].parameters
    assert found.memory["learner: weights"] == 4 * weights / 8
    assert found.memory["learner: gradients and optimizer"] == (4 + 8) * weights / 8
    assert found.memory["reference policy"] == 4 * weights / 8
    assert found.memory["sampler: weights"] == 2 * weights
    # 1,280 episodes on 8 GPUs, 2,600 tokens each, 2 bytes a number
    assert found.memory["sampler: keys and values"] == 160 * 2600 * 2 * 28 * 4 * 128 * 2
    precise = with_vllm("research-7b")
    precise = replace(precise, learner=replace(precise.learner, precision="float32"))
    assert plan(precise, "8xH200").memory["sampler: weights"] == 4 * weights
    assert found.tokens == 256 * 5 * 1300
    assert found.fits and found.cures == ()
    assert found.index["passages"] == "21,015,324 (wiki18)"
    assert (
        plan(replace(PRESETS["miniworld"], policy=with_vllm("research-7b").policy), "1xH200").index
        == {}
    )


@pytest.mark.parametrize("name", PAPERS)
def test_what_does_not_fit_is_told_with_settings_that_would(name: str) -> None:
    found = plan(PRESETS[name], "8xH100")
    assert not found.fits
    assert found.cures
    flags = {"--engine vllm": "vllm", "--max-in-flight 8": 8}
    for cure in found.cures:
        assert any(flag in cure for flag in flags) or "smaller model" in cure


def test_a_cure_is_one() -> None:
    config = PRESETS["research-7b"]
    assert "--max-in-flight 8" in plan(config, "8xH200").cures
    few = replace(config, sampling=replace(config.sampling, max_in_flight=8))
    assert plan(few, "8xH200").fits


@pytest.mark.parametrize("gpus", ["H100", "0xH100", "8xB9000", "8 x H100", ""])
def test_gpus_that_cannot_be_read_are_refused(gpus: str) -> None:
    with pytest.raises(ConfigError, match=r"8xH100.*known: H200, H100"):
        parse_gpus(gpus)


def test_the_command_line_prints_a_plan_and_loads_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["train", "research-7b", "--plan", "8xH200", "--engine", "vllm"])
    out = capsys.readouterr().out
    assert "memory of a GPU" in out and "not measured" in out and "does not fit" not in out
    with pytest.raises(SystemExit) as ended:
        main(["train", "research-32b", "--plan", "1xH100", "--json"])
    assert ended.value.code == 2
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False and told["cures"]
