"""Iter-RetGen: what was answered helps to search, and what is found helps to answer.

Shao et al. 2023, "Enhancing Retrieval-Augmented Large Language Models with Iterative
Retrieval-Generation Synergy", arXiv:2305.15294. Prompt and steps are those of the ReSearch authors'
evaluation: Agent-RL/ReCall, branch re-search, ``scripts/evaluation/run_eval.py``, method
``iterretgen``, by FlashRAG's ``IterativePipeline`` (RUC-NLPIR/FlashRAG,
``flashrag/pipeline/active_pipeline.py``): three iterations, each a search for the question and the
last reply and a call that sees only what this search found; the last reply is the answer.
"""

from __future__ import annotations

from benchmarks.baselines.driver import Moves, generate, search
from benchmarks.baselines.naive_rag import Reading, prompt

ITERATIONS = 3


def play(question: str, prompt: Reading = prompt) -> Moves:
    """Search and answer three times, with the last answer in the next query."""
    query, answer = question, ""
    for _ in range(ITERATIONS):
        hits = yield from search(query)
        answer = yield from generate(prompt(question, hits))
        query = f"{question} {answer}"
    return answer
