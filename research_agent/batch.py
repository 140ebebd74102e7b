"""Trajectories as tensors. Provenance says where each action token is.

Shapes: N trajectories, A action tokens in all. Nothing is masked by multiplication: a token that is
not an action token is never indexed, so it cannot reach a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from research_agent.errors import EnvironmentContractError, NonFiniteError
from research_agent.trajectory import Group, Trajectory


@dataclass(frozen=True, slots=True)
class Batch:
    """Trajectories and the values of their action tokens.

    In each [A] tensor the tokens of trajectory 0 come first, then those of trajectory 1, and so on.
    """

    tokens: tuple[Tensor, ...]  # N of [tokens of the trajectory], int64, any provenance
    lengths: Tensor  # [N] int64: action tokens per trajectory
    rewards: Tensor  # [N] float64
    groups: Tensor  # [N] int64: index of the trajectory's group
    seq_ids: Tensor  # [A] int64: index of the token's trajectory, ascending
    positions: Tensor  # [A] int64: position of the token in its trajectory
    targets: Tensor  # [A] int64: the token
    sampler_logprobs: Tensor  # [A] float32: as the engine reported them
    old_logprobs: Tensor  # [A]: denominator of ratios: the sampler's, or recomputed
    reference_logprobs: Tensor | None = None  # [A]
    advantages: Tensor | None = None  # [A]
    values: Tensor | None = None  # [A]: the critic's estimates
    returns: Tensor | None = None  # [A]: targets of the critic
    names: tuple[str, ...] = ()  # N, for error messages

    def __len__(self) -> int:
        """Return the number of trajectories."""
        return len(self.tokens)

    def action_tokens_of(self, chosen: Sequence[int]) -> Tensor:
        """Return indices [a] of the action tokens of some trajectories, in the order given."""
        starts = list(accumulate(self.lengths.tolist(), initial=0))
        ranges = [torch.arange(starts[i], starts[i + 1]) for i in chosen]
        index = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)
        return index.to(self.lengths.device)

    def select(self, chosen: Sequence[int]) -> Batch:
        """Make the batch of some of the trajectories, in the order given.

        Args:
            chosen: indices of trajectories, 0 .. N - 1.

        Returns:
            A batch whose trajectories are numbered from 0; their groups keep their numbers.
        """
        rows = torch.tensor(chosen, dtype=torch.long, device=self.lengths.device)
        index = self.action_tokens_of(chosen)

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return Batch(
            tokens=tuple(self.tokens[i] for i in chosen),
            lengths=self.lengths[rows],
            rewards=self.rewards[rows],
            groups=self.groups[rows],
            seq_ids=torch.arange(len(rows), device=rows.device).repeat_interleave(
                self.lengths[rows]
            ),
            positions=self.positions[index],
            targets=self.targets[index],
            sampler_logprobs=self.sampler_logprobs[index],
            old_logprobs=self.old_logprobs[index],
            reference_logprobs=take(self.reference_logprobs),
            advantages=take(self.advantages),
            values=take(self.values),
            returns=take(self.returns),
            names=tuple(self.names[i] for i in chosen),
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some trajectories of a batch, laid out for one forward pass: R rows, W columns.

    Either each row holds one trajectory, padded on the right: a causal model needs no mask, because
    no token that is used can see the padding. Or, packed, one row holds all of them end to end.
    """

    part: Batch  # these trajectories, with ``a`` action tokens
    token_index: Tensor  # [a] int64: their indices among the whole batch's A action tokens
    tokens: Tensor  # [R, W] int64
    logit_index: Tensor  # [a] int64: in tokens.flatten(), the token before each action token
    position_ids: Tensor | None = None  # [1, W] int64, packed: position in the trajectory
    cu_seqlens: Tensor | None = None  # [trajectories + 1] int32, packed: cumulative lengths
    max_seqlen: int = 0  # packed: tokens of the longest trajectory


def make_batch(groups: Sequence[Group], device: torch.device | str = "cpu") -> Batch:
    """Turn trajectories into tensors; void ones are left out.

    Args:
        groups: the samples of each task. A group is identified by its index here, not by its
            episode number.
        device: device of the tensors.

    Raises:
        EnvironmentContractError: a trajectory starts with an action token, which nothing predicts.
        NonFiniteError: a reward or a sampler's log-probability is not finite.
        ValueError: the log-probabilities of an action are missing, or not one per token.
    """
    kept = [
        (number, trajectory)
        for number, group in enumerate(groups)
        for trajectory in group.trajectories
        if not trajectory.void
    ]
    for _, trajectory in kept:
        _check(trajectory)
    trajectories = [trajectory for _, trajectory in kept]
    tokens = [torch.tensor(t.tokens, dtype=torch.long, device=device) for t in trajectories]
    masks = [torch.tensor(t.action_mask, dtype=torch.bool, device=device) for t in trajectories]
    positions = [mask.nonzero().flatten() for mask in masks]
    lengths = torch.tensor([len(row) for row in positions], dtype=torch.long, device=device)
    empty = [torch.empty(0, dtype=torch.long, device=device)]
    logprobs = torch.tensor(
        [value for t in trajectories for s in t.segments for value in s.logprobs or ()],
        dtype=torch.float32,
        device=device,
    )
    return Batch(
        tokens=tuple(tokens),
        lengths=lengths,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float64, device=device),
        groups=torch.tensor([number for number, _ in kept], dtype=torch.long, device=device),
        seq_ids=torch.arange(len(kept), device=device).repeat_interleave(lengths),
        positions=torch.cat(empty + positions),
        targets=torch.cat(empty + [row[mask] for row, mask in zip(tokens, masks, strict=True)]),
        sampler_logprobs=logprobs,
        old_logprobs=logprobs,
        names=tuple(map(_name, trajectories)),
    )


