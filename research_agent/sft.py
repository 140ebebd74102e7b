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
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from research_agent.config import as_json
from research_agent.config_changes import in_lines
from research_agent.config_checks import (
    require_chat_template,
    require_one_process,
    require_seed,
)
from research_agent.errors import CheckpointError, ConfigError, ContextError, NonFiniteError
from research_agent.formats import read_object
from research_agent.presets import offered
from research_agent.settings import Settings
from research_agent.system.files import LOCK, folder_lock, sha256
from research_agent.system.memory import trim_heap
from research_agent.system.signals import stop_signals

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from research_agent.batch import Batch
    from research_agent.checkpoint import Checkpoint
    from research_agent.renderer import Renderer
    from research_agent.trajectory import Trajectory


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
    lora_rank: int = 0
    """Rank of the LoRA adapters that learn beside frozen weights, in about half the time; 0 learns
    all weights. They want a --learning-rate some ten times as high, and are merged at the end."""
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
    """Number format of the matrix products, Muon's too. bfloat16 is twice as fast on a GPU, and on
    some CPUs that have instructions for it; the weights stay float32."""
    seed: int = 0
    """Seed of the demonstrations, the first weights, and the order within a few batches."""
    output: Path = Path("runs/sft")
    """Folder of the trained model."""
    threads: int | None = None
    """CPU threads; none takes what torch chooses. The last bits of the weights depend on them."""
    save_every: int = 100
    """Optimizer steps between checkpoints. A run that is stopped by Ctrl-C saves too."""
    quiet: bool = False
    """Show no progress."""


