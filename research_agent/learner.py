"""One update of the policy: forward, objective, backward, clip, optimiser step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from research_agent.algorithms.base import Algorithm, Tokens, UsesCritic
from research_agent.algorithms.functional import truncated_importance
from research_agent.batch import Batch, make_batch, micro_batches
from research_agent.distributed import (
    all_reduce_sum,
    any_rank,
    full_tensor,
    gather,
    rank_and_size,
    shard,
    shard_batches,
    shard_like,
)
from research_agent.errors import CheckpointError, ConfigError, NonFiniteError
from research_agent.models.critic import Critic
from research_agent.models.lora import (
    adapters,
    adapters_off,
    add_adapters,
    load_adapters,
    merged,
)
from research_agent.models.policy import (
    Precision,
    TokenLogprobs,
    batch_logprobs,
    layers_of,
    prepare,
)
from research_agent.trajectory import Group

METRICS = {
    "loss": "what is minimised: the weighted sum of -objective over the action tokens",
    "grad_norm": "Euclidean length of the gradient of the loss, before it is clipped",
    "learning_rate": "of the last optimiser step",
    "entropy": "mean over the action tokens of the entropy of the policy there, in nats",
    "sampling_logprob_difference": "mean over the action tokens of |learner's - sampler's"
    " log-probability|, before the weights change (with several minibatches: of the first alone)",
    "length": "mean tokens of a trajectory, of any provenance",
    "action_length": "mean action tokens of a trajectory",
    "max_length": "tokens of the longest trajectory",
    "trajectories": "number of trajectories learned from",
    "optimizer_steps": "number of optimizer steps made",
    "clip_fraction": "share of the action tokens whose ratio was clipped: they have no gradient"
    " but that of KL and entropy (CISPO: they keep a bounded one)",
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
        minibatches: optimizer steps per update; its groups are split into this many parts, in
            order.
        micro_batch_tokens: the most tokens of a forward pass. It changes memory and speed only.
        temperature: the sampler's.
        old_logprobs: what ratios are taken against: the log-probabilities that the sampler
            reported, or those recomputed by the model before its first step on a rollout.
        importance_sampling_cap: multiply advantages by
            ``min(recomputed / sampler's probability, cap)``: truncated importance sampling.
            None: no such weight.
        packing: "on" puts several trajectories in one row, "off" gives each its own, and "auto"
            packs on a GPU. It changes memory and speed only.
        precision: of the model's matrix products. Weights, optimiser and softmax stay float32.
        gradient_checkpointing: keep only what enters each layer, and compute the rest again for the
            gradient: less memory, a third more work.
        compile: let torch.compile fuse the operations of each layer; the first pass takes minutes.
        lora_rank: learn adapters of this rank beside weights that stay; 0 learns the weights.
        adapter: folder or hub name of a LoRA adapter over the model, which learns on.
        optimizer: "adamw"; "adamw_8bit" keeps its moments in 8 bits (bitsandbytes); "adamw_offload"
            keeps them in the CPU's memory and makes its steps there.

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
        minibatches: int = 1,
        micro_batch_tokens: int = 4096,
        temperature: float = 1.0,
        old_logprobs: Literal["sampler", "recomputed"] = "sampler",
        importance_sampling_cap: float | None = None,
        packing: Literal["auto", "on", "off"] = "auto",
        precision: Precision = "float32",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        lora_rank: int = 0,
        adapter: str | None = None,
        optimizer: Literal["adamw", "adamw_8bit", "adamw_offload"] = "adamw",
    ) -> None:
        if algorithm.needs_reference and reference is None and (adapter or not lora_rank):
            message = "the algorithm needs a reference policy; give one, or set its KL to 0"
            raise ConfigError(message)
        _check(minibatches, micro_batch_tokens, temperature, max_grad_norm)
        _check_old_logprobs(old_logprobs, importance_sampling_cap)
        self.model = model.eval()
        self.algorithm = algorithm
        self.steps = 0  # of the optimiser, ever
        self._learning_rate = learning_rate
        self._warmup_steps = warmup_steps
        self._max_grad_norm = max_grad_norm
        self._minibatch_count = minibatches
        self._micro_batch_tokens = micro_batch_tokens
        self._recompute = old_logprobs == "recomputed"
        self._importance_cap = importance_sampling_cap
        on_gpu = next(model.parameters()).is_cuda
        self._packed = packing == "on" or (packing == "auto" and on_gpu)
        if adapter is not None:
            lora_rank = _same_rank(lora_rank, load_adapters(self.model, adapter))
        elif lora_rank:
            add_adapters(self.model, lora_rank)
        self._lora = bool(lora_rank)
        self._reference = (
            reference.eval() if reference is not None and algorithm.needs_reference else None
        )
        for each in (self.model, self._reference):
            if each is not None:
                prepare(
                    each,
                    packed=self._packed,
                    gradient_checkpointing=gradient_checkpointing,
                    compile=compile,
                )
        scorer = partial(
            TokenLogprobs, temperature=temperature, precision=precision, compile=compile
        )
        self._score = scorer(self.model)
        self._reference_score = None if self._reference is None else scorer(self._reference)
        for each in (self._score, self._reference_score):
            if each is not None:
                shard(each, layers_of(each))
        self._parameters: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        self._stepped: dict[str, Tensor] = self._parameters  # what the optimiser works on
        if optimizer == "adamw_offload":
            self._stepped = {n: p.detach().to("cpu", copy=True) for n, p in self._stepped.items()}
        self._optimizer = _optimizer(
            optimizer,
            list(self._stepped.values()),
            lr=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
        )
        self._critic: Critic | None = None
        if isinstance(algorithm, UsesCritic):
            if rank_and_size()[1] > 1 or lora_rank:
                raise ConfigError("a critic learns in one process and without lora_rank only")
            self._critic = Critic(
                model,
                learning_rate=algorithm.critic_learning_rate,
                warmup_steps=algorithm.critic_warmup_steps,
                value_clip=algorithm.value_clip,
                weight_decay=weight_decay,
                betas=betas,
                max_grad_norm=max_grad_norm,
                micro_batch_tokens=micro_batch_tokens,
                packed=self._packed,
                precision=precision,
            )

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Improve the model on a rollout.

        Args:
            groups: the samples of each task. Void trajectories are left out; if no action token is
                left, nothing changes.

        Returns:
            The metrics that ``METRICS`` defines, and those of the critic where there is one; those
            of the models only if a step was made.

        Raises:
            EnvironmentContractError: a trajectory without a prompt.
            NonFiniteError: a reward, log-probability, loss or gradient is not finite. Weights and
                optimiser are as they were before the optimiser step that would have used it.
            ValueError: an action without its log-probabilities.
        """
        device = next(iter(self._parameters.values())).device
        batch = make_batch(groups, device)
        if not len(batch.targets):
            return {"trajectories": float(len(batch)), "optimizer_steps": 0.0}
        batch = self._prepare_batch(batch)
        reports = [self._step(part) | self._critic_step(part) for part in self._minibatches(batch)]
        metrics = {name: sum(r[name] for r in reports) / len(reports) for name in reports[0]}
        lengths = [len(tokens) for tokens in batch.tokens]
        return metrics | {
            "sampling_logprob_difference": reports[0]["sampling_logprob_difference"],
            "learning_rate": reports[-1]["learning_rate"],
            "length": sum(lengths) / len(batch),
            "action_length": len(batch.targets) / len(batch),
            "max_length": float(max(lengths)),
            "trajectories": float(len(batch)),
            "optimizer_steps": float(len(reports)),
        }

    @property
    def has_adapters(self) -> bool:
        """Whether adapters learn, and the weights beside them stay."""
        return self._lora

    def state_dict(self) -> dict[str, Any]:
        """What besides the weights decides the next update: step count and optimiser moments.

        Returns:
            Plain numbers and tensors; the tensors are the live ones, as is torch's custom.
        """
        moments = {
            name: {key: _whole(value) for key, value in self._optimizer.state[p].items()}
            for name, p in self._stepped.items()
        }
        critic = {} if self._critic is None else {"critic": self._critic.state_dict()}
        lora = {"adapters": adapters(self.model)} if self._lora else {}
        return {"steps": self.steps, "moments": moments, **critic, **lora}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the policy, whole, for an engine or a checkpoint.

        With more than one process all of them must ask. Adapters are added in.
        """
        named = merged(self.model) if self._lora else self.model.named_parameters()
        return ((name, full_tensor(weight.detach())) for name, weight in named)

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
            place: {
                key: _placed(value, self._stepped[name]) for key, value in moments[name].items()
            }
            for place, name in enumerate(self._stepped)
            if moments[name]
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": of_parameter, "param_groups": groups})
        if self._critic is not None:
            self._critic.load_state_dict(state["critic"])
        with torch.no_grad():
            for name, held in (adapters(self.model) if self._lora else {}).items():
                held.copy_(state["adapters"][name])

    def _prepare_batch(self, batch: Batch) -> Batch:
        """Add what is fixed for the whole rollout: old and reference log-probabilities, credit."""
        budget = self._micro_batch_tokens
        logprobs = partial(batch_logprobs, batch=batch, max_tokens=budget, packed=self._packed)
        if self._recompute:
            batch = replace(batch, old_logprobs=logprobs(self._score))
        if self._reference_score is not None:
            batch = replace(batch, reference_logprobs=logprobs(self._reference_score))
        elif self.algorithm.needs_reference:
            with adapters_off(self.model):
                batch = replace(batch, reference_logprobs=logprobs(self._score))
        if self._critic is not None and isinstance(self.algorithm, UsesCritic):
            batch = replace(batch, values=self._critic.values(batch))
            batch = replace(batch, returns=self.algorithm.returns(batch))
        advantages = self.algorithm.advantages(batch)
        if self._importance_cap is not None:
            advantages = advantages * truncated_importance(
                batch.old_logprobs, batch.sampler_logprobs, self._importance_cap
            )
        return replace(batch, advantages=advantages)

    def _minibatches(self, batch: Batch) -> list[Batch]:
        """Deal whole groups into as many parts as there are updates, in order."""
        if self._minibatch_count == 1:
            return [batch]
        dealt: dict[int, list[int]] = defaultdict(list)
        names = sorted(set(batch.groups.tolist()))
        part_of = {
            name: place * self._minibatch_count // len(names) for place, name in enumerate(names)
        }
        for i, group in enumerate(batch.groups.tolist()):
            dealt[part_of[group]].append(i)
        parts = [batch.select(chosen) for chosen in dealt.values()]
        return [part for part in parts if len(part.targets)]

    def _step(self, batch: Batch) -> dict[str, float]:
        """Make one optimiser step on a batch."""
        try:
            metrics = self._accumulate(batch)
            norm = full_tensor(
                nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)
            )
            if not norm.isfinite():
                raise NonFiniteError(
                    f"the gradient is not finite (its norm is {norm.item()}) after {self.steps}"
                    " optimiser steps; lower the learning rate, or look at the trajectories"
                )
            warm = min(1.0, (self.steps + 1) / max(1, self._warmup_steps))
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate * warm
            self._apply()
            self.steps += 1
        finally:
            for parameter in self._parameters.values():
                parameter.grad = None  # the rollout that follows can use their memory
        return metrics | {"grad_norm": norm.item(), "learning_rate": self._learning_rate * warm}

    @torch.no_grad()
    def _apply(self) -> None:
        """Let the optimiser change the weights, wherever it works."""
        elsewhere = self._stepped is not self._parameters
        pairs = zip(self._parameters.values(), self._stepped.values(), strict=True)
        for ours, theirs in pairs if elsewhere else ():
            theirs.copy_(ours)
            theirs.grad = None if ours.grad is None else ours.grad.to(theirs.device)
        self._optimizer.step()
        self._optimizer.zero_grad()
        pairs = zip(self._parameters.values(), self._stepped.values(), strict=True)
        for ours, theirs in pairs if elsewhere else ():
            ours.copy_(theirs)

    def _critic_step(self, batch: Batch) -> dict[str, float]:
        """Make one optimiser step of the critic, if there is one."""
        return {} if self._critic is None else self._critic.step(batch)

    def _accumulate(self, batch: Batch) -> dict[str, float]:
        """Add up the gradient of the batch's loss, micro-batch by micro-batch."""
        advantages = batch.advantages
        if advantages is None:
            raise ValueError("the batch has no advantages; fill it first")
        weights = self.algorithm.weights(batch)  # on the whole batch: cutting it changes nothing
        parts: list[Batch] = []
        found: list[Tensor] = []
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        passes = micro_batches(batch, self._micro_batch_tokens, packed=self._packed)
        for micro, counts in shard_batches(passes):
            part = micro.part
            logprobs, entropy = self._score(micro)
            tokens = Tokens(
                logprobs=logprobs,
                old_logprobs=part.old_logprobs.to(logprobs.dtype),
                reference_logprobs=part.reference_logprobs,
                entropy=entropy,
                advantages=advantages[micro.token_index].to(logprobs.dtype),
                seq_ids=part.seq_ids,
            )
            objective, logged = self.algorithm.objective(tokens)
            share_of = weights[micro.token_index].to(objective.dtype) * counts
            loss = -(share_of * objective).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            parts.append(part)
            found.append(logprobs.detach())
            losses.append(loss.detach())
            gap = (found[-1] - part.sampler_logprobs).abs()
            for name, values in {
                "entropy": entropy,
                "sampling_logprob_difference": gap,
                **logged,
            }.items():
                sums[name] = sums.get(name, 0.0) + values.detach().sum().double() * counts
        # Looked at only now: a look at a number makes a GPU wait for us, and us for it.
        _require_finite(parts, found, losses, f"after {self.steps} optimiser steps")
        total = torch.stack([torch.stack(losses).double().sum(), *sums.values()])
        loss_, *rest = all_reduce_sum(total).tolist()
        means = (value / len(batch.targets) for value in rest)
        return {"loss": loss_} | dict(zip(sums, means, strict=True))


