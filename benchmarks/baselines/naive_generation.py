"""Naive Generation: the model answers from memory. One call, no search.

The prompt is that of the ReSearch authors' evaluation: Agent-RL/ReCall, branch re-search,
``scripts/evaluation/run_eval.py``, method ``zero-shot``, a pipeline of FlashRAG (Jin et al. 2024,
RUC-NLPIR/FlashRAG, ``flashrag/pipeline/pipeline.py``, ``naive_run``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.baselines.driver import Message, Moves, generate

_SYSTEM = (
    "Answer the question based on your own knowledge. "
    "Only give me the answer and do not output any other words."
)


def prompt(question: str) -> Sequence[Message]:
    """The question, to be answered from the model's own knowledge."""
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": f"Question: {question}"},
    ]


def play(question: str, prompt: Callable[[str], Sequence[Message]] = prompt) -> Moves:
    """Ask for the answer; the whole reply is it."""
    return (yield from generate(prompt(question)))
