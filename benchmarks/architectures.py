"""Which architectures can be sampled and trained: docs/reference/models.md.

    python -m benchmarks.architectures              # print the table
    python -m benchmarks.architectures --write      # and put it into docs/reference/models.md

A tiny random model of each architecture undergoes the checks that every model undergoes when it is
loaded: the learner's rows, the transformers engine and packing are compared with plain transformers
on two short sequences. The table shows their verdicts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.tables import markdown_table, replace_table

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"

_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama, SmolLM2, Mistral 7B v0.2 and later": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {}),
    "Qwen2, Qwen2.5": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 8}),
    "Qwen3 MoE": ("Qwen3MoeConfig", {"head_dim": 8, **_EXPERTS}),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32},
    ),
    "Qwen3.5": ("Qwen3_5TextConfig", _DELTA),
    "Gemma 2": ("Gemma2Config", {"head_dim": 8}),
    "Gemma 3": ("Gemma3TextConfig", {"head_dim": 8}),
    "Phi-3, Phi-4": ("Phi3Config", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "GPT-NeoX, Pythia": ("GPTNeoXConfig", {}),
    "Granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "Granite 4 hybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            **_SSM,
        },
    ),
    "Falcon": ("FalconConfig", {}),
    "Falcon-H1": ("FalconH1Config", {"mamba_d_ssm": 64, **_SSM}),
    "LFM2": (
        "Lfm2Config",
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    ),
    "StableLM": ("StableLmConfig", {}),
    "Nemotron": ("NemotronConfig", {}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    "Bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "Mamba": ("MambaConfig", {"state_size": 4}),
}
"""Printed name: the configuration's class in transformers, and what it needs to be tiny."""

_ALONE = re.compile(r"one sequence at a time, .*? are wrong \(([^;)]*)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks say of an architecture; empty strings are "as plain transformers"."""

    name: str
    learner: str
    engine: str
    alone: str  # why the engine is right with one sequence at a time only
    packing: str


@dataclass(frozen=True)
class Arguments:
    """Try every architecture with a tiny random model, and print a table."""

    write: bool = False
    """Put the table into docs/reference/models.md as well."""


def tiny(config: str, settings: Mapping[str, Any]) -> Any:
    """A random model of an architecture, far from uniform so that a wrong token shows."""
    import torch  # noqa: PLC0415 - slow to import
    import transformers  # noqa: PLC0415

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 264,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }
    made = getattr(transformers, config)(**{**sizes, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    return model.eval()


def examine(name: str, config: str, settings: Mapping[str, Any]) -> Verdict:
    """Let a tiny model of an architecture undergo the checks of loading."""
    from research_agent.engines import make_engine  # noqa: PLC0415
    from research_agent.models.prepare import prepare, require_learnable  # noqa: PLC0415
    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_agent.renderer import load_renderer  # noqa: PLC0415

    model = tiny(config, settings)
    renderer = load_renderer(resolve_model("miniworld-starter"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        learner = _refusal(lambda: require_learnable(model, name))
        engine = _refusal(
            lambda: make_engine(
                "transformers", model, renderer, max_slots=2, max_context=100, share=False
            )
        )
        packing = _refusal(lambda: prepare(model, packing="on"))
    causes = (_ALONE.search(str(warning.message)) for warning in said)
    alone = next((found[1] for found in causes if found), "")
    return Verdict(name, learner, engine, alone, packing)


def _refusal(check: Callable[[], object]) -> str:
    from research_agent.errors import ModelError  # noqa: PLC0415

    try:
        check()
    except ModelError as error:
        return str(error)
    return ""


def table(verdicts: list[Verdict]) -> str:
    """The verdicts in Markdown."""
    rows = []
    for verdict in verdicts:
        engine = f"one at a time: {verdict.alone}" if verdict.alone else "yes"
        rows.append(
            (
                verdict.name,
                "no: use vLLM" if verdict.engine else engine,
                "refused" if verdict.learner else "yes",
                "off" if verdict.packing else "yes",
            )
        )
    return markdown_table(("architecture", "transformers engine", "learner", "packing"), rows)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.architectures")
    made = table([examine(name, *each) for name, each in ARCHITECTURES.items()])
    print(made, end="")
    if arguments.write:
        replace_table(PAGE, made)


if __name__ == "__main__":
    main()
