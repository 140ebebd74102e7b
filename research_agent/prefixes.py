"""Sequence trees: sequences that begin alike are laid out with one copy of their beginning.

A causal model computes the same for equal beginnings, so a pass over the tree gives every sequence
what a pass over it alone would give. Each sequence adds one run to the row: its tokens after the
beginning that it shares with the sequence before it. Sequences are sorted, so that neighbors share
as much as possible. A run attends to its path: the places in the row of the shared beginning, and
the run itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """The places of a row's tokens, and what each run of tokens attends to.

    Shapes: W tokens in the row, S runs that have a token, K places in all their paths together.
    """

    tokens: Tensor  # [W] int64
    position_ids: Tensor  # [W] int64: tokens before it in its sequence
    paths: tuple[Tensor, ...]  # per sequence [its tokens] int64: their places in the row
    cu_seqlens: Tensor  # [S + 1] int32: cumulative lengths of the runs
    max_seqlen: int  # tokens of the longest run
    key_index: Tensor  # [K] int64: the paths that runs attend to, end to end
    cu_keys: Tensor  # [S + 1] int32: cumulative lengths of these paths
    max_keys: int  # tokens of the longest path


def lay_out(sequences: Sequence[Tensor], shared: Sequence[int]) -> TreeLayout:
    """Lay sequences out as trees.

    Args:
        sequences: the tokens of each, int64; those that share stand next to each other.
        shared: how many tokens each sequence takes over from the one before it.
    """
    device = sequences[0].device
    paths: list[Tensor] = []
    runs, keys, width = [], [], 0
    for tokens, taken in zip(sequences, shared, strict=True):
        own = torch.arange(width, width + len(tokens) - taken, device=device)
        paths.append(torch.cat([paths[-1][:taken], own]) if taken else own)
        width += len(own)
        if len(own):
            runs.append(len(own))
            keys.append(paths[-1])

    def cumulative(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    own_tokens = [tokens[taken:] for tokens, taken in zip(sequences, shared, strict=True)]
    depths = [torch.arange(taken, len(t)) for t, taken in zip(sequences, shared, strict=True)]
    return TreeLayout(
        tokens=torch.cat(own_tokens),
        position_ids=torch.cat(depths).to(device),
        paths=tuple(paths),
        cu_seqlens=cumulative(runs),
        max_seqlen=max(runs),
        key_index=torch.cat(keys),
        cu_keys=cumulative([len(path) for path in keys]),
        max_keys=max(map(len, keys)),
    )


def shared_lengths(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Count the tokens that each sequence has in common with the beginning of the one before it."""
    shared = [0] if sequences else []
    for before, after in pairwise(sequences):
        pairs = enumerate(zip(before, after, strict=False))
        fewer = min(len(before), len(after))
        shared.append(next((place for place, (a, b) in pairs if a != b), fewer))
    return shared


def bundle(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[list[int], int]]:
    """Cut sorted sequences into bundles whose trees have a bounded number of tokens.

    Args:
        sequences: sorted.
        max_tokens: the most tokens of a tree. A longer sequence gets a bundle of its own.

    Returns:
        The indices of the sequences of each bundle, in order, and the tokens of its tree.
    """
    bundles: list[tuple[list[int], int]] = []
    for i, (tokens, taken) in enumerate(zip(sequences, shared_lengths(sequences), strict=True)):
        added = len(tokens) - taken
        if bundles and bundles[-1][1] + added <= max_tokens:
            members, size = bundles.pop()
            bundles.append(([*members, i], size + added))
        else:
            bundles.append(([i], len(tokens)))
    return bundles
