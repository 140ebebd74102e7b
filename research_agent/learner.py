"""One update of the policy: forward, objective, backward, clip, optimiser step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from research_agent.algorithms.base import Algorithm, Tokens
from research_agent.batch import Batch, make_batch, micro_batches
from research_agent.errors import CheckpointError, ConfigError, NonFiniteError
from research_agent.policy import batch_logprobs, token_logprobs
from research_agent.trajectory import Group

METRICS = {
    "loss": "what is minimised: the weighted sum of -objective over the action tokens",
    "grad_norm": "Euclidean length of the gradient of the loss, before it is clipped",
    "learning_rate": "of the last optimiser step",
    "entropy": "mean over the action tokens of the entropy of the policy there, in nats",
    "sampler_gap": "mean over the action tokens of |learner's - sampler's log-probability|, before"
    " the weights change (so of the first part alone, where there are several updates)",
    "length": "mean tokens of a trajectory, of any provenance",
    "action_length": "mean action tokens of a trajectory",
    "longest": "tokens of the longest trajectory",
    "trajectories": "number of trajectories learned from",
    "updates": "number of optimiser steps made",
    "clip_share": "share of the action tokens whose ratio was clipped, so that they have no"
    " gradient but that of KL and entropy (by the algorithms that clip)",
    "kl": "mean over the action tokens of the estimate of KL(policy || reference), in nats (by the"
    " algorithms that use a reference)",
}
"""What ``Learner.update`` reports. Where it makes several optimiser steps: means over them."""


class Learner:
    """A model, the algorithm that improves it, and its optimiser (AdamW, decoupled decay).

    Args:
        model: a causal language model; it is set to evaluation mode, for dropout would make what is
            learned from differ from what was sampled. Parameters that need no gradient are left.
        algorithm: advantages, token weights and objective.
        reference: the reference policy; run only if the algorithm needs it.
        learning_rate: after the warm-up, constant from there on.
        warmup_steps: optimiser steps over which the learning rate rises in a line from zero.
        weight_decay: of AdamW.
        betas: of AdamW.
        max_grad_norm: longer gradients are scaled down to this length.
        updates: optimiser steps a rollout; its groups are dealt into this many parts, in order.
        micro_batch_tokens: the most tokens of a forward pass. It changes memory and speed only.
        temperature: the sampler's.
        old_logprobs: what ratios are taken against: the log-probabilities that the sampler
            reported, or those recomputed by the model before its first step on a rollout.

    Raises:
        ConfigError: a setting that cannot be used, or a reference that is needed and not given.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        *,
        reference: nn.Module | None = None,
        learning_rate: float = 1e-6,
        warmup_steps: int = 0,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float = 1.0,
        updates: int = 1,
        micro_batch_tokens: int = 16384,
        temperature: float = 1.0,
        old_logprobs: Literal["sampler", "recomputed"] = "sampler",
    ) -> None:
        if algorithm.needs_reference and reference is None:
            message = "the algorithm needs a reference policy; give one, or set its KL to 0"
            raise ConfigError(message)
        for name, value in (("updates", updates), ("micro_batch_tokens", micro_batch_tokens)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name, number in (("temperature", temperature), ("max_grad_norm", max_grad_norm)):
            if not number > 0:
                raise ConfigError(f"{name} is {number}; it must be above 0")
        if old_logprobs not in ("sampler", "recomputed"):
            message = f"old_logprobs is {old_logprobs!r}; known: 'sampler', 'recomputed'"
            raise ConfigError(message)
        self.model = model.eval()
        self.algorithm = algorithm
        self.steps = 0  # of the optimiser, ever
        self._reference = (
            reference.eval() if reference is not None and algorithm.needs_reference else None
        )
        self._learning_rate = learning_rate
        self._warmup_steps = warmup_steps
        self._max_grad_norm = max_grad_norm
        self._updates = updates
        self._micro_batch_tokens = micro_batch_tokens
        self._temperature = temperature
        self._recompute = old_logprobs == "recomputed"
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=learning_rate, betas=betas, weight_decay=weight_decay
        )

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Improve the model on a rollout.

        Args:
            groups: the samples of each task. Void trajectories are left out; if no action token is
                left, nothing changes.

        Returns:
            The metrics that ``METRICS`` defines; those of the model only if a step was made.

        Raises:
            EnvironmentContractError: a trajectory without a prompt.
            NonFiniteError: a reward, log-probability, loss or gradient is not finite. Weights and
                optimiser are as they were before the optimiser step that would have used it.
            ValueError: an action without its log-probabilities.
        """
        device = next(iter(self._parameters.values())).device
        batch = make_batch(groups, device)
        if not len(batch.targets):
            return {"trajectories": float(len(batch)), "updates": 0.0}
        batch = self._fill(batch)
        reports = [self._step(part) for part in self._parts(batch)]
        metrics = {name: sum(r[name] for r in reports) / len(reports) for name in reports[0]}
        lengths = [len(tokens) for tokens in batch.tokens]
        return metrics | {
            "sampler_gap": reports[0]["sampler_gap"],
            "learning_rate": reports[-1]["learning_rate"],
            "length": sum(lengths) / len(batch),
            "action_length": len(batch.targets) / len(batch),
            "longest": float(max(lengths)),
            "trajectories": float(len(batch)),
            "updates": float(len(reports)),
        }

    def state_dict(self) -> dict[str, Any]:
        """What besides the weights decides the next update: step count and optimiser moments.

        Returns:
            Plain numbers and tensors; the tensors are the live ones, as is torch's custom.
        """
        moments = {name: dict(self._optimizer.state[p]) for name, p in self._parameters.items()}
        return {"steps": self.steps, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a learner of the same model, to the bit.

        Raises:
            CheckpointError: the state is that of a model with other parameters.
        """
        moments = state["moments"]
        if moments.keys() != self._parameters.keys():
            odd = sorted(moments.keys() ^ self._parameters.keys())[0]
            message = f"the optimiser's state is that of another model: they differ in {odd!r}"
            raise CheckpointError(message)
        for name, parameter in self._parameters.items():
            found = moments[name].get("exp_avg", parameter).shape
            if found != parameter.shape:
                message = (
                    f"the optimiser's state is that of another model: {name!r} has the shape"
                    f" {tuple(parameter.shape)} here and {tuple(found)} there"
                )
                raise CheckpointError(message)
        self.steps = int(state["steps"])
        of_parameter = {
            place: {key: value.clone() for key, value in moments[name].items()}
            for place, name in enumerate(self._parameters)
            if moments[name]
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": of_parameter, "param_groups": groups})

    def _fill(self, batch: Batch) -> Batch:
        """Add what is fixed for the whole rollout: old and reference log-probabilities, credit."""
        budget = self._temperature, self._micro_batch_tokens
        if self._recompute:
            batch = replace(batch, old_logprobs=batch_logprobs(self.model, batch, *budget))
        if self._reference is not None:
            of_reference = batch_logprobs(self._reference, batch, *budget)
            batch = replace(batch, reference_logprobs=of_reference)
        return replace(batch, advantages=self.algorithm.advantages(batch))

    def _parts(self, batch: Batch) -> list[Batch]:
        """Deal whole groups into as many parts as there are updates, in order."""
        if self._updates == 1:
            return [batch]
        dealt: dict[int, list[int]] = defaultdict(list)
        names = sorted(set(batch.groups.tolist()))
        part_of = {name: place * self._updates // len(names) for place, name in enumerate(names)}
        for i, group in enumerate(batch.groups.tolist()):
            dealt[part_of[group]].append(i)
        parts = [batch.select(chosen) for chosen in dealt.values()]
        return [part for part in parts if len(part.targets)]

    def _step(self, batch: Batch) -> dict[str, float]:
        """Make one optimiser step on a batch."""
        try:
            metrics = self._accumulate(batch)
            norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)
            if not norm.isfinite():
                raise NonFiniteError(
                    f"the gradient is not finite (its norm is {norm.item()}) after {self.steps}"
                    " optimiser steps; lower the learning rate, or look at the trajectories"
                )
            warm = min(1.0, (self.steps + 1) / max(1, self._warmup_steps))
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate * warm
            self._optimizer.step()
            self.steps += 1
        finally:
            self._optimizer.zero_grad()  # the rollout that follows can use their memory
        return metrics | {"grad_norm": norm.item(), "learning_rate": self._learning_rate * warm}

    def _accumulate(self, batch: Batch) -> dict[str, float]:
        """Add up the gradient of the batch's loss, micro-batch by micro-batch."""
        advantages = batch.advantages
        if advantages is None:
            raise ValueError("the batch has no advantages; fill it first")
        weights = self.algorithm.weights(batch)  # on the whole batch: cutting it changes nothing
        loss = 0.0
        sums: dict[str, float] = defaultdict(float)
        for micro in micro_batches(batch, self._micro_batch_tokens):
            part = micro.part
            logprobs, entropy = token_logprobs(self.model, micro, self._temperature)
            _require_finite(logprobs, part, f"after {self.steps} optimiser steps")
            tokens = Tokens(
                logprobs=logprobs,
                old_logprobs=part.old_logprobs.to(logprobs.dtype),
                reference_logprobs=part.reference_logprobs,
                entropy=entropy,
                advantages=advantages[micro.picked].to(logprobs.dtype),
                sequence=part.sequence,
            )
            objective, logged = self.algorithm.objective(tokens)
            micro_loss = -(weights[micro.picked].to(objective.dtype) * objective).sum()
            if not micro_loss.isfinite():
                raise NonFiniteError(
                    f"the loss is {micro_loss.item()} after {self.steps} optimiser steps, on"
                    f" {part.names[0]} and others; lower the learning rate, or look at them"
                )
            micro_loss.backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.item()
            gap = (logprobs - part.sampler_logprobs).abs()
            for name, values in {"entropy": entropy, "sampler_gap": gap, **logged}.items():
                sums[name] += values.detach().sum().item()
        return {"loss": loss} | {name: sum_ / len(batch.targets) for name, sum_ in sums.items()}


def _require_finite(logprobs: Tensor, batch: Batch, when: str) -> None:
    wrong = logprobs.isfinite().logical_not().nonzero()
    if len(wrong):
        first = int(wrong[0])
        name = batch.names[int(batch.sequence[first])]
        message = (
            f"a log-probability of {name} is {logprobs[first].item()} {when}; the weights or the"
            " trajectory are broken"
        )
        raise NonFiniteError(message)