def micro_batches(batch: Batch, max_tokens: int, *, packed: bool = False) -> Iterator[MicroBatch]:
    """Split a batch into forward passes of bounded size.

    Args:
        batch: the batch; trajectories without an action token are left out.
        max_tokens: tokens per pass, padding included. A longer trajectory gets a pass of its own.
        packed: put trajectories end to end, without padding. Otherwise each is a row, and those of
            similar length share a pass.

    Yields:
        The passes, the largest first, so that memory runs out at the first pass or never.
    """
    # The model predicts the last action token and never reads it, so the pass ends before it.
    ends = list(accumulate(batch.lengths.tolist(), initial=0))
    positions = batch.positions.tolist()
    widths = {i: positions[end - 1] for i, (start, end) in enumerate(pairwise(ends)) if end > start}
    waiting = sorted(widths, key=lambda i: -widths[i])
    if packed:
        for chosen in _bins(waiting, widths, max_tokens):
            yield _packed(batch, chosen, [widths[i] for i in chosen])
        return
    while waiting:
        rows = max(1, max_tokens // widths[waiting[0]])
        chosen, waiting = waiting[:rows], waiting[rows:]
        yield _rows(batch, chosen, [widths[i] for i in chosen])


def _bins(waiting: Sequence[int], widths: Mapping[int, int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the optimal number of bins, plus 2/3."""
    bins: list[list[int]] = []
    free: list[int] = []
    for i in waiting:
        place = next((b for b, room in enumerate(free) if room >= widths[i]), len(bins))
        if place == len(bins):
            bins.append([])
            free.append(max_tokens)
        bins[place].append(i)
        free[place] -= widths[i]
    return [bins[b] for b in sorted(range(len(bins)), key=free.__getitem__)]


def _rows(batch: Batch, chosen: Sequence[int], widths: Sequence[int]) -> MicroBatch:
    part = batch.select(chosen)
    ragged = [row[:width] for row, width in zip(part.tokens, widths, strict=True)]
    return MicroBatch(
        part=part,
        token_index=batch.action_tokens_of(chosen),
        tokens=pad_sequence(ragged, batch_first=True),
        logit_index=part.seq_ids * widths[0] + part.positions - 1,
    )


def _packed(batch: Batch, chosen: Sequence[int], widths: Sequence[int]) -> MicroBatch:
    part = batch.select(chosen)
    device = part.lengths.device
    begins = list(accumulate(widths, initial=0))
    starts = torch.tensor(begins, device=device)
    return MicroBatch(
        part=part,
        token_index=batch.action_tokens_of(chosen),
        tokens=torch.cat([row[:w] for row, w in zip(part.tokens, widths, strict=True)])[None],
        logit_index=starts[part.seq_ids] + part.positions - 1,
        position_ids=torch.cat([torch.arange(width) for width in widths]).to(device)[None],
        cu_seqlens=starts.to(torch.int32),
        max_seqlen=max(widths),
    )


def _name(trajectory: Trajectory) -> str:
    return f"episode {trajectory.episode}, sample {trajectory.sample}"


def _check(trajectory: Trajectory) -> None:
    name = _name(trajectory)
    if not math.isfinite(trajectory.reward):
        message = f"{name}: the environment gave the reward {trajectory.reward}; it must be finite"
        raise NonFiniteError(message)
    tokens_before = 0
    for segment in trajectory.segments:
        if segment.provenance == "action" and segment.tokens:
            if tokens_before == 0:
                message = f"{name}: the prompt is empty; give the policy at least one token"
                raise EnvironmentContractError(message)
            given = None if segment.logprobs is None else len(segment.logprobs)
            if given != len(segment.tokens):
                message = (
                    f"{name}: an action of {len(segment.tokens)} tokens has {given}"
                    " log-probabilities; the engine must report one per token"
                )
                raise ValueError(message)
            if not all(map(math.isfinite, segment.logprobs or ())):
                message = f"{name}: the engine reported a log-probability that is not finite"
                raise NonFiniteError(message)
        elif segment.logprobs:
            message = f"{name}: a segment of provenance {segment.provenance} has log-probabilities"
            raise ValueError(message)
        tokens_before += len(segment.tokens)
