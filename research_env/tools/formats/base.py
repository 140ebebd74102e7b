"""The type of a text format of tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from research_env.tools.base import Tool, ToolTurn
from research_env.tools.calls import CallRecord, WrittenCall


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls and reads results.

    Frames and prompts are, to the letter, what the family's chat template makes of the messages.

    Attributes:
        name: the value of ``tool_format=``.
        reader: reads the calls in the text of a turn, by the tools' schemas. A turn without calls
            is the answer.
        writer: writes a structured turn as this family's text.
        framer: writes the observation: the results of a turn's calls, and the opening of the next
            turn.
        terminators: generation pauses after the first of these.
        markup: the chat tokens in frames; no result holds any of them.
        prompter: writes the prompt, with ``{question}`` in it, for a system message and tools;
            None: this format has no prompt ``base``.
        answerer: returns the part of a turn without calls in which the final answer stands.
        lists_tools: whether ``info["tools"]`` lists the tools for the chat template; False: the
            prompt's own text lists them.
    """

    name: str
    reader: Callable[[str, Sequence[Tool]], Sequence[WrittenCall]]
    writer: Callable[[ToolTurn], str]
    framer: Callable[[Sequence[CallRecord]], str]
    terminators: tuple[str, ...]
    markup: tuple[str, ...]
    prompter: Callable[[str, Sequence[Tool]], str] | None = None
    answerer: Callable[[str], str] = str
    lists_tools: bool = True


def spans(text: str, opening: str, closing: str) -> Iterator[tuple[str, bool]]:
    """The texts between marks, in order, each with whether its closing mark is there."""
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        yield (text[start:end], True) if end >= 0 else (text[start:], False)
        start = text.find(opening, end) if end >= 0 else -1
