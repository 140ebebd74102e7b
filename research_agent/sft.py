"""Supervised fine-tuning: fit a model to demonstrations, as the warm start of a small policy.

A demonstration is a list of (provenance, text) pairs. The loss is the mean negative log-probability
of the tokens of its actions; prompts and observations are context. An action that ends the
demonstration is followed by the end token.

Demonstrations come from a JSON Lines file with lines such as
``{"segments": [["prompt", "..."], ["action", "..."]]}``, or from a function, ``"module:function"``.
For a model with a chat template, a prompt may be a list of chat messages instead of a text.
Demonstrations are learned in their order, so that a function can teach one thing before another.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from research_agent.config_checks import require_chat_template, require_one_process
from research_agent.errors import ConfigError, ContextError, NonFiniteError
from research_agent.formats import LONGEST_LINE
from research_agent.presets import offered
from research_agent.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from research_agent.batch import Batch
    from research_agent.renderer import Renderer
    from research_agent.trajectory import Segment, Trajectory

Demonstration = list[tuple[str, Any]]  # (provenance, text, or messages of a prompt)
PROVENANCES = ("prompt", "action", "observation")

BATCHES_SORTED_TOGETHER = 16  # with ``batch_by_length``: batches that are sorted at once


@dataclass(frozen=True)
class SFTConfig:
    """Fit a model to demonstrations."""

    demonstrations: str
    """A JSON Lines file, or MODULE:FUNCTION that yields lists of (provenance, text)."""
    demonstration_args: Settings = field(default_factory=dict)
    """Arguments of that function, besides count and seed."""
    count: int = 10_000
    """Demonstrations learned; a file that has fewer is read again."""
    model: str | None = None
    """Model to start from; none makes a new one of the sizes below."""
    chat_template: bool = False
    """Render prompts with the model's chat template, as train and eval do with --chat-template."""
    chat_template_args: Settings = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking=false."""
    chat_template_date: str | None = None
    """The day, YYYY-MM-DD, that a chat template which writes the date shows; none shows today."""
    bare_text: bool = False
    """Learn from prompts as plain text, although the model has a chat template."""
    vocabulary: str | None = None
    """MODULE:FUNCTION that lists the phrases a new model's tokenizer knows."""
    hidden_size: int = 128
    """Width of a new model."""
    layers: int = 4
    """Depth of a new model."""
    heads: int = 4
    """Attention heads of a new model; half as many for keys and values."""
    context: int = 1024
    """Longest sequence of a new model, in tokens."""
    batch: int = 12
    """Demonstrations per optimizer step."""
    micro_batch_tokens: int = 16_384
    """Tokens per forward and backward pass, padding included. Fewer need less memory."""
    batch_by_length: bool = False
    """Put demonstrations of similar length into one batch, which takes less time, as it leaves less
    padding. A batch's loss is the mean of its tokens, so a token of a short demonstration then
    counts more than one of a long demonstration, and what short ones do is learned more often."""
    learning_rate: float = 3e-3
    """The highest learning rate; it rises over the first steps and falls linearly at the end."""
    warmup_steps: int = 50
    """Optimizer steps over which the learning rate rises."""
    decay_share: float = 0.7
    """Share of the steps over which the learning rate falls."""
    final_share: float = 0.05
    """Share of the learning rate that is left at the end."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the matrix products. bfloat16 is twice as fast on a GPU, and on a CPU that
    has instructions for it; the weights stay float32."""
    seed: int = 0
    """Seed of the demonstrations, the first weights, and the order within a few batches."""
    output: Path = Path("runs/sft")
    """Folder of the trained model."""
    threads: int | None = None
    """CPU threads; none takes what torch chooses. The last bits of the weights depend on them."""
    quiet: bool = False
    """Show no progress."""


_OWN = SFTConfig(
    demonstrations="demonstrations.jsonl",
    model="miniworld-starter",
    learning_rate=1e-4,
    warmup_steps=10,
    output=Path("runs/sft"),
)