def _check(
    minibatches: int, micro_batch_tokens: int, temperature: float, max_grad_norm: float
) -> None:
    for name, value in (("minibatches", minibatches), ("micro_batch_tokens", micro_batch_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    for name, number in (("temperature", temperature), ("max_grad_norm", max_grad_norm)):
        if not number > 0:
            raise ConfigError(f"{name} is {number}; it must be above 0")


def _check_old_logprobs(old_logprobs: str, importance_sampling_cap: float | None) -> None:
    if old_logprobs not in ("sampler", "recomputed"):
        message = f"old_logprobs is {old_logprobs!r}; known: 'sampler', 'recomputed'"
        raise ConfigError(message)
    if importance_sampling_cap is not None and not (
        importance_sampling_cap > 0 and old_logprobs == "recomputed"
    ):
        message = (
            f"importance_sampling_cap is {importance_sampling_cap} with old_logprobs"
            f" {old_logprobs!r}; it must be above 0, with old_logprobs 'recomputed'"
        )
        raise ConfigError(message)


def _same_rank(wanted: int, found: int) -> int:
    if wanted not in (0, found):
        raise ConfigError(
            f"lora_rank is {wanted}, and the adapter to train on has rank {found}; leave"
            " --lora-rank out, or give --merge-adapter to begin a new adapter"
        )
    return found


def _optimizer(kind: str, parameters: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """AdamW, in one of its ways to save memory."""
    if kind == "adamw_8bit":
        try:
            from bitsandbytes import optim  # noqa: PLC0415
        except ImportError as error:
            message = "optimizer 'adamw_8bit' needs bitsandbytes; pip install bitsandbytes"
            raise ConfigError(message) from error
        eight_bit: Any = optim
        return cast(torch.optim.Optimizer, eight_bit.AdamW8bit(parameters, **settings))
    if kind not in ("adamw", "adamw_offload"):
        message = f"optimizer is {kind!r}; known: 'adamw', 'adamw_8bit', 'adamw_offload'"
        raise ConfigError(message)
    return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **settings)


def _whole(value: Any) -> Any:
    return full_tensor(value) if isinstance(value, Tensor) else value


def _placed(value: Any, parameter: Tensor) -> Any:
    return shard_like(value.clone(), parameter) if isinstance(value, Tensor) else value


def _require_finite(
    parts: list[Batch], logprobs: list[Tensor], losses: list[Tensor], when: str
) -> None:
    """Find the first log-probability, or else loss, that is not finite, and name it."""
    values = torch.cat([*logprobs, torch.stack(losses).to(logprobs[0].dtype)])
    if not any_rank(not bool(values.isfinite().all()), values.device):
        return
    causes = gather(list(_not_finite(parts, logprobs, losses, when)))  # of all processes
    raise NonFiniteError(causes[0])


def _not_finite(
    parts: list[Batch], logprobs: list[Tensor], losses: list[Tensor], when: str
) -> Iterator[str]:
    for part, values in zip(parts, logprobs, strict=True):
        for first in values.isfinite().logical_not().nonzero()[:1].flatten().tolist():
            name = part.names[int(part.seq_ids[first])]
            yield (
                f"a log-probability of {name} is {values[first].item()} {when}; the weights or the"
                " trajectory are broken"
            )
    for part, loss in zip(parts, losses, strict=True):
        if not loss.isfinite():
            yield (
                f"the loss is {loss.item()} {when}, on {part.names[0]} and others; lower the"
                " learning rate, or look at them"
            )
