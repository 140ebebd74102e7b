"""The tables of the papers, in percent, to stand beside ours.

Chen et al. 2025, "ReSearch: Learning to Reason with Search for LLMs via Reinforcement Learning",
arXiv:2503.19470, table 2. The baselines are those of this folder.
"""

from __future__ import annotations

DATASETS = {
    "hotpotqa": "HotpotQA",
    "2wiki": "2Wiki",
    "musique": "MuSiQue",
    "bamboogle": "Bamboogle",
}
"""Names of data sets as an environment takes them, and as the tables print them."""

Score = tuple[float, float]
"""Exact match, and the share that the LLM judge calls right."""

# In the order of DATASETS.
_RESEARCH: dict[str, dict[str, tuple[Score, Score, Score, Score]]] = {
    "7b": {
        "Naive Generation": ((19.18, 30.64), (25.76, 27.87), (3.76, 10.38), (10.40, 22.40)),
        "Naive RAG": ((31.90, 49.59), (25.78, 29.52), (6.21, 12.78), (20.80, 32.00)),
        "Iter-RetGen": ((34.36, 52.22), (27.92, 31.86), (8.69, 16.14), (21.60, 35.20)),
        "IRCoT": ((30.33, 52.06), (21.57, 30.65), (6.99, 14.19), (24.80, 36.80)),
        "ReSearch-Qwen-7B": ((40.57, 60.26), (44.67, 50.06), (21.68, 32.19), (43.20, 54.40)),
        "ReSearch-Qwen-7B-Instruct": (
            (43.52, 63.62), (47.59, 54.22), (22.30, 33.43), (42.40, 54.40)
        ),
    },
    "32b": {
        "Naive Generation": ((24.63, 38.26), (27.23, 29.68), (6.12, 14.23), (18.40, 29.60)),
        "Naive RAG": ((36.46, 55.73), (30.38, 34.87), (9.27, 15.97), (23.20, 40.80)),
        "Iter-RetGen": ((39.81, 58.80), (33.64, 38.22), (12.49, 20.11), (29.60, 44.80)),
        "IRCoT": ((28.44, 55.44), (13.53, 29.50), (7.82, 18.20), (31.20, 47.20)),
        "ReSearch-Qwen-32B": ((42.77, 64.27), (38.52, 45.59), (26.40, 37.57), (54.40, 66.40)),
        "ReSearch-Qwen-32B-Instruct": (
            (46.73, 67.70), (44.90, 50.30), (26.40, 38.56), (56.80, 67.20)
        ),
    },
}  # fmt: skip


def published(size: str, row: str, dataset: str) -> Score | None:
    """What the paper's table says; None where it says nothing.

    Args:
        size: "7b" or "32b", of Qwen2.5.
        row: label of a method, or name of a trained model.
        dataset: a key of ``DATASETS``.
    """
    scores = _RESEARCH[size].get(row)
    if scores is None or dataset not in DATASETS:
        return None
    return scores[list(DATASETS).index(dataset)]
