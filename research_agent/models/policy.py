"""The policy: open a causal language model, and compute log-probabilities of action tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from research_agent.batch import Batch, MicroBatch, Packing, micro_batches
from research_agent.distributed import (
    all_reduce_sum,
    rank_and_size,
    shard_batches,
)
from research_agent.errors import ConfigError, ModelError
from research_agent.models.generation import repair_generation, tokens_of_unreadable
from research_agent.models.prepare import (
    decoder_layers,
    output_logits,
    packed_options,
    require_learnable,
    require_same_positions,
    tree_options,
)
from research_agent.models.source import (
    ModelSource,
    model_source,
    opening,
    read_config,
    reading_weights,
    require_few_layers,
)

if TYPE_CHECKING:
    from research_agent.config import SamplingConfig
    from research_agent.renderer import Renderer

Precision = Literal["float32", "bfloat16"]

# Logits in memory at a time. 2^26 of them in float32 are 256 MiB; GPUs need larger products.
MAX_LOGITS = 2**26
MAX_LOGITS_GPU = 2**28


def load_model(
    name: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    device: str = "auto",
    merge_adapter: bool = True,
) -> Any:
    """Open a causal language model of the transformers library, for evaluation and training.

    Args:
        name: a starter of this package, a folder (a checkpoint is one), a GGUF file, the folder of
            a LoRA adapter, or a name on the hub.
        dtype: number format of the weights. Quantized weights of a GGUF file are converted to it.
        device: "cpu", "cuda", or "auto": cuda if there is one.
        merge_adapter: merge a LoRA adapter into the weights of its base; otherwise only the base is
            opened, and ``lora.load_adapters`` can add the adapter.

    Returns:
        The model, in evaluation mode, because dropout would make the learner's log-probabilities
        differ from the sampler's. Its attention is one of the transformers library's own, whatever
        its configuration names, and its ``generation_config`` can be saved.

    Raises:
        ModelError: there is no such model; weights are missing, or quantized and cannot learn; or
            its logits do not follow from its last hidden states and its head.
    """
    source = model_source(name)
    device = find_device(device)
    with opening(f"the model {str(name)!r}"):
        model = _open(source, str(name), getattr(torch, dtype))
        repair_generation(model, str(name))
    if source.adapter is not None and merge_adapter:
        from research_agent.models.lora import merge_adapter as merge  # noqa: PLC0415

        model = merge(model, source.adapter)
    model = model.to(device).eval()
    if model.device.type == "cpu":
        # The alignment of weights decides the last bits of a product, and weights in a mapped file
        # have any. Copies make a resumed run equal to one that was never stopped.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    require_learnable(model, str(name))
    return model


def find_device(name: str) -> str:
    """Resolve the device "auto" to cuda, if there is one, or else cpu.

    Raises:
        ConfigError: torch knows no such device or finds no GPU, or it is neither CPU nor GPU; some,
            such as mps, lack the float64 in which rewards are computed.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        message = f"--device is {name!r}, which torch does not know; give auto, cpu or cuda"
        raise ConfigError(message) from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}, which is not supported; give auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}, and torch finds no GPU; give auto or cpu")
    return name


def save_settings(model: Any, folder: Path) -> None:
    """Write config.json and generation_config.json, as ``save_pretrained`` does.

    Args:
        model: a causal language model of the transformers library; it may be sharded.
        folder: an existing folder.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _open(source: ModelSource, name: str, dtype: torch.dtype) -> Any:
    """Open the weights of a source, on the CPU."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    options = {**source.options, "trust_remote_code": False}
    config = read_config(source, name)
    refuse_unusable(config, name)
    # A configuration can name an attention that transformers would download and run.
    config._attn_implementation = None
    if (tokens := tokens_of_unreadable(source.place, name)) is not None:
        options["generation_config"] = tokens
    with reading_weights(source.place):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source.place, config=config, dtype=dtype, output_loading_info=True, **options
        )
    if missing := sorted(loaded["missing_keys"]):
        message = (
            f"the model {name!r} lacks {len(missing)} of its weights, among them"
            f" {missing[0]!r}; get or save it again"
        )
        raise ModelError(message)
    return _plain_weights(model, dtype) if source.gguf_file else model


