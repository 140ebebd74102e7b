"""Naive RAG: one search for the question, one answer from what it finds.

Prompt and steps are those of the ReSearch authors' evaluation: Agent-RL/ReCall, branch re-search,
``scripts/evaluation/run_eval.py``, method ``naive``, with the default prompt of FlashRAG (Jin et
al. 2024, RUC-NLPIR/FlashRAG, ``flashrag/prompt/base_prompt.py``) and its five passages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.baselines.driver import Message, Moves, generate, search
from research_env.retrieval.base import Hit

Reading = Callable[[str, Sequence[Hit]], Sequence[Message]]

_SYSTEM = (  # no space between the first two sentences: so it is in FlashRAG
    "Answer the question based on the given document."
    "Only give me the answer and do not output any other words."
    "\nThe following are given documents.\n\n"
)


def prompt(question: str, hits: Sequence[Hit]) -> Sequence[Message]:
    """The passages, best first, and the question.

    Titles stand in quotes, as in the corpus that the authors search (FlashRAG's Wikipedia).
    """
    documents = "".join(
        f'Doc {number}(Title: "{hit.passage.title}") {hit.passage.text}\n'
        for number, hit in enumerate(hits, 1)
    )
    return [
        {"role": "system", "content": _SYSTEM + documents},
        {"role": "user", "content": f"Question: {question}"},
    ]


def play(question: str, prompt: Reading = prompt) -> Moves:
    """Search for the question, and ask for the answer; the whole reply is it."""
    hits = yield from search(question)
    return (yield from generate(prompt(question, hits)))