CHECKPOINTS = "checkpoints"  # folder in the output folder, until the model is written
FREE = frozenset({"output", "save_every", "quiet", "threads"})  # may change at a resume
SETTINGS = "sft.json"  # the settings of a finished model, beside it
_TEMPORARY = ".model.tmp"  # folder in the output folder, while the model is written

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

    Matrices whose name does not hold "embed" are trained by Muon (Jordan et al. 2024), the rest and
    adapters by AdamW. Until the model is written, the folder holds a checkpoint, from which the
    same call continues bit by bit. Once the model is written, the same call returns at once.

    Returns:
        The folder.

    Raises:
        CheckpointError: a checkpoint cannot be written or read, or the folder holds a checkpoint or
            a model of other settings or of a file of demonstrations that has changed.
        ConfigError: a setting that cannot be used, or demonstrations without actions.
        ContextError: a demonstration that is longer than the model's context.
        FolderInUseError: another process writes to the folder.
        KeyboardInterrupt: a signal asked to stop. What has been learned is saved.
        NonFiniteError: the loss is not finite.
    """
    import torch  # noqa: PLC0415 - slow to import, and not for --help

    from research_agent import checkpoint  # noqa: PLC0415

    _validate(config)
    settings = _saved_settings(config)
    torch.manual_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoints = config.output / CHECKPOINTS
    # The first lock keeps out train, the second one an sft of an earlier version.
    with folder_lock(config.output), folder_lock(checkpoints), stop_signals() as signals:
        try:
            if checkpoint.latest(checkpoints) is None and _is_finished(config.output, settings):
                if not config.quiet:
                    print(f"{config.output} is finished")
                return config.output
            return _fit(config, settings, signals)
        finally:
            if checkpoint.latest(checkpoints) is None:  # nothing to continue
                _clean_up(config.output)


def _saved_settings(config: SFTConfig) -> dict[str, Any]:
    """The settings as JSON values, with the SHA-256 of a file of demonstrations."""
    settings = as_json(config)
    path = Path(config.demonstrations)
    if path.is_file():  # another one was never there, or is a function
        settings["demonstrations_sha256"] = sha256(path)
    return settings


def _fit(config: SFTConfig, settings: Mapping[str, Any], signals: list[int]) -> Path:
    """Learn until the demonstrations are used up, or until ``signals`` holds one."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from research_agent import checkpoint  # noqa: PLC0415
    from research_agent.models.lora import adapters, merged  # noqa: PLC0415

    checkpoints = config.output / CHECKPOINTS
    saved = _unfinished(config.output, settings)
    renderer = _renderer(config, saved.state["date"] if saved else None)
    model = _model(config, renderer, saved)
    optimizers = _optimizers(model, config)
    begin, average = 0, 0.0  # steps made, and a moving average of their losses
    if saved:
        begin, average = saved.step, saved.state["loss"]
        with checkpoint.restoring(saved):
            for optimizer, state in zip(optimizers, saved.state["optimizers"], strict=True):
                optimizer.load_state_dict(state)

    def write(folder: Path) -> None:
        weights = dict(merged(model)) if config.lora_rank else None
        model.save_pretrained(folder, state_dict=weights)
        renderer.tokenizer.save_pretrained(folder)

    def save(step: int) -> None:
        state = {
            "optimizers": [each.state_dict() for each in optimizers],
            "adapters": adapters(model),
            "loss": average,
            "date": renderer.chat_template_date,
        }
        checkpoint.save(checkpoints, step, write_model=write, state=state, config=settings, keep=1)

    checkpoint.rehearse(checkpoints, write)
    steps = config.count // config.batch
    started, step = time.perf_counter(), begin - 1
    console = Console(stderr=True)
    with Progress(console=console, disable=config.quiet or not console.is_terminal) as progress:
        task = progress.add_task("sft", total=steps, completed=begin)
        for step, batch in enumerate(islice(_batches(config, renderer), begin, None), begin):
            if signals:
                save(step)
                raise KeyboardInterrupt
            loss = _learn(model, optimizers, batch, config, step)
            average = loss if step == 0 else 0.98 * average + 0.02 * loss
            if (step + 1) % config.save_every == 0 and step + 1 < steps:
                save(step + 1)
            progress.update(task, advance=1, description=f"sft  loss {average:.3f}")
            if not (config.quiet or console.is_terminal) and (step + 1) % max(1, steps // 20) == 0:
                seconds = time.perf_counter() - started
                console.print(f"step {step + 1}/{steps}  loss {average:.4f}  {seconds:.0f} s")
    if step < 0:
        message = f"{config.demonstrations} gives fewer demonstrations than --batch {config.batch}"
        raise ConfigError(message)
    _finish(config.output, settings, write)
    made = step + 1
    if made < steps:
        warnings.warn(
            f"{config.demonstrations} gives demonstrations for {made} of {steps} steps, so the "
            f"learning rate did not fall to its end; give --count {made * config.batch}",
            stacklevel=2,
        )
    if not config.quiet:
        seconds = time.perf_counter() - started
        print(f"{config.output}: loss {average:.4f} after {made} steps, {seconds:.0f} s")
    return config.output


def _batches(config: SFTConfig, renderer: Renderer) -> Iterator[list[Trajectory]]:
    from research_agent import demonstrations as shown  # noqa: PLC0415

    pairs = shown.demonstrations(
        config.demonstrations, config.count, config.seed, config.demonstration_args
    )
    trajectories = (shown.as_trajectory(each, renderer) for each in pairs)
    if config.batch_by_length:
        return shown.batches_by_length(trajectories, config.batch, config.seed)
    return shown.batches(trajectories, config.batch)


def _learn(
    model: PreTrainedModel,
    optimizers: list[Optimizer],
    batch: list[Trajectory],
    config: SFTConfig,
    step: int,
) -> float:
    """Make an optimizer step; returns the mean loss of the batch's action tokens, in nats."""
    from torch.nn.utils import clip_grad_norm_  # noqa: PLC0415

    from research_agent.batch import make_batch  # noqa: PLC0415
    from research_agent.trajectory import Group  # noqa: PLC0415

    limit: int = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    longest = max(len(trajectory.tokens) for trajectory in batch)
    if longest > limit:
        message = f"a demonstration of {longest} tokens does not fit the context of {limit}"
        raise ContextError(f"{message}; leave it out, or give a larger --context")
    groups = [Group(i, [trajectory]) for i, trajectory in enumerate(batch)]
    loss = _backward(model, make_batch(groups, model.device), config)
    if not math.isfinite(loss):
        raise NonFiniteError(f"sft: the loss of step {step} is {loss}")
    clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(config, step)
        optimizer.step()
        optimizer.zero_grad()
    trim_heap()
    return loss


def _unfinished(output: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """Read the checkpoint of a run that was stopped; None without one.

    Raises:
        CheckpointError: it is broken, or the run had settings that give another model.
    """
    from research_agent import checkpoint  # noqa: PLC0415

    newest = checkpoint.latest(output / CHECKPOINTS)
    if newest is None:
        return None
    saved = checkpoint.load(newest)
    if differing := _differing(saved.config, settings):
        raise CheckpointError(
            f"{output} holds an unfinished run with other settings:\n{in_lines(differing)}\n"
            "Give the same settings to continue it, another --output, or delete "
            f"{newest.parent} to start anew."
        )
    return saved


def _is_finished(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the output folder holds the model that these settings give.

    Raises:
        CheckpointError: it holds another model, which the run would replace.
    """
    if (output / _TEMPORARY).exists() or not any(output.glob("*.safetensors")):
        return False
    if not (output / SETTINGS).exists():
        raise CheckpointError(
            f"{output} holds a model without {SETTINGS}, so no sft of this version made it, and "
            "this run would replace it; give another --output"
        )
    saved = read_object(output / SETTINGS, CheckpointError, "give another --output")
    if differing := _differing(saved, settings):
        raise CheckpointError(
            f"{output} holds a finished model of other settings:\n{in_lines(differing)}\n"
            "Give another --output; this run would replace that model."
        )
    return True


def _differing(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that give another model, with their saved and present values."""
    return {
        name: (saved.get(name), value)
        for name, value in settings.items()
        if name not in FREE and saved.get(name) != value
    }


def _finish(folder: Path, settings: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write the model, and remove the checkpoint. The weights come last: with them all is there."""
    from research_agent import checkpoint  # noqa: PLC0415

    temporary = folder / _TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    kept = {name: value for name, value in settings.items() if name not in FREE}
    (temporary / SETTINGS).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for path in sorted(temporary.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        if path.is_dir():  # further chat templates; a folder can only replace an empty one
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    temporary.rmdir()
    while saved := checkpoint.latest(folder / CHECKPOINTS):
        checkpoint.remove(saved)


def _clean_up(folder: Path) -> None:
    """Remove locks and temporary checkpoints; other files in these folders are the user's."""
    checkpoints = folder / CHECKPOINTS
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # such as a folder that is not empty
        (folder / LOCK).unlink(missing_ok=True)
        (checkpoints / LOCK).unlink(missing_ok=True)
        checkpoints.rmdir()


def _optimizers(model: PreTrainedModel, config: SFTConfig) -> list[Optimizer]:
    import torch  # noqa: PLC0415

    from research_agent.models.lora import adapters  # noqa: PLC0415
    from research_agent.muon import Muon  # noqa: PLC0415

    rate = config.learning_rate

    def adamw(parameters: list[Tensor]) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)

    if config.lora_rank:
        return [adamw(list(adapters(model).values()))]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [Muon(matrices, rate, getattr(torch, config.precision)), adamw(others)]


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
    require_seed(config.seed)
    for name in (
        *("batch", "micro_batch_tokens", "hidden_size", "layers", "heads", "context"),
        "save_every",
    ):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(config, name)}; it must be at least 1")
    if config.lora_rank < 0 or (config.lora_rank and config.model is None):
        message = f"--lora-rank is {config.lora_rank}; give 0, or a rank beside a --model"
        raise ConfigError(message)
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
    if config.model is None and config.heads > 1 and config.heads % 2:
        raise ConfigError(f"--heads {config.heads} must be 1 or an even number")
    if config.model is None and config.hidden_size % (2 * config.heads):
        raise ConfigError(
            f"--hidden-size {config.hidden_size} must be a multiple of twice --heads {config.heads}"
        )
    _validate_schedule(config)


def _validate_schedule(config: SFTConfig) -> None:
    if not 0 < config.learning_rate < math.inf or not config.max_grad_norm > 0:
        raise ConfigError(
            f"--learning-rate {config.learning_rate} and --max-grad-norm {config.max_grad_norm} "
            "must be above 0"
        )
    if config.warmup_steps < 0:
        raise ConfigError(f"--warmup-steps is {config.warmup_steps}; it must not be negative")
    for name in ("decay_share", "final_share"):
        if not 0 <= getattr(config, name) <= 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(config, name)}; it is a share, from 0 to 1")


def _schedule(config: SFTConfig, step: int) -> float:
    """The factor of the learning rate at a step."""
    rising = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = step / (config.count // config.batch)
    left = min(1.0, (1 - done) / max(1e-9, config.decay_share))
    return rising * (config.final_share + (1 - config.final_share) * left)


def _renderer(config: SFTConfig, date: str | None) -> Renderer:
    """Open the tokenizer of the model to start from, or make one of the vocabulary's phrases.

    Args:
        config: the settings.
        date: the day that the chat template shows if the settings name none; None: today.

    Raises:
        ConfigError: the model has a chat template, and the settings do not say whether to use it.
    """
    from research_agent.demonstrations import imported  # noqa: PLC0415
    from research_agent.phrase_tokenizer import phrase_tokenizer  # noqa: PLC0415
    from research_agent.renderer import Renderer, open_renderer  # noqa: PLC0415

    if config.model is not None:
        renderer = open_renderer(config, config.model, date)
        if renderer.tokenizer.chat_template and not (config.chat_template or config.bare_text):
            raise ConfigError(
                f"{config.model} has a chat template: it was made for chat messages. Add "
                "--chat-template to learn from them, or --bare-text to learn from plain text"
            )
        return renderer
    if config.vocabulary is None:
        raise ConfigError("a new model needs --vocabulary MODULE:FUNCTION, or start from a --model")
    tokenizer = phrase_tokenizer(imported(config.vocabulary)())
    return Renderer(tokenizer, frozenset({tokenizer.eos_token_id}))


def _model(config: SFTConfig, renderer: Renderer, saved: Checkpoint | None) -> PreTrainedModel:
    """Open the checkpoint's model or the one to start from, or make a Llama of the given sizes.

    Adapters are added to the model to start from, as a checkpoint's model has them merged.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from research_agent import checkpoint  # noqa: PLC0415
    from research_agent.models.lora import adapters, add_adapters  # noqa: PLC0415
    from research_agent.models.policy import find_device, load_model  # noqa: PLC0415
    from research_agent.sharded import copy_or_read  # noqa: PLC0415

    source = saved.folder if saved and not config.lora_rank else config.model
    if source is not None:
        model: PreTrainedModel = load_model(source)
        if config.lora_rank:
            add_adapters(model, config.lora_rank)
        if saved:
            with checkpoint.restoring(saved):
                copy_or_read(adapters(model), saved.state["adapters"], lambda _: None)
        return model
    tokenizer = renderer.tokenizer
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
    return LlamaForCausalLM(architecture).to(find_device("auto"))
