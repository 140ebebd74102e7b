"""Trajectories as tensors, and their layout in forward passes.

``make_batch`` turns trajectories into a ``Batch``; ``micro_batches`` cuts it into passes.

Shapes: N trajectories, T turns and A action tokens in all. A turn is one action; it may have no
token. Nothing is masked by multiplication: a token that is not an action token is never indexed, so
it cannot reach a loss.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from research_agent import prefixes
from research_agent.errors import EnvironmentContractError, NonFiniteError
from research_agent.trajectory import Group, Trajectory

Packing = Literal["off", "on", "tree"]
"""How trajectories share rows: not at all, end to end, or with one copy of equal beginnings."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Trajectories and the values of their action tokens.

    In each [A] tensor the tokens of trajectory 0 come first, then those of trajectory 1, and so on;
    so do the turns in each [T] tensor.

    Trajectories of a tree are written out in full: a turn that two of them share is two turns
    here, and ``turn_nodes`` says that they are one.
    """

    tokens: tuple[Tensor, ...]  # N of [tokens of the trajectory], int64, any provenance
    lengths: Tensor  # [N] int64: action tokens per trajectory
    rewards: Tensor  # [N] float64: the sum of the turns' rewards
    groups: Tensor  # [N] int64: index of the trajectory's group
    trees: Tensor  # [N] int64: index of the trajectory's tree; without branches each is its own
    seq_ids: Tensor  # [A] int64: index of the token's trajectory, ascending
    positions: Tensor  # [A] int64: position of the token in its trajectory
    targets: Tensor  # [A] int64: the token
    sampler_logprobs: Tensor  # [A] float32: as the engine reported them
    old_logprobs: Tensor  # [A]: denominator of ratios: the sampler's, or recomputed
    turn_ids: Tensor  # [A] int64: index of the token's turn, ascending
    turn_seq_ids: Tensor  # [T] int64: index of the turn's trajectory, ascending
    turn_rewards: Tensor  # [T] float64
    turn_nodes: Tensor  # [T] int64: first turn that is the same one; itself unless it was shared
    state_keys: tuple[str, ...]  # T: names of the states that turns were taken in; "": no name
    reference_logprobs: Tensor | None = None  # [A]
    advantages: Tensor | None = None  # [A]
    values: Tensor | None = None  # [A]: the critic's estimates
    returns: Tensor | None = None  # [A]: targets of the critic
    names: tuple[str, ...] = ()  # N, for error messages

    def __len__(self) -> int:
        """Return the number of trajectories."""
        return len(self.tokens)

    def action_tokens_in(self, chosen: Sequence[int]) -> Tensor:
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
            A batch whose trajectories and turns are numbered from 0; groups and trees keep their
            numbers. Turns that are the same one remain so.
        """
        rows = torch.tensor(chosen, dtype=torch.long, device=self.lengths.device)
        index = self.action_tokens_in(chosen)
        counts = self.turn_seq_ids.bincount(minlength=len(self))
        starts = list(accumulate(counts.tolist(), initial=0))
        turns = [turn for i in chosen for turn in range(starts[i], starts[i + 1])]
        rows_of_turns = torch.tensor(turns, dtype=torch.long, device=rows.device)
        lengths_of_turns = self.turn_ids.bincount(minlength=starts[-1])[rows_of_turns]
        nodes = self.turn_nodes[rows_of_turns].tolist()

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return Batch(
            tokens=tuple(self.tokens[i] for i in chosen),
            lengths=self.lengths[rows],
            rewards=self.rewards[rows],
            groups=self.groups[rows],
            trees=self.trees[rows],
            seq_ids=_numbered(self.lengths[rows]),
            positions=self.positions[index],
            targets=self.targets[index],
            sampler_logprobs=self.sampler_logprobs[index],
            old_logprobs=self.old_logprobs[index],
            turn_ids=_numbered(lengths_of_turns),
            turn_seq_ids=_numbered(counts[rows]),
            turn_rewards=self.turn_rewards[rows_of_turns],
            turn_nodes=torch.tensor(_first_places(nodes), dtype=torch.long, device=rows.device),
            state_keys=tuple(self.state_keys[turn] for turn in turns),
            reference_logprobs=take(self.reference_logprobs),
            advantages=take(self.advantages),
            values=take(self.values),
            returns=take(self.returns),
            names=tuple(self.names[i] for i in chosen),
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some trajectories of a batch, laid out for one forward pass: R rows, W columns.

    There are three layouts, one for each ``Packing``:

    - "off": each row holds one trajectory, padded on the right. A causal model needs no mask,
      because no token that is used can see the padding.
    - "on": one row holds all of them end to end.
    - "tree": one row holds them as trees, with one copy of each shared beginning (``prefixes``).
      Then ``cu_seqlens`` bounds the runs of the trees, and several action tokens can be the same.
    """

    part: Batch  # these trajectories, with ``a`` action tokens
    token_index: Tensor  # [a] int64: their indices among the whole batch's A action tokens
    tokens: Tensor  # [R, W] int64
    logit_index: Tensor  # [a] int64: in tokens.flatten(), the token before each action token
    position_ids: Tensor | None = None  # [1, W] int64, packed: position in the trajectory
    cu_seqlens: Tensor | None = None  # [n + 1] int32, packed: cumulative lengths of n trajectories
    max_seqlen: int = 0  # packed: tokens of the longest of them; with "tree" of n runs instead
    tree: prefixes.TreeLayout | None = None  # "tree": what each run attends to
    distinct: Tensor | None = None  # [u] int64, "tree": one of each set of equal action tokens
    distinct_of: Tensor | None = None  # [a] int64, "tree": index in ``distinct`` of its set


def make_batch(groups: Sequence[Group], device: torch.device | str = "cpu") -> Batch:
    """Turn trajectories into tensors; void ones are left out.

    Args:
        groups: the samples of each task. A group's number in the batch is its index here.
        device: device of the tensors.

    Raises:
        EnvironmentContractError: a trajectory starts with an action token, which nothing predicts.
        NonFiniteError: a reward or a sampler's log-probability is not finite.
        ValueError: the log-probabilities of an action are missing, or not one per token; or the
            rewards of the turns do not sum to the trajectory's.
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
    turns = [turn for t in trajectories for turn in t.turns]
    rows = {(number, t.sample): i for i, (number, t) in reversed(list(enumerate(kept)))}

    def owner(number: int, sample: int) -> Hashable:
        """Index of a sample's trajectory; the sample itself if it is void, and so left out."""
        return rows.get((number, sample), (number, sample))

    # A turn is named by the trajectory that it was sampled in and its place there.
    nodes = [
        (owner(number, t.lineage[place]) if place < len(t.lineage) else i, place)
        for i, (number, t) in enumerate(kept)
        for place in range(len(t.turns))
    ]
    trees = [i if t.tree is None else owner(number, t.tree) for i, (number, t) in enumerate(kept)]

    def int64(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Batch(
        tokens=tuple(tokens),
        lengths=lengths,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float64, device=device),
        groups=int64([number for number, _ in kept]),
        trees=int64(_first_places(trees)),
        seq_ids=_numbered(lengths),
        positions=torch.cat(empty + positions),
        targets=torch.cat(empty + [row[mask] for row, mask in zip(tokens, masks, strict=True)]),
        sampler_logprobs=logprobs,
        old_logprobs=logprobs,
        turn_ids=_numbered(int64([len(turn.tokens) for turn in turns])),
        turn_seq_ids=_numbered(int64([len(t.turns) for t in trajectories])),
        turn_rewards=torch.tensor([t.reward for t in turns], dtype=torch.float64, device=device),
        turn_nodes=int64(_first_places(nodes)),
        state_keys=tuple(turn.state_key for turn in turns),
        names=tuple(map(_name, trajectories)),
    )


def micro_batches(
    batch: Batch, max_tokens: int, *, packing: Packing = "off", ranks: int = 1
) -> Iterator[MicroBatch]:
    """Split a batch into forward passes of bounded size.

    Args:
        batch: the batch; trajectories without an action token are left out.
        max_tokens: tokens per pass, padding included. A longer trajectory gets a pass of its own.
        packing: the layout; see ``MicroBatch``. With "off" trajectories of similar length share a
            pass; with "tree" those of a group share equal beginnings.
        ranks: processes that share the passes. With several, packed passes are of equal size and
            as many for each rank; a pass of rows has at most a rank's share of the tokens.

    Yields:
        The passes, the largest first, so that memory runs out at the first pass or never.
    """
    # The model predicts the last action token and never reads it, so the pass ends before it.
    ends = list(accumulate(batch.lengths.tolist(), initial=0))
    positions = batch.positions.tolist()
    widths = {i: positions[end - 1] for i, (start, end) in enumerate(pairwise(ends)) if end > start}
    waiting = sorted(widths, key=lambda i: -widths[i])
    if packing == "tree":
        yield from _trees(batch, widths, max_tokens, ranks)
        return
    if packing == "on":
        for chosen in _bins(waiting, widths, max_tokens, ranks):
            yield _packed(batch, chosen, [widths[i] for i in chosen])
        return
    if ranks > 1:
        max_tokens = min(max_tokens, math.ceil(sum(widths.values()) / ranks))
    while waiting:
        rows = max(1, max_tokens // widths[waiting[0]])
        chosen, waiting = waiting[:rows], waiting[rows:]
        yield _rows(batch, chosen, [widths[i] for i in chosen])


def _bins(
    waiting: Sequence[int], widths: Mapping[int, int], max_tokens: int, ranks: int
) -> list[list[int]]:
    """Put trajectories into bins; returns the bins, the fullest first.

    For one rank there are few bins. For several ranks there are as many bins for each, of about
    equal size.

    Args:
        waiting: trajectories, by falling width.
        widths: tokens of each.
        max_tokens: the most tokens in a bin of several trajectories.
        ranks: number of processes that share the bins.
    """
    if ranks == 1:
        bins = _first_fit(waiting, widths, max_tokens)
    else:
        rounds = max(1, math.ceil(sum(widths.values()) / (ranks * max_tokens)))
        bins = _equal(waiting, widths, rounds * ranks)
        while any(len(b) > 1 and sum(widths[i] for i in b) > max_tokens for b in bins):
            rounds += 1
            bins = _equal(waiting, widths, rounds * ranks)
    return sorted(filter(None, bins), key=lambda b: -sum(widths[i] for i in b))


def _first_fit(
    waiting: Sequence[int], widths: Mapping[int, int], max_tokens: int
) -> list[list[int]]:
    """Put each into the first bin with room: at most 11/9 of the optimal number of bins, + 2/3."""
    bins: list[list[int]] = []
    free: list[int] = []
    for i in waiting:
        place = next((b for b, room in enumerate(free) if room >= widths[i]), len(bins))
        if place == len(bins):
            bins.append([])
            free.append(max_tokens)
        bins[place].append(i)
        free[place] -= widths[i]
    return bins


def _equal(waiting: Sequence[int], widths: Mapping[int, int], count: int) -> list[list[int]]:
    """Put each into the emptiest bin, longest first: the fullest is at most 4/3 of the optimum.

    References:
        Graham (1969), "Bounds on multiprocessing timing anomalies".
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, place) for place in range(count)]  # the tokens of each bin
    for i in waiting:
        held, place = heap[0]
        bins[place].append(i)
        heapreplace(heap, (held + widths[i], place))
    return bins


def _rows(batch: Batch, chosen: Sequence[int], widths: Sequence[int]) -> MicroBatch:
    part = batch.select(chosen)
    ragged = [row[:width] for row, width in zip(part.tokens, widths, strict=True)]
    return MicroBatch(
        part=part,
        token_index=batch.action_tokens_in(chosen),
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
        token_index=batch.action_tokens_in(chosen),
        tokens=torch.cat([row[:w] for row, w in zip(part.tokens, widths, strict=True)])[None],
        logit_index=starts[part.seq_ids] + part.positions - 1,
        position_ids=torch.cat([torch.arange(width) for width in widths]).to(device)[None],
        cu_seqlens=starts.to(torch.int32),
        max_seqlen=max(widths),
    )


def _trees(
    batch: Batch, widths: Mapping[int, int], max_tokens: int, ranks: int
) -> Iterator[MicroBatch]:
    """Yield the passes of the "tree" packing; widths are the tokens read of each trajectory."""
    members: dict[int, list[int]] = defaultdict(list)
    groups = batch.groups.tolist()
    for i in widths:
        members[groups[i]].append(i)
    bundles: list[tuple[list[int], int]] = []
    for group in members.values():
        rows = {i: batch.tokens[i][: widths[i]].tolist() for i in group}
        order = sorted(group, key=rows.__getitem__)
        for chosen, size in prefixes.bundle([rows[i] for i in order], max_tokens):
            bundles.append(([order[place] for place in chosen], size))
    sizes = {number: size for number, (_, size) in enumerate(bundles)}
    waiting = sorted(sizes, key=lambda number: -sizes[number])
    for numbers in _bins(waiting, sizes, max_tokens, ranks):
        yield _tree(batch, [bundles[number][0] for number in numbers], widths)


def _tree(batch: Batch, bundles: Sequence[Sequence[int]], widths: Mapping[int, int]) -> MicroBatch:
    chosen = [i for bundle in bundles for i in bundle]
    rows = [batch.tokens[i][: widths[i]] for i in chosen]
    shared: list[int] = []
    for bundle in bundles:
        shared += prefixes.shared_lengths([r.tolist() for r in rows[len(shared) :][: len(bundle)]])
    tree = prefixes.lay_out(rows, shared)
    part = batch.select(chosen)
    starts = torch.tensor(list(accumulate(map(len, rows), initial=0)), device=part.lengths.device)
    logit_index = torch.cat(tree.paths)[starts[part.seq_ids] + part.positions - 1]
    pairs = torch.stack([logit_index, part.targets])
    _, distinct_of = torch.unique(pairs, dim=1, return_inverse=True)
    places = torch.arange(len(distinct_of), device=distinct_of.device)
    count = int(distinct_of.max()) + 1
    return MicroBatch(
        part=part,
        token_index=batch.action_tokens_in(chosen),
        tokens=tree.tokens[None],
        logit_index=logit_index,
        position_ids=tree.position_ids[None],
        cu_seqlens=tree.cu_seqlens,
        max_seqlen=tree.max_seqlen,
        tree=tree,
        distinct=places.new_zeros(count).scatter_reduce(
            0, distinct_of, places, "amin", include_self=False
        ),
        distinct_of=distinct_of,
    )


def _numbered(counts: Tensor) -> Tensor:
    """Repeat each index as often as its count says."""
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def _first_places(keys: Sequence[Hashable]) -> list[int]:
    """Find for each key the place where it first occurs."""
    places: dict[Hashable, int] = {}
    return [places.setdefault(key, place) for place, key in enumerate(keys)]


def _name(trajectory: Trajectory) -> str:
    return f"episode {trajectory.episode}, sample {trajectory.sample}"


def _check(trajectory: Trajectory) -> None:
    name = _name(trajectory)
    if not math.isfinite(trajectory.reward):
        message = f"{name}: the environment gave the reward {trajectory.reward}; it must be finite"
        raise NonFiniteError(message)
    given_rewards = sum(turn.reward for turn in trajectory.turns)
    if not math.isclose(given_rewards, trajectory.reward, rel_tol=1e-9, abs_tol=1e-9):
        message = (
            f"{name}: the rewards of its turns sum to {given_rewards}, and its reward is"
            f" {trajectory.reward}; give each turn the reward that the environment gave for it"
        )
        raise ValueError(message)
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
