"""Tokens per second of prefill, decoding and learning with a model on this machine."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from benchmarks.real.stages import RealConfig, Scale
from research_agent.system.files import write_atomic

if TYPE_CHECKING:
    from research_agent.batch import Packing

PROMPT, SAMPLED = 256, 24  # tokens per row
QUESTION = 48  # tokens of the prompt that a group shares
LENGTHS = (200, 350, 500, 650)  # tokens of the episodes that are learned


def measure_speed(config: RealConfig, model: str, scale: Scale) -> dict[str, float]:
    """Measure a model once; the numbers are kept in speed.json in the output folder.

    Args:
        config: device, number format and output folder.
        model: folder of the model, a GGUF file, or a name.
        scale: how many rows are decoded at once (16 at most), and the rank of the adapter.

    Returns:
        ``threads``, ``rows``, and tokens per second as ``prefill`` and ``decode`` (both summed over
        the rows), ``learn_full``, and ``learn_lora`` with ``--packing`` off, on and tree.
    """
    path = config.output / "speed.json"
    if path.is_file():
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    import torch  # noqa: PLC0415

    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_agent.renderer import load_renderer  # noqa: PLC0415

    renderer = load_renderer(resolve_model(model))
    prompt = renderer.encode_text("Who wrote the passage that was read? " * 20)[:PROMPT]
    rows = min(16, scale.max_in_flight)
    found = {
        "threads": float(torch.get_num_threads()),
        "rows": float(rows),
        **_sampling(config, model, renderer, prompt, rows),
        "learn_full": _learning(config, model, lora_rank=0),
        "learn_lora": _learning(config, model, lora_rank=scale.lora_rank),
        "learn_lora_packed": _learning(config, model, lora_rank=scale.lora_rank, packing="on"),
        "learn_lora_tree": _learning(config, model, lora_rank=scale.lora_rank, packing="tree"),
    }
    write_atomic(path, json.dumps(found) + "\n")
    return found


def _sampling(
    config: RealConfig, model: str, renderer: Any, prompt: list[int], rows: int
) -> dict[str, float]:
    """Tokens per second of ``prefill`` and ``decode``, of all rows together."""
    from research_agent.engines import make_engine  # noqa: PLC0415
    from research_agent.engines.base import SamplingParams  # noqa: PLC0415
    from research_agent.models.policy import load_model  # noqa: PLC0415

    engine: Any = make_engine(
        "transformers",
        load_model(model, device=config.device),
        renderer,
        max_slots=rows,
        max_context=PROMPT + SAMPLED + 1,
        dtype=config.dtype,
    )
    for slot in range(rows):
        engine.submit(slot, prompt, SamplingParams(max_tokens=SAMPLED, seed=slot))
    start = time.perf_counter()
    engine.step()  # prefills all rows, and samples the first token of each
    middle = time.perf_counter()
    sampled = 0
    while engine.busy:
        sampled += engine.busy
        engine.step()
    return {
        "prefill": rows * len(prompt) / (middle - start),
        "decode": sampled / max(1e-9, time.perf_counter() - middle),
    }


def _learning(config: RealConfig, model: str, *, lora_rank: int, packing: Packing = "off") -> float:
    """Tokens per second of a second update with a group of episodes; rank 0 trains all weights."""
    from research_agent.algorithms import make_algorithm  # noqa: PLC0415
    from research_agent.config import LearnerConfig  # noqa: PLC0415
    from research_agent.learner import Learner  # noqa: PLC0415
    from research_agent.models.policy import load_model  # noqa: PLC0415
    from research_agent.trajectory import Group, Segment, Trajectory  # noqa: PLC0415

    asked = tuple(range(1, QUESTION + 1))
    episodes = []
    for i, length in enumerate(LENGTHS):
        said = tuple(1 + (i + place) % 500 for place in range(length - QUESTION))
        action = Segment("action", said, (-1.0,) * len(said), reward=float(i))
        segments = (Segment("prompt", asked), action)
        episodes.append(Trajectory(0, i, segments, action.reward, True, False))
    learner = Learner(
        load_model(model, device=config.device),
        make_algorithm("grpo", kl_coef=0.0, entropy_coef=0.0),
        LearnerConfig(
            lora_rank=lora_rank,
            learning_rate=0.0,
            precision=config.dtype,
            packing=packing,
            micro_batch_tokens=2048,
        ),
    )
    learner.update([Group(0, episodes)])  # loads kernels, and makes room
    start = time.perf_counter()
    learner.update([Group(0, episodes)])
    return sum(LENGTHS) / (time.perf_counter() - start)
