"""An algorithm's loss as the learner forms it, to be compared with slow oracles."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from research_agent.algorithms.base import Algorithm, Tokens
from research_agent.batch import Batch, make_batch
from research_agent.trajectory import Group
from tests.research_agent.rollouts import random_groups


@dataclass(frozen=True)
class Case:
    """A rollout, with log-probabilities of policy and reference and entropies. All float64."""

    batch: Batch
    logprobs: Tensor  # [A], with gradient
    entropy: Tensor  # [A], with gradient

    @property
    def rows(self) -> Iterator[tuple[int, list[int]]]:
        """Index of each trajectory, and the indices of its action tokens."""
        at = 0
        for i, length in enumerate(self.batch.lengths.tolist()):
            yield i, list(range(at, at + length))
            at += length

    def group_of(self, i: int) -> list[int]:
        """Indices of the trajectories in i's group, i included."""
        groups = self.batch.groups.tolist()
        return [j for j, group in enumerate(groups) if group == groups[i]]

    def rewards(self) -> list[float]:
        return [float(r) for r in self.batch.rewards.tolist()]

    def group_normalized(self, rewards: Sequence[float]) -> list[float]:
        """The advantage of each action token: its trajectory's reward, normalized in its group."""
        return [
            normalized(rewards[i], [rewards[j] for j in self.group_of(i)])
            for i, tokens in self.rows
            for _ in tokens
        ]


def case(
    groups: Sequence[Group] | int, *, noise: float = 0.3, values: bool = False, seed: int = 0
) -> Case:
    """These groups, or random ones, with a policy that has moved by noise since it sampled."""
    if isinstance(groups, int):
        seed, groups = groups, random_groups(groups, groups=3, samples=3)
    batch = make_batch(groups)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((4, len(batch.targets)), generator=generator, dtype=torch.float64)
    old = batch.old_logprobs.double()
    logprobs = (old + noise * drawn[0]).requires_grad_()
    batch = replace(
        batch, old_logprobs=old, reference_logprobs=logprobs.detach() + noise * drawn[1]
    )
    if values:
        batch = replace(batch, values=drawn[3])
    return Case(batch, logprobs, drawn[2].abs().requires_grad_())


def with_values(groups: Sequence[Group], values: Sequence[float]) -> Batch:
    """The batch of these groups, with a critic's values of its action tokens."""
    return replace(make_batch(groups), values=torch.tensor(values, dtype=torch.float64))


def loss_of(
    algorithm: Algorithm, case: Case, *, cuts: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """The learner's loss: weights and advantages of the whole, objectives by micro-batch.

    ``cuts`` are the trajectories of each micro-batch; all in one when None.
    """
    batch = case.batch
    if not algorithm.needs_reference:
        batch = replace(batch, reference_logprobs=None)
    advantages, weights = algorithm.advantages(batch), algorithm.weights(batch)
    loss = torch.zeros((), dtype=torch.float64)
    for chosen in cuts or [range(len(batch))]:
        part, picked = batch.select(chosen), batch.action_tokens_in(chosen)
        tokens = Tokens(
            logprobs=case.logprobs[picked],
            old_logprobs=part.old_logprobs,
            reference_logprobs=part.reference_logprobs,
            entropy=case.entropy[picked],
            advantages=advantages[picked],
            seq_ids=part.seq_ids,
        )
        loss = loss - (weights[picked] * algorithm.objective(tokens)[0]).sum()
    return loss


def clipped_total(
    case: Case,
    advantages: Sequence[float],
    weights: Sequence[float],
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    kl: float = 0.0,
    entropy_coef: float = 0.0,
) -> Tensor:
    """The loss of PPO's clipped objective with a KL (k3) and an entropy bonus, token by token.

    ``clip`` is how far below and above 1 the ratio may go.
    """
    total = torch.zeros((), dtype=torch.float64)
    reference = case.batch.reference_logprobs
    assert reference is not None
    for t, (advantage, weight) in enumerate(zip(advantages, weights, strict=True)):
        ratio = (case.logprobs[t] - case.batch.old_logprobs[t]).exp()
        bounded = ratio.clamp(1 - clip[0], 1 + clip[1])
        inner = torch.min(ratio * advantage, bounded * advantage)
        r = (reference[t] - case.logprobs[t]).exp()
        inner = inner - kl * (r - r.log() - 1) + entropy_coef * case.entropy[t]
        total = total - weight * inner
    return total


def normalized(value: float, values: Sequence[float], epsilon: float = 1e-6) -> float:
    """(value - mean) / (std + epsilon), the standard deviation over n - 1; 0 for one alone."""
    if len(values) < 2:
        return 0.0
    return (value - statistics.fmean(values)) / (statistics.stdev(values) + epsilon)


def assert_same(case: Case, got: Tensor, expected: Tensor) -> None:
    """Equal losses, and equal gradients by log-probabilities and entropies."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    inputs = [case.logprobs, case.entropy]
    ours = torch.autograd.grad(got, inputs, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, allow_unused=True, retain_graph=True)
    for one, other, place in zip(ours, theirs, inputs, strict=True):
        nothing = torch.zeros_like(place)
        torch.testing.assert_close(
            nothing if one is None else one,
            nothing if other is None else other,
            rtol=1e-8,
            atol=1e-10,
        )


def assert_loss(algorithm: Algorithm, case: Case, expected: Tensor) -> None:
    """The loss is the oracle's, whole, one trajectory at a time, and dealt out in an odd order."""
    everything = range(len(case.batch))
    dealt = [everything[::-1][i::3] for i in range(3)]
    for cuts in ([everything], [[i] for i in everything], [cut for cut in dealt if cut]):
        assert_same(case, loss_of(algorithm, case, cuts=cuts), expected)


def sample_weights(groups: Sequence[Group]) -> list[float]:
    """1 / (samples x tokens of the sample) for each action token."""
    samples = [t for group in groups for t in group.trajectories]
    return [
        1 / (len(samples) * t.num_action_tokens)
        for t in samples
        for turn in t.turns
        for _ in turn.tokens
    ]
