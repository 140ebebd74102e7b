"""The critic: a copy of the policy's body that says what reward is still to come.

Only algorithms that ask for one have it (``UsesCritic`` in ``algorithms/base.py``); the learner
then fills ``batch.values`` in before it asks for advantages, and teaches the critic after the
policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from research_agent.algorithms.base import UsesCritic
from research_agent.algorithms.functional import token_mean
from research_agent.batch import Batch, MicroBatch, Packing, micro_batches
from research_agent.config import LearnerConfig
from research_agent.distributed import (
    all_reduce_sum,
    local_tensor,
    rank_and_size,
    shard,
    shard_batches,
)
from research_agent.errors import CheckpointError, NonFiniteError
from research_agent.models.policy import Precision, action_hidden_states
from research_agent.models.prepare import decoder_layers, set_up
from research_agent.optimizer import Optimizer
from research_agent.sharded import Read, allocate, copy_or_read, read_nothing

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


class ValueModel(nn.Module):
    """A body and a linear head, as a module: what FSDP wraps and hooks into."""

    def __init__(self, body: Any, head: nn.Linear, precision: Precision) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self._precision: Precision = precision

    def forward(self, micro: MicroBatch) -> Tensor:
        """Values where the action tokens of a pass were sampled, [a]."""
        device = micro.tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._precision == "bfloat16"):
            states = action_hidden_states(self.body, micro)
        states = states.to(self.head.weight.dtype)
        values: Tensor = self.head(states).squeeze(1)
        return values.to(torch.promote_types(values.dtype, torch.float32))


class Critic:
    """Values of the states in which action tokens were sampled, and their optimizer (AdamW).

    The body is a copy of the policy's, as it is now; the head is linear and begins at 0, so that
    values do too and nothing is drawn at random. Where the policy is sharded, so is the critic.

    Args:
        model: the policy: a causal language model of the transformers library.
        algorithm: says the learning rate, its warm-up, and how values are clipped.
        config: config of the learner, whose other settings hold here too.
        packing: as for ``micro_batches``; the model must have been prepared for it.
        body: a copy of the policy's body from before it was sharded, where it is. Its weights, if
            it has any, are replaced by the policy's.
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
        # As prepared: its layers keep, or do not keep, what enters them.
        copied = deepcopy(base) if body is None else body
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

    @property
    def steps(self) -> int:
        """Optimizer steps made so far."""
        return self._optimizer.steps

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """Say what reward is still to come where each action token was sampled.

        Args:
            batch: A action tokens.

        Returns:
            The values, [A], in float32 (float64 if the model is).
        """
        found: Tensor | None = None
        for micro, counts in shard_batches(self._passes(batch)):
            values = self.model(micro)
            if found is None:
                found = values.new_zeros(len(batch.targets))
            if counts:
                found[micro.token_index] = values
        return batch.sampler_logprobs.new_zeros(0) if found is None else all_reduce_sum(found)

    def step(self, batch: Batch) -> dict[str, float]:
        """Draw the values towards the returns, by one optimizer step.

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
        sums = torch.zeros(2, dtype=torch.float64, device=old.device)
        try:
            for micro, counts in shard_batches(self._passes(batch)):
                value = self.model(micro)
                goal = returns[micro.token_index].to(value.dtype)
                errors, clipped = value_errors(
                    value, old[micro.token_index].to(value.dtype), goal, self._value_clip
                )
                share = weights[micro.token_index].to(value.dtype) * counts
                loss = (share * errors).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                sums += torch.stack([loss.detach(), (share * clipped).sum()]).double()
            norm = self._optimizer.clip()
            if not norm.isfinite():
                message = (
                    f"the critic's gradient is not finite (its norm is {norm.item()}) after"
                    f" {self.steps} steps of it; lower critic_learning_rate"
                )
                raise NonFiniteError(message)
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad()
        loss_, clip_fraction = all_reduce_sum(sums).tolist()
        variance = returns.var(correction=0).item()
        left = (returns - old).var(correction=0).item()
        return {
            "critic_loss": loss_,
            "critic_clip_fraction": clip_fraction,
            "critic_grad_norm": norm.item(),
            "value": old.mean().item(),
            "explained_variance": 1 - left / variance if variance > 0 else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, step count and optimizer moments; the tensors are the live ones."""
        return {
            "steps": self.steps,
            "weights": dict(self.model.named_parameters()),
            "moments": self._optimizer.moments(),
        }

    def load_state_dict(self, state: Mapping[str, Any], read: Read = read_nothing) -> None:
        """Load the state of a critic of the same model, to the bit.

        Args:
            state: what ``state_dict`` returned; tensors of a checkpoint may be in its files still.
            read: reads such tensors in place.

        Raises:
            CheckpointError: the state is that of another model.
        """
        try:
            copy_or_read(dict(self.model.named_parameters()), state["weights"], read)
            self._optimizer.load(state["moments"], int(state["steps"]), read)
        except CheckpointError as error:
            raise CheckpointError(
                f"the critic's state is that of another model: {error}"
            ) from error

    def _passes(self, batch: Batch) -> Iterator[MicroBatch]:
        ranks = rank_and_size()[1]
        return micro_batches(batch, self._budget, packing=self._packing, ranks=ranks)


def _shard_like(
    model: ValueModel, base: nn.Module, config: LearnerConfig, *, packing: Packing
) -> None:
    """Shard a critic as the policy's body is, and give it the same weights."""
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