PRESETS: dict[str, SFTConfig] = {}
"""Configurations by name: those that installed packages offer, and "own"."""
DESCRIPTIONS: dict[str, str] = {}
"""A sentence about each preset."""
for _name, _data in offered("research_agent.sft_presets"):
    _settings = {**_data, "output": Path(_data["output"])}
    DESCRIPTIONS[_name] = str(_settings.pop("description"))
    PRESETS[_name] = SFTConfig(**_settings)
PRESETS["own"] = _OWN
DESCRIPTIONS["own"] = (
    "Fit a model to demonstrations of your own, such as those of research-agent sample."
)


def run(config: SFTConfig) -> Path:
    """Fit a model, and write it to the output folder as transformers reads it.

    Matrices whose name does not hold "embed" are trained by Muon (Jordan et al. 2024), the rest by
    AdamW.

    Returns:
        The folder.

    Raises:
        ConfigError: a setting that cannot be used, or demonstrations without actions.
        ContextError: a demonstration that is longer than the model's context.
        NonFiniteError: the loss is not finite.
    """
    import torch  # noqa: PLC0415 - slow to import, and not for --help
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from research_agent.batch import make_batch  # noqa: PLC0415
    from research_agent.checkpoint import rehearse  # noqa: PLC0415
    from research_agent.trajectory import Group  # noqa: PLC0415

    _validate(config)
    config.output.mkdir(parents=True, exist_ok=True)  # now: not after all the work is done
    torch.manual_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, renderer = _new_model(config) if config.model is None else _open_model(config)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        renderer.tokenizer.save_pretrained(folder)

    rehearse(config.output, write)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=config.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    steps = config.count // config.batch
    limit: int = getattr(model.config, "max_position_embeddings", sys.maxsize)
    started, average, step = time.perf_counter(), 0.0, -1
    console = Console(stderr=True)
    with Progress(console=console, disable=config.quiet or not console.is_terminal) as progress:
        task = progress.add_task("sft", total=steps)
        for step, batch in enumerate(_batches(config, renderer)):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * _schedule(config, step / steps, step)
            longest = max(len(trajectory.tokens) for trajectory in batch)
            if longest > limit:
                message = f"a demonstration of {longest} tokens does not fit the context of {limit}"
                raise ContextError(f"{message}; leave it out, or give a larger --context")
            rollout = make_batch([Group(i, [t]) for i, t in enumerate(batch)])
            loss = _backward(model, rollout, config)
            if not math.isfinite(loss):
                raise NonFiniteError(f"sft: the loss of step {step} is {loss}")
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average = loss if step == 0 else 0.98 * average + 0.02 * loss
            progress.update(task, advance=1, description=f"sft  loss {average:.3f}")
            if not (config.quiet or console.is_terminal) and (step + 1) % max(1, steps // 20) == 0:
                seconds = time.perf_counter() - started
                console.print(f"step {step + 1}/{steps}  loss {average:.4f}  {seconds:.0f} s")
    if step < 0:
        message = f"{config.demonstrations} gives fewer demonstrations than --batch {config.batch}"
        raise ConfigError(message)
    write(config.output)
    if not config.quiet:
        seconds = time.perf_counter() - started
        print(f"{config.output}: loss {average:.4f} after {steps} steps, {seconds:.0f} s")
    return config.output


def _backward(model: Any, batch: Batch, config: SFTConfig) -> float:
    """Accumulate the gradients of a batch; returns the mean loss of its action tokens, in nats."""
    from research_agent.batch import micro_batches  # noqa: PLC0415
    from research_agent.models.policy import token_logprobs  # noqa: PLC0415

    loss = 0.0
    for micro in micro_batches(batch, config.micro_batch_tokens):
        logprobs, _ = token_logprobs(model, micro, precision=config.precision)
        part = -logprobs.sum() / len(batch.targets)
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
    return loss


def _validate(config: SFTConfig) -> None:
    require_one_process("sft")
    for name in ("batch", "micro_batch_tokens", "hidden_size", "layers", "heads", "context"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(config, name)}; it must be at least 1")
    if config.threads is not None and config.threads < 1:
        raise ConfigError(f"--threads is {config.threads}; it must be at least 1")
    require_chat_template(
        config.chat_template, config.chat_template_args, config.chat_template_date
    )
    if config.chat_template and config.bare_text:
        raise ConfigError("--chat-template and --bare-text exclude each other; give one of them")
    if config.chat_template and config.model is None:
        raise ConfigError("--chat-template needs a --model that has one; a new model has none")
    if config.count < config.batch:
        raise ConfigError(f"--count {config.count} must be at least --batch {config.batch}")
    if config.model is None and config.hidden_size % (2 * config.heads):
        raise ConfigError(
            f"--hidden-size {config.hidden_size} must be a multiple of twice --heads {config.heads}"
        )
    if not 0 < config.learning_rate < math.inf or not config.max_grad_norm > 0:
        raise ConfigError(
            f"--learning-rate {config.learning_rate} and --max-grad-norm {config.max_grad_norm} "
            "must be above 0"
        )


def _schedule(config: SFTConfig, done: float, step: int) -> float:
    """The factor of the learning rate at a step, when a share ``done`` of all steps is done."""
    rising = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (1 - done) / max(1e-9, config.decay_share))
    return rising * (config.final_share + (1 - config.final_share) * left)


