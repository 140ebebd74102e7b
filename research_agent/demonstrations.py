"""Demonstrations: read from a file or a function, tokenized, and put into batches.

A demonstration is a list of (provenance, content) pairs. The content is a text; for a prompt also a
list of chat messages. It is an object where a rollout renders more than that, as ``sample`` writes
it: ``{"messages": ..., "tools": ...}`` is a prompt that lists tools. ``{"text": ...,
"chat_markup": ..., "end": ...}`` is an observation or action with the strings in it that are chat
tokens, and for an action the text of the token that ended it, "" if none did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from research_agent.errors import ConfigError
from research_agent.formats import LONGEST_LINE, ContentFormat, require
from research_agent.renderer import Renderer
from research_agent.system.imports import import_setting
from research_agent.trajectory import Segment, Trajectory

Demonstration = list[tuple[str, Any]]  # (provenance, content)
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
        parts = [(provenance, content) for provenance, content in json.loads(line)["segments"]]
        for provenance, content in parts:
            if provenance not in PROVENANCES:
                known = ", ".join(PROVENANCES)
                raise ValueError(f"unknown provenance {provenance!r:.80}; known: {known}")
            text = content
            if isinstance(content, dict):
                require(content, ContentFormat)
                json.dumps(content, ensure_ascii=False).encode()
                text = content["messages" if provenance == "prompt" else "text"]
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
        demonstration: (provenance, content) pairs.
        renderer: the model's renderer.

    Raises:
        ConfigError: a provenance that does not exist, no action with a token, or messages for a
            renderer that has no chat template.
        ModelError: chat tokens that the tokenizer does not have, or tools that its chat template
            does not show.
    """
    parts = list(demonstration)
    segments: list[Segment] = []
    for i, (provenance, content) in enumerate(parts):
        given = content if isinstance(content, Mapping) else {"text": content}
        if provenance == "prompt":
            segments.append(_prompt(content, renderer))
        elif provenance == "observation":
            tokens = renderer.encode_with_markup(given["text"], given.get("chat_markup", ()))
            segments.append(Segment("observation", tuple(tokens), text=given["text"]))
        elif provenance == "action":
            # A policy writes chat tokens too, such as those between channels.
            tokens = renderer.encode_with_markup(given["text"], given.get("chat_markup", ()))
            if given.get("end", i == len(parts) - 1):
                tokens.append(_end_token(given.get("end"), renderer))
            logprobs = (0.0,) * len(tokens)
            segments.append(Segment("action", tuple(tokens), logprobs, text=given["text"]))
        else:
            known = ", ".join(PROVENANCES)
            raise ConfigError(f"unknown provenance {provenance!r}; known: {known}")
    if not any(each.provenance == "action" and each.tokens for each in segments):
        raise ConfigError(f"a demonstration has no action to learn: {parts!r:.200}")
    return Trajectory(0, 0, tuple(segments), reward=0.0, terminated=True, truncated=False)


def _end_token(text: str | None, renderer: Renderer) -> int:
    """The end token with this text; the model's first one if it has none such."""
    for token in renderer.end_ids:
        if renderer.decode([token]) == text:
            return token
    end: int | None = renderer.tokenizer.eos_token_id
    return min(renderer.end_ids) if end is None else end


def _prompt(content: Any, renderer: Renderer) -> Segment:
    """The segment of a prompt: a text, a list of chat messages, or messages and tools."""
    if isinstance(content, str):
        return Segment("prompt", tuple(renderer.encode_prompt(content)), text=content)
    if not renderer.chat_template:
        raise ConfigError(
            "a demonstration's prompt is chat messages, and the model is learned without a chat "
            "template; add --chat-template, or give the prompt as text"
        )
    given = content if isinstance(content, Mapping) else {"messages": content}
    text = "\n\n".join(message["content"] for message in given["messages"])
    tokens = renderer.encode_prompt(text, given["messages"], given.get("tools", ()))
    return Segment("prompt", tuple(tokens), text=text)


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
        found: Callable[..., Any] = getattr(import_setting(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}; is it on PYTHONPATH?") from error
    return found
