"""Demonstrations: read from a file or a function, tokenized, and put into batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from research_agent.errors import ConfigError
from research_agent.formats import LONGEST_LINE
from research_agent.renderer import Renderer
from research_agent.trajectory import Segment, Trajectory

Demonstration = list[tuple[str, Any]]  # (provenance, text, or messages of a prompt)
PROVENANCES = ("prompt", "action", "observation")

BATCHES_SORTED_TOGETHER = 16  # where batches are made by length


def demonstrations(
    source: str, count: int, seed: int, arguments: Mapping[str, Any]
) -> Iterator[Demonstration]:
    """Yield the demonstrations of a function, or those of a file again and again.

    Args:
        source: a JSON Lines file, or ``"module:function"``.
        count: how many to yield.
        seed: seed for a function.
        arguments: further arguments of the function.

    Raises:
        ConfigError: there is no such file or function, or a line of the file is bad.
    """
    return islice(_endless(source, count, seed, arguments), count)


def _endless(
    source: str, count: int, seed: int, arguments: Mapping[str, Any]
) -> Iterator[Demonstration]:
    if ":" in source and not Path(source).exists():
        make = imported(source)
        try:
            made = make(count=count, seed=seed, **arguments)
        except TypeError as error:
            raise ConfigError(f"{source}: {error}; see --demonstration-args") from error
        yield from made
        return
    path = Path(source)
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


def as_trajectory(demonstration: Iterable[tuple[str, Any]], renderer: Renderer) -> Trajectory:
    """Tokenize a demonstration as a rollout would: every part on its own.

    Args:
        demonstration: (provenance, text) pairs; a prompt may be a list of chat messages.
        renderer: the model's renderer.

    Raises:
        ConfigError: a provenance that does not exist, no action, or messages for a renderer that
            has no chat template.
    """
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
    if isinstance(prompt, str):
        return Segment("prompt", tuple(renderer.encode_prompt(prompt)), text=prompt)
    if not renderer.chat_template:
        raise ConfigError(
            "a demonstration's prompt is chat messages, and the model is learned without a chat "
            "template; add --chat-template, or give the prompt as text"
        )
    text = "\n\n".join(message["content"] for message in prompt)
    return Segment("prompt", tuple(renderer.encode_prompt(text, prompt)), text=text)


def batches(trajectories: Iterator[Trajectory], size: int) -> Iterator[list[Trajectory]]:
    """Yield batches in the order of the demonstrations. What fills no batch is left out."""
    while len(batch := list(islice(trajectories, size))) == size:
        yield batch


def batches_by_length(
    trajectories: Iterator[Trajectory], size: int, seed: int
) -> Iterator[list[Trajectory]]:
    """Yield batches of demonstrations of similar length, in random order within a few batches.

    Args:
        trajectories: demonstrations in their order.
        size: demonstrations per batch. What fills no batch is left out.
        seed: seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    while chunk := list(islice(trajectories, size * BATCHES_SORTED_TOGETHER)):
        chunk.sort(key=lambda trajectory: len(trajectory.tokens))
        starts = range(0, len(chunk) - size + 1, size)
        for i in torch.randperm(len(starts), generator=generator).tolist():
            yield chunk[starts[i] : starts[i] + size]


def imported(name: str) -> Callable[..., Any]:
    """Import ``"module:function"``.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}; is it on PYTHONPATH?") from error
    return found
