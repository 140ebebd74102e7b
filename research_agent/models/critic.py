"""The critic: a copy of the policy's body with a linear head that estimates the return.

Only algorithms that ask for a critic have one (``UsesCritic`` in ``algorithms/base.py``). The
learner fills in ``batch.values`` before it asks for advantages, and updates the critic after the
policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from research_agent.algorithms.base import UsesCritic
from research_agent.algorithms.functional import token_mean
from research_agent.batch import Batch, MicroBatch, Packing
from research_agent.config import LearnerConfig
from research_agent.distributed import (
    all_reduce_sum,
    local_tensor,
    shard,
)
from research_agent.errors import CheckpointError, NonFiniteError
from research_agent.models.policy import Precision, action_hidden_states, own_passes, per_token
from research_agent.models.prepare import decoder_layers, set_up
from research_agent.optimizer import Optimizer
from research_agent.sharded import Read, allocate, copy_or_read, read_nothing

METRICS = {
    "critic_loss": "half the squared error of the critic's values, clipped by the algorithm's"
    " value_clip, mean over the action tokens",
    "critic_grad_norm": "Euclidean length of the critic's gradient, before it is clipped",
    "critic_clip_fraction": "fraction of the action tokens whose value moved beyond value_clip",
    "value": "mean over the action tokens of the critic's value, before the update",
    "explained_variance": "1 - variance of (return - value) / variance of the return, over the"
    " action tokens, before the update: 1 is a perfect critic, 0 one that knows only the mean;"
    " 0 if all returns are equal",
}
"""What ``Critic.step`` reports."""


class ValueModel(nn.Module):
    """A body and a linear head in one module, for FSDP to wrap."""

    def __init__(self, body: Any, head: nn.Linear, precision: Precision) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self._precision: Precision = precision

    def forward(self, micro: MicroBatch) -> Tensor:
        """Values of the states in which a pass's action tokens were sampled, [a]."""
        device = micro.tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._precision == "bfloat16"):
            states = action_hidden_states(self.body, micro)
        states = states.to(self.head.weight.dtype)
        values: Tensor = self.head(states).squeeze(1)
        return values.to(torch.promote_types(values.dtype, torch.float32))