def _batches(config: SFTConfig, renderer: Renderer) -> Iterator[list[Trajectory]]:
    """Yield whole batches: in the demonstrations' order, or some batches at a time by length."""
    import torch  # noqa: PLC0415

    generator = torch.Generator().manual_seed(config.seed)
    demonstrations = islice(_demonstrations(config), config.count)
    stream = (as_trajectory(d, renderer) for d in demonstrations)
    if not config.batch_by_length:
        while len(batch := list(islice(stream, config.batch))) == config.batch:
            yield batch
        return
    while chunk := list(islice(stream, config.batch * BATCHES_SORTED_TOGETHER)):
        chunk.sort(key=lambda trajectory: len(trajectory.tokens))
        starts = range(0, len(chunk) - config.batch + 1, config.batch)
        for i in torch.randperm(len(starts), generator=generator).tolist():
            yield chunk[starts[i] : starts[i] + config.batch]


def as_trajectory(demonstration: Iterable[tuple[str, Any]], renderer: Renderer) -> Trajectory:
    """Tokenize a demonstration as a rollout would: every part on its own.

    Args:
        demonstration: (provenance, text) pairs; a prompt may be a list of chat messages.
        renderer: the model's renderer.

    Raises:
        ConfigError: a provenance that does not exist, no action, or messages for a renderer that
            has no chat template.
    """
    from research_agent.trajectory import Segment, Trajectory  # noqa: PLC0415

    parts = list(demonstration)
    if not any(provenance == "action" for provenance, _ in parts):
        raise ConfigError(f"a demonstration has no action to learn: {parts!r:.200}")
    segments: list[Segment] = []
    for i, (provenance, text) in enumerate(parts):
        if provenance == "prompt":
            segments.append(_prompt(text, renderer))
        elif provenance == "observation":
            segments.append(Segment("observation", tuple(renderer.encode_text(text)), text=text))
        elif provenance == "action":
            tokens = tuple(renderer.encode_text(text))
            if i == len(parts) - 1:
                end: int | None = renderer.tokenizer.eos_token_id
                tokens += (min(renderer.end_ids) if end is None else end,)
            segments.append(Segment("action", tokens, (0.0,) * len(tokens), text=text))
        else:
            known = ", ".join(PROVENANCES)
            raise ConfigError(f"unknown provenance {provenance!r}; known: {known}")
    return Trajectory(0, 0, tuple(segments), reward=0.0, terminated=True, truncated=False)