def require_ends(model: Any, renderer: Renderer) -> None:
    """Check that the model can sample the tokens that end a turn.

    Raises:
        ModelError: one of them is not in the model's vocabulary.
    """
    words = len(model.get_output_embeddings().weight)
    beyond = sorted(token for token in renderer.end_ids if not 0 <= token < words)
    if beyond:
        raise ModelError(
            f"the end token {beyond[0]} is beyond the model's {words} tokens, so that no turn"
            " could end with it; correct eos_token_id in generation_config.json, or eos_token in"
            " tokenizer_config.json"
        )


def token_logprobs(
    model: Any,
    micro: MicroBatch,
    temperature: float = 1.0,
    max_logits: int | None = None,
    *,
    precision: Precision = "float32",
    compile: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each action token, and the entropy where it was sampled.

    Logits are computed only at positions whose next token is an action token. If there are more
    than ``max_logits``, they are computed piece by piece, and again for the gradient, so that
    [tokens, vocabulary] is never in memory as a whole.

    Args:
        model: a causal language model of the transformers library.
        micro: R rows of W tokens with ``a`` action tokens. For packed rows the model must have been
            prepared.
        temperature: the sampler's temperature; it divides the logits.
        max_logits: most logits per piece; None: a number that suits the device.
        precision: number format of the matrix products; the softmax is at least float32.
        compile: fuse the operations of the softmax.

    Returns:
        Log-probabilities [a] and entropies [a] in nats, in float32 (float64 if the model is), with
        gradient where gradients are enabled.
    """
    targets = micro.part.targets
    head = output_logits(model)
    most = max_logits or (MAX_LOGITS_GPU if targets.is_cuda else MAX_LOGITS)
    rows = max(1, most // len(model.get_output_embeddings().weight))
    compute = _compiled_logprobs_and_entropy() if compile else _logprobs_and_entropy
    with torch.autocast(targets.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        states = action_hidden_states(model, micro)
        if micro.distinct is not None:
            states, targets = states[micro.distinct], targets[micro.distinct]
        if len(states) <= rows:
            return _spread(compute(head(states), targets, temperature), micro)
        pieces = [
            checkpoint(
                lambda states, targets: compute(head(states), targets, temperature),
                *piece,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for piece in zip(torch.split(states, rows), torch.split(targets, rows), strict=True)
        ]
    logprobs, entropy = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return _spread((logprobs, entropy), micro)


def _spread(computed: tuple[Tensor, Tensor], micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """In rows of trees, give every action token the values of the distinct token it equals."""
    if micro.distinct_of is None:
        return computed
    return computed[0][micro.distinct_of], computed[1][micro.distinct_of]


def action_hidden_states(model: Any, micro: MicroBatch) -> Tensor:
    """Run a model's body, and return its last hidden states where action tokens were sampled.

    Args:
        model: as for ``token_logprobs``.
        micro: as for ``token_logprobs``; ``a`` action tokens.

    Returns:
        The states, [a, hidden size].

    Raises:
        ContextError: a trajectory is so long that it would change how the model reads the others.
    """
    packing: dict[str, Any] = {}
    longest = micro.max_seqlen or micro.tokens.shape[1]
    require_same_positions(model, longest if micro.tree is None else micro.tree.max_keys)
    if micro.tree is not None:
        packing = {"position_ids": micro.position_ids, **tree_options(micro.tree)}
    elif micro.cu_seqlens is not None:
        options = packed_options(micro.cu_seqlens, micro.max_seqlen)
        packing = {"position_ids": micro.position_ids, **options}
    # Padding is on the right, so causal attention needs no mask.
    output = model.base_model(input_ids=micro.tokens, use_cache=False, **packing)
    states: Tensor = output.last_hidden_state.flatten(0, 1).index_select(0, micro.logit_index)
    return states


class TokenLogprobs(nn.Module):
    """``token_logprobs`` of a model as a module, for FSDP to wrap.

    Args:
        model: as for ``token_logprobs``; so are the other arguments.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 1.0,
        *,
        precision: Precision = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._settings: dict[str, Any] = {"precision": precision, "compile": compile}
        self._temperature = temperature

    def forward(self, micro: MicroBatch | Callable[[Any], Any]) -> Any:
        """Log-probabilities and entropies of a pass's action tokens.

        Given a function instead, call it with the model: FSDP gathers the weights only in here.
        """
        if not isinstance(micro, MicroBatch):
            return micro(self.model)
        return token_logprobs(self.model, micro, self._temperature, **self._settings)


def gathered_units(model: Any) -> list[nn.Module]:
    """The modules whose weights FSDP gathers one by one: the layers, and an untied embedding."""
    embedding = model.get_input_embeddings()
    tied = embedding.weight is model.get_output_embeddings().weight
    return decoder_layers(model) if tied else [*decoder_layers(model), embedding]


def own_passes(
    batch: Batch, max_tokens: int, *, packing: Packing = "off"
) -> Iterator[tuple[MicroBatch, bool]]:
    """Yield this rank's passes over a batch; see ``shard_batches``.

    Args:
        batch: trajectories.
        max_tokens: most tokens per pass, padding included.
        packing: as for ``micro_batches``.
    """
    ranks = rank_and_size()[1]
    return shard_batches(micro_batches(batch, max_tokens, packing=packing, ranks=ranks))


@torch.no_grad()
def per_token(
    compute: Callable[[MicroBatch], Tensor],
    batch: Batch,
    max_tokens: int,
    *,
    packing: Packing = "off",
) -> Tensor:
    """Compute a number for each action token of a batch, without gradient.

    Args:
        compute: returns the numbers of a pass's action tokens, [a].
        batch: trajectories with A action tokens.
        max_tokens: most tokens per pass, padding included.
        packing: as for ``micro_batches``.

    Returns:
        The numbers, [A], on all ranks.
    """
    found: Tensor | None = None
    for micro, counts in own_passes(batch, max_tokens, packing=packing):
        values = compute(micro)
        if found is None:
            found = values.new_zeros(len(batch.targets))
        if counts:
            found[micro.token_index] = values
    return batch.sampler_logprobs.new_zeros(0) if found is None else all_reduce_sum(found)


def batch_logprobs(
    logprobs: Callable[[MicroBatch], tuple[Tensor, Tensor]],
    batch: Batch,
    max_tokens: int,
    *,
    packing: Packing = "off",
) -> Tensor:
    """Compute the log-probabilities of all action tokens of a batch, without gradient.

    Args:
        logprobs: a ``TokenLogprobs``, or a function that returns the same for a pass.
        batch: trajectories with A action tokens.
        max_tokens: most tokens per pass, padding included.
        packing: as for ``micro_batches``.

    Returns:
        The log-probabilities, [A].
    """
    return per_token(lambda micro: logprobs(micro)[0], batch, max_tokens, packing=packing)


def _logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies, from logits [a, vocabulary]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


@cache
def _compiled_logprobs_and_entropy() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return torch.compile(_logprobs_and_entropy, dynamic=True)


def _plain_weights(model: Any, dtype: torch.dtype) -> Any:
    """Copy a dequantized model; transformers refuses to save the original as quantized."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def refuse_unusable(config: Any, name: str) -> None:
    """Refuse a configuration with quantized weights, which cannot learn, or too many layers.

    Raises:
        ModelError: names the model and what is wrong.
    """
    require_few_layers(getattr(config, "num_hidden_layers", 0), name)
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    kind = found.get("quant_method") if isinstance(found, Mapping) else found.quant_method
    raise ModelError(
        f"the weights of {name!r} are quantized ({getattr(kind, 'value', kind)}), and such weights"
        " cannot learn; give the model that they were made from, or dequantize them first. To"
        " evaluate them as they are, serve them with vLLM and give --endpoint"
    )


def episode_context(model: Any, sampling: SamplingConfig) -> int:
    """Most tokens of an episode: as many as the settings allow and the model has positions for."""
    wanted = sampling.max_prompt + sampling.max_response
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return wanted if limit is None else min(wanted, limit)