class Critic:
    """A value model of the states in which action tokens were sampled, and its AdamW optimizer.

    The body is a copy of the policy's present body. The head begins at 0, so all values begin at 0
    and nothing is drawn at random. If the policy is sharded, so is the critic.

    Args:
        model: the policy, a causal language model of the transformers library.
        algorithm: gives the learning rate, its warm-up and the clipping of values.
        config: the learner's configuration, for all other settings.
        packing: as for ``micro_batches``; the model must have been prepared for it.
        body: if the policy is sharded, a copy of its body from before it was. The policy's weights
            replace its weights.
    """

    def __init__(
        self,
        model: Any,
        algorithm: UsesCritic,
        config: LearnerConfig,
        *,
        packing: Packing = "off",
        body: Any = None,
    ) -> None:
        base = model.base_model if isinstance(model.base_model, nn.Module) else model
        weight = model.get_output_embeddings().weight
        copied = deepcopy(base) if body is None else body  # a copy is prepared as its original is
        head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.model = ValueModel(copied, head, config.precision)
        if body is not None:
            _shard_like(self.model, base, config, packing=packing)
        self._optimizer = Optimizer(
            {n: p for n, p in self.model.named_parameters() if p.requires_grad},
            learning_rate=algorithm.critic_learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            warmup_steps=algorithm.critic_warmup_steps,
            max_grad_norm=config.max_grad_norm,
        )
        self._value_clip = algorithm.value_clip
        self._budget = config.micro_batch_tokens
        self._packing: Packing = packing

    def values(self, batch: Batch) -> Tensor:
        """Estimate the return of the state in which each action token was sampled.

        Args:
            batch: trajectories with A action tokens.

        Returns:
            The values, [A], in float32 (float64 if the model is).
        """
        return per_token(self.model, batch, self._budget, packing=self._packing)

    def step(self, batch: Batch) -> dict[str, float]:
        """Move the values towards the returns, by one optimizer step.

        Args:
            batch: trajectories whose ``values`` and ``returns`` are filled in.

        Returns:
            The metrics that ``METRICS`` defines.

        Raises:
            NonFiniteError: the gradient is not finite. Nothing has changed.
        """
        old, returns = batch.values, batch.returns
        if old is None or returns is None:
            raise ValueError("the batch has no values or no returns; fill it first")
        weights = token_mean(batch.lengths, batch.seq_ids)
        sums = torch.zeros(2, dtype=torch.float64, device=old.device)
        try:
            for micro, counts in own_passes(batch, self._budget, packing=self._packing):
                value = self.model(micro)
                target = returns[micro.token_index].to(value.dtype)
                errors, clipped = value_errors(
                    value, old[micro.token_index].to(value.dtype), target, self._value_clip
                )
                weight = weights[micro.token_index].to(value.dtype) * counts
                loss = (weight * errors).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                sums += torch.stack([loss.detach(), (weight * clipped).sum()]).double()
            norm = self._optimizer.clip()
            if not norm.isfinite():
                message = (
                    f"the critic's gradient is not finite (its norm is {norm.item()}) after"
                    f" {self._optimizer.steps} critic steps; lower critic_learning_rate"
                )
                raise NonFiniteError(message)
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad()
        loss_, clip_fraction = all_reduce_sum(sums).tolist()
        variance = returns.var(correction=0).item()
        unexplained = (returns - old).var(correction=0).item()
        return {
            "critic_loss": loss_,
            "critic_clip_fraction": clip_fraction,
            "critic_grad_norm": norm.item(),
            "value": old.mean().item(),
            "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, step count and optimizer moments; the tensors are the live ones."""
        return {
            "steps": self._optimizer.steps,
            "weights": dict(self.model.named_parameters()),
            "moments": self._optimizer.moments(),
        }

    def load_state_dict(self, state: Mapping[str, Any], read: Read = read_nothing) -> None:
        """Load the state of a critic of the same model, bit for bit.

        Args:
            state: what ``state_dict`` returned; its tensors may still be in a checkpoint's files.
            read: reads such tensors in place.

        Raises:
            CheckpointError: the state belongs to another model.
        """
        try:
            copy_or_read(dict(self.model.named_parameters()), state["weights"], read)
            self._optimizer.load(state["moments"], int(state["steps"]), read)
        except CheckpointError as error:
            raise CheckpointError(
                f"the critic's state is that of another model: {error}"
            ) from error


def _shard_like(
    model: ValueModel, base: nn.Module, config: LearnerConfig, *, packing: Packing
) -> None:
    """Shard a critic as the policy's body is, and copy the body's weights into it."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow to import

    checkpointing, compiled = config.gradient_checkpointing, config.compile
    set_up(model.body, packing=packing, gradient_checkpointing=checkpointing, compile=compiled)
    given = dict(base.named_parameters())
    first = next(iter(given.values()))
    assert isinstance(first, DTensor)
    units = [*decoder_layers(model.body), model.body.get_input_embeddings()]
    half = config.precision == "bfloat16"
    model.head.to_empty(device=first.device)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    shard(model, units, first.device_mesh, half=half, exact=[model.head])
    allocate(model, first.device)
    with torch.no_grad():
        for name, parameter in model.body.named_parameters():
            local_tensor(parameter).copy_(local_tensor(given[name]))


def value_errors(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2``: PPO's value loss.

    As in OpenAI's baselines (ppo2) and TRL. A value that has moved more than ``clip`` towards its
    return has no gradient.

    Args:
        values: V, [A], with gradient.
        old_values: V_old, before the update, [A].
        returns: R, [A].
        clip: how far a value may move.

    Returns:
        The losses, [A]; and where clipping removed their gradient, [A] of booleans.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return unclipped.maximum(clipped) / 2, clipped > unclipped