def _prompt(prompt: Any, renderer: Renderer) -> Segment:
    """The segment of a prompt, which is a text or a list of chat messages."""
    from research_agent.trajectory import Segment  # noqa: PLC0415

    if isinstance(prompt, str):
        return Segment("prompt", tuple(renderer.encode_prompt(prompt)), text=prompt)
    if not renderer.chat_template:
        raise ConfigError(
            "a demonstration's prompt is chat messages, and the model is learned without a chat "
            "template; add --chat-template, or give the prompt as text"
        )
    text = "\n\n".join(message["content"] for message in prompt)
    return Segment("prompt", tuple(renderer.encode_prompt(text, prompt)), text=text)


def _demonstrations(config: SFTConfig) -> Iterator[Demonstration]:
    """Yield the demonstrations of a function, or those of a file again and again."""
    if ":" in config.demonstrations and not Path(config.demonstrations).exists():
        make = _imported(config.demonstrations)
        try:
            made = make(count=config.count, seed=config.seed, **config.demonstration_args)
        except TypeError as error:
            message = f"{config.demonstrations}: {error}; see --demonstration-args"
            raise ConfigError(message) from error
        yield from made
        return
    path = Path(config.demonstrations)
    if not path.is_file():
        raise ConfigError(f"no demonstrations at {path}; give a JSON Lines file or MODULE:FUNCTION")
    while True:  # a short file is read again
        number = 0
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), b""), 1):
                yield _demonstration(line, f"{path}:{number}")
        if not number:
            raise ConfigError(f"{path} is empty; give at least one demonstration")


def _demonstration(line: bytes, where: str) -> Demonstration:
    """Read a line of a file of demonstrations."""
    try:
        parts = [(provenance, text) for provenance, text in json.loads(line)["segments"]]
        for provenance, text in parts:
            if provenance not in PROVENANCES:
                known = ", ".join(PROVENANCES)
                raise ValueError(f"unknown provenance {provenance!r:.80}; known: {known}")
            messages = text if provenance == "prompt" and isinstance(text, list) else []
            for each in [*(part for m in messages for part in (m["role"], m["content"]))] or [text]:
                each.encode()  # half a surrogate pair is no text
        if not any(provenance == "action" for provenance, _ in parts):
            raise ValueError("it has no action to learn")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f'{where}: not {{"segments": [[provenance, text], ...]}}'
        raise ConfigError(f"{message} ({error}); mend the line") from error
    return parts


def _imported(name: str) -> Callable[..., Any]:
    """Import ``"module:function"``."""
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}; is it on PYTHONPATH?") from error
    return found


def _open_model(config: SFTConfig) -> tuple[PreTrainedModel, Renderer]:
    """Open the model to start from, and its tokenizer.

    Raises:
        ConfigError: the model has a chat template, and the settings do not say whether to use it.
    """
    from research_agent.models.policy import load_model  # noqa: PLC0415
    from research_agent.renderer import open_renderer  # noqa: PLC0415

    assert config.model is not None
    renderer = open_renderer(config, config.model)
    if renderer.tokenizer.chat_template and not (config.chat_template or config.bare_text):
        raise ConfigError(
            f"{config.model} has a chat template: it was made for chat messages. Add "
            "--chat-template to learn from them, or --bare-text to learn from plain text"
        )
    return load_model(config.model), renderer


def _new_model(config: SFTConfig) -> tuple[PreTrainedModel, Renderer]:
    """Make a Llama of the configured sizes, with a tokenizer of the vocabulary's phrases."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from research_agent.phrase_tokenizer import phrase_tokenizer  # noqa: PLC0415
    from research_agent.renderer import Renderer  # noqa: PLC0415

    if config.vocabulary is None:
        raise ConfigError("a new model needs --vocabulary MODULE:FUNCTION, or start from a --model")
    tokenizer = phrase_tokenizer(_imported(config.vocabulary)())
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=max(1, config.heads // 2),
        max_position_embeddings=config.context,
        # A head that attends to the previous token, whichever it is, needs a bias for its query.
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(architecture), Renderer(tokenizer, frozenset({tokenizer.eos_token_id}))
