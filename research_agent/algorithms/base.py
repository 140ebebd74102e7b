"""What an algorithm is: advantages, token weights and an objective; nothing else.

The learner minimizes ``-(weights * objective).sum()`` over the action tokens of a batch. The
weights are fixed on the whole batch before it is cut into micro-batches, so the cutting changes
neither the loss nor its gradient.

This module and the algorithms use tensors by their methods only. Importing them loads no torch, so
a configuration can hold an algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class Tokens:
    """The action tokens of a micro-batch, as an objective sees them. Every tensor is [tokens].

    Trajectories are never cut: all action tokens of a trajectory are in the same micro-batch, one
    after another, so an objective may also work on whole sequences.
    """

    logprobs: Tensor  # log pi(o_t), current policy, with gradient
    old_logprobs: Tensor  # log pi_old(o_t), policy that sampled, constant
    reference_logprobs: Tensor | None  # log pi_ref(o_t), constant; None unless needs_reference
    entropy: Tensor  # H_t of the current policy, in nats, with gradient
    advantages: Tensor  # A_t, constant
    seq_ids: Tensor  # index of the token's trajectory in the micro-batch, ascending


class Algorithm(Protocol):
    """A policy-gradient algorithm: one file with a class, usually a frozen data class."""

    @property
    def needs_reference(self) -> bool:
        """Whether ``reference_logprobs`` are used. If not, no reference model is ever run."""
        ...

    def advantages(self, batch: Batch) -> Tensor:
        """Compute the advantage of each action token.

        Args:
            batch: a whole rollout, its old and reference log-probabilities filled in.

        Returns:
            The advantages, [action tokens]. An algorithm with one advantage per trajectory spreads
            it over the tokens with ``per_trajectory[batch.seq_ids]``.
        """
        ...

    def weights(self, batch: Batch) -> Tensor:
        """Compute the weight of each action token in the loss.

        Args:
            batch: all trajectories of one optimizer step.

        Returns:
            The weights, [action tokens].
        """
        ...

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute what is maximized, for each token.

        Args:
            tokens: the action tokens of a micro-batch.

        Returns:
            The objective, [tokens]; and quantities to log, [tokens] each, of which the learner
            takes the mean over the action tokens of the batch.
        """
        ...


@runtime_checkable
class SelectsGroups(Protocol):
    """Optional part of an algorithm: it chooses the groups that it learns from.

    The trainer then plays tasks, round by round, until a step has as many groups as
    ``--prompts-per-step`` asks for.
    """

    @property
    def max_rounds(self) -> int:
        """Most rounds per step. After them the step learns from the groups that it has."""
        ...

    def keeps(self, rewards: Sequence[float]) -> bool:
        """Decide whether a group is learned from.

        Args:
            rewards: rewards of the group's trajectories, without void ones.
        """
        ...


@runtime_checkable
class UsesCritic(Protocol):
    """Optional part of an algorithm: it needs a critic (``research_agent/models/critic.py``).

    The learner makes the critic, and fills in ``batch.values`` before it asks for advantages.
    """

    @property
    def critic_learning_rate(self) -> float:
        """Learning rate of the critic's AdamW."""
        ...

    @property
    def critic_warmup_steps(self) -> int:
        """Optimizer steps over which the critic's learning rate rises linearly from zero."""
        ...

    @property
    def value_clip(self) -> float:
        """How far an update may move a value before the critic's loss clips it."""
        ...

    def returns(self, batch: Batch) -> Tensor:
        """Compute the targets of the critic's values.

        Args:
            batch: a whole rollout, its values filled in.

        Returns:
            The targets, [action tokens].
        """
        ...
