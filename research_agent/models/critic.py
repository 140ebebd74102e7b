"""The critic: a copy of the policy's body that says what reward is still to come.

Only algorithms that ask for one have it (``UsesCritic`` in ``algorithms/base.py``); the learner
then fills ``batch.values`` in before it asks for advantages, and teaches the critic after the
policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from research_agent.algorithms.functional import token_mean
from research_agent.batch import Batch, MicroBatch, Packing, micro_batches
from research_agent.errors import CheckpointError, NonFiniteError
from research_agent.models.policy import Precision, action_hidden_states

METRICS = {
    "critic_loss": "half the squared error of the critic's values, clipped as the algorithm says,"
    " in the mean over the action tokens",
    "critic_grad_norm": "Euclidean length of the gradient of that, before it is clipped",
    "critic_clip_fraction": "share of the action tokens whose value moved too far to count",
    "value": "mean over the action tokens of the critic's value, before the update",
    "explained_variance": "1 - variance of (return - value) / variance of the return, over the"
    " action tokens, before the update: 1 is a perfect critic, 0 one that knows only the mean;"
    " 0 if all returns are equal",
}
"""What ``Critic.step`` reports."""


class Critic:
    """Values of the states in which action tokens were sampled, and their optimiser (AdamW).

    The body is a copy of the policy's, as it is now; the head is linear and begins at 0, so that
    values do too and nothing is drawn at random.

    Args:
        model: the policy: a causal language model of the transformers library.
        learning_rate: after the warm-up.
        warmup_steps: optimiser steps over which the learning rate rises in a line from zero.
        value_clip: how far a step may move a value, as far as the loss goes.
        weight_decay: of AdamW.
        betas: of AdamW.
        max_grad_norm: longer gradients are scaled down to this length.
        micro_batch_tokens: the most tokens of a forward pass.
        packing: as for ``micro_batches``; the model must have been prepared for it.
        precision: of the matrix products.
    """

    def __init__(
        self,
        model: Any,
        *,
        learning_rate: float,
        warmup_steps: int,
        value_clip: float,
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
        micro_batch_tokens: int,
        packing: Packing = "off",
        precision: Precision = "float32",
    ) -> None:
        base, vocabulary_head = model.base_model, model.get_output_embeddings()
        weight = vocabulary_head.weight
        # As prepared: its layers keep, or do not keep, what enters them.
        self.body: Any = deepcopy(base if isinstance(base, nn.Module) else model)
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._modules = nn.ModuleDict({"body": self.body, "head": self.head})
        self._parameters = [p for p in self._modules.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay
        )
        self._learning_rate = learning_rate
        self._warmup_steps = warmup_steps
        self._value_clip = value_clip
        self._max_grad_norm = max_grad_norm
        self._micro_batch_tokens = micro_batch_tokens
        self._packing: Packing = packing
        self._precision: Precision = precision
        self.steps = 0

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """Say what reward is still to come where each action token was sampled.

        Args:
            batch: A action tokens.

        Returns:
            The values, [A], in float32 (float64 if the model is).
        """
        passes = list(micro_batches(batch, self._micro_batch_tokens, packing=self._packing))
        found = torch.cat([self._of(micro) for micro in passes])
        picked = torch.cat([micro.token_index for micro in passes])
        return torch.empty_like(found).index_copy(0, picked, found)

    def step(self, batch: Batch) -> dict[str, float]:
        """Draw the values towards the returns, by one optimiser step.

        Args:
            batch: its ``values`` and ``returns`` filled in.

        Returns:
            The metrics that ``METRICS`` defines.

        Raises:
            NonFiniteError: the gradient is not finite. Nothing has changed.
        """
        old, returns = batch.values, batch.returns
        if old is None or returns is None:
            raise ValueError("the batch has no values or no returns; fill it first")
        weights = token_mean(batch.lengths, batch.seq_ids)
        sums: dict[str, float] = defaultdict(float)
        try:
            for micro in micro_batches(batch, self._micro_batch_tokens, packing=self._packing):
                value = self._of(micro)
                goal = returns[micro.token_index].to(value.dtype)
                errors, clipped = value_errors(
                    value, old[micro.token_index].to(value.dtype), goal, self._value_clip
                )
                share = weights[micro.token_index].to(value.dtype)
                loss = (share * errors).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                sums["critic_loss"] += loss.item()
                sums["critic_clip_fraction"] += (share * clipped).sum().item()
            norm = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
            if not norm.isfinite():
                message = (
                    f"the critic's gradient is not finite (its norm is {norm.item()}) after"
                    f" {self.steps} steps of it; lower critic_learning_rate"
                )
                raise NonFiniteError(message)
            warm = min(1.0, (self.steps + 1) / max(1, self._warmup_steps))
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate * warm
            self._optimizer.step()
            self.steps += 1
        finally:
            self._optimizer.zero_grad()
        variance = returns.var(correction=0).item()
        left = (returns - old).var(correction=0).item()
        return dict(sums) | {
            "critic_grad_norm": norm.item(),
            "value": old.mean().item(),
            "explained_variance": 1 - left / variance if variance > 0 else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, step count and optimiser moments; the tensors are the live ones."""
        return {
            "steps": self.steps,
            "weights": dict(self._modules.state_dict()),
            "moments": self._optimizer.state_dict()["state"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a critic of the same model, to the bit.

        Raises:
            CheckpointError: the state is that of another model.
        """
        try:
            self._modules.load_state_dict(dict(state["weights"]))
        except RuntimeError as error:
            message = f"the critic's state is that of another model: {error}"
            raise CheckpointError(message) from error
        self.steps = int(state["steps"])
        moments = {
            number: {key: value.clone() for key, value in of_one.items()}
            for number, of_one in state["moments"].items()
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _of(self, micro: MicroBatch) -> Tensor:
        device = micro.tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._precision == "bfloat16"):
            states = action_hidden_states(self.body, micro)
        states = states.to(self.head.weight.dtype)
        values: Tensor = self.head(states).squeeze(1)
        return values.to(torch.promote_types(values.dtype, torch.float32))


def value_errors(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Half the squared errors, the larger of the free and the clipped value.

    ``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2``, as in OpenAI's baselines
    (ppo2) and TRL: a value that has moved more than ``clip`` towards its return is left alone.

    Args:
        values: V, [A], with gradient.
        old_values: V_old, before the update, [A].
        returns: R, [A].
        clip: how far a value may move.

    Returns:
        The errors, [A]; and where clipping took their gradient, [A] of booleans.
    """
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    free, held = (values - returns) ** 2, (bounded - returns) ** 2
    return free.maximum(held) / 2, held > free
