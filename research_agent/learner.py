"""One update of the policy: forward, objective, backward, clip, optimizer step."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from research_agent.algorithms.base import Algorithm, Tokens, UsesCritic
from research_agent.algorithms.functional import truncated_importance
from research_agent.batch import Batch, Packing, make_batch
from research_agent.config import LearnerConfig
from research_agent.distributed import (
    Repeatable,
    all_reduce_sum,
    any_rank,
    full_tensor,
    gather,
    gathered_numel,
    make_mesh,
    raise_together,
    rank_and_size,
    run_together,
    shard,
    together,
)
from research_agent.errors import ConfigError, ModelError, NonFiniteError
from research_agent.models.critic import Critic
from research_agent.models.deferred import load_shards
from research_agent.models.lora import (
    adapters,
    adapters_off,
    add_adapters,
    load_adapters,
    merged,
)
from research_agent.models.policy import (
    TokenLogprobs,
    batch_logprobs,
    gathered_units,
    load_model,
    own_passes,
)
from research_agent.models.prepare import prepare
from research_agent.optimizer import Optimizer
from research_agent.sharded import (
    Read,
    copy_or_read,
    copy_weights,
    read_nothing,
    read_weights,
    saved_tensors,
    stand_ins,
    stored_tensors,
)
from research_agent.system.memory import trim_heap
from research_agent.trajectory import Group

METRICS = {
    "loss": "what is minimized: the weighted sum of -objective over the action tokens",
    "grad_norm": "Euclidean length of the gradient of the loss, before it is clipped",
    "learning_rate": "of the last optimizer step",
    "entropy": "mean over the action tokens of the entropy of the policy there, in nats",
    "sampling_logprob_difference": "mean over the action tokens of |learner's - sampler's"
    " log-probability|, before the weights change (with several minibatches: in the first alone)",
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
"""What ``Learner.update`` reports; with several optimizer steps, means over them."""


class Learner:
    """A model, the algorithm that improves it, and its optimizer (AdamW, decoupled weight decay).

    Args:
        model: a causal language model. It is set to evaluation mode, because dropout would make the
            policy that learns differ from the one that sampled. Parameters that do not require a
            gradient stay as they are. With several ranks the model is sharded here, and one from
            ``load_deferred`` gets its weights.
        algorithm: advantages, token weights and objective.
        config: settings of the update; ``LearnerConfig`` explains each.
        reference: the reference policy; run only if the algorithm needs it.
        adapter: folder or hub name of a LoRA adapter over the model, which is trained on.
        temperature: the sampler's.
        device: where to learn; None takes the device that the model is on.
        trees: whether samples branch off each other; then packing "auto" means "tree".

    Raises:
        ConfigError: a setting that cannot be used, or a reference that is needed and not given.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        config: LearnerConfig | None = None,
        *,
        reference: nn.Module | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
        device: torch.device | None = None,
        trees: bool = False,
    ) -> None:
        config = config or LearnerConfig()
        if algorithm.needs_reference and reference is None and (adapter or not config.lora_rank):
            message = "the algorithm needs a reference policy; give one, or set its KL to 0"
            raise ConfigError(message)
        _check(config, temperature)
        self.model = model.eval()
        self.algorithm = algorithm
        self.config = config
        self.device = device or next(model.parameters()).device
        with stand_ins(self.model):
            _set_adapters(self.model, adapter, config.lora_rank)
            self.model.eval()  # an adapter brings dropout of its own
        if isinstance(algorithm, UsesCritic) and self.has_adapters:
            raise ConfigError("a critic learns without lora_rank only; leave --lora-rank out")
        if not algorithm.needs_reference:
            reference = None
        make_logprobs = partial(
            TokenLogprobs,
            temperature=temperature,
            precision=config.precision,
            compile=config.compile,
        )
        self._logprobs = make_logprobs(self.model)
        self._reference_logprobs = None if reference is None else make_logprobs(reference.eval())
        policies = [each for each in (self._logprobs, self._reference_logprobs) if each]
        body = None  # the critic's first weights
        if rank_and_size()[1] > 1:
            if isinstance(algorithm, UsesCritic):
                body = deepcopy(model.base_model)  # a sharded module cannot be copied
            _shard_all(policies, config, self.device)
        automatic: Packing = "on" if self.device.type == "cuda" else "off"
        if trees:
            automatic = "tree"
        self._packing: Packing = automatic if config.packing == "auto" else config.packing
        for policy in policies:
            self._packing = _prepare(
                policy,
                packing=self._packing,
                required=config.packing != "auto",
                half=self.device.type == "cuda" and config.precision == "bfloat16",
                gradient_checkpointing=config.gradient_checkpointing,
                compile=config.compile,
            )
        self._optimizer = Optimizer(
            {n: p for n, p in model.named_parameters() if p.requires_grad},
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            max_grad_norm=config.max_grad_norm,
        )
        self._critic: Critic | None = None
        if isinstance(algorithm, UsesCritic):
            self._critic = Critic(model, algorithm, config, packing=self._packing, body=body)

    @property
    def steps(self) -> int:
        """Optimizer steps made so far."""
        return self._optimizer.steps

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are learned, and the other weights stay as they are."""
        return bool(adapters(self.model))

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Improve the model on the trajectories of a training step.

        Args:
            groups: the samples of each task. Void trajectories are left out; if no action token is
                left, nothing changes.

        Returns:
            The metrics that ``METRICS`` defines, and the critic's if there is a critic. Without an
            action token: ``trajectories`` and ``optimizer_steps`` only.

        Raises:
            ConfigError: the algorithm gives values of another shape than one per action token.
            EnvironmentContractError: a trajectory without a prompt.
            NonFiniteError: a reward, log-probability, loss or gradient is not finite. Weights and
                optimizer are as they were before the optimizer step that would have used it.
            ValueError: an action without its log-probabilities.
        """
        batch = make_batch(groups, self.device)
        if not len(batch.targets):
            return {"trajectories": float(len(batch)), "optimizer_steps": 0.0}
        batch = self._prepare_batch(batch)
        reports = []
        for part in self._minibatches(batch):
            report = self._step(part)
            reports.append(report | (self._critic.step(part) if self._critic else {}))
        trim_heap()  # not after each pass: learning would take a quarter longer
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

    def state_dict(self) -> dict[str, Any]:
        """What decides the next update in addition to the weights: step count and moments.

        Returns:
            Plain numbers and tensors. The tensors are the live ones, as in torch's own
            ``state_dict``, and sharded if the learner is.
        """
        critic = {} if self._critic is None else {"critic": self._critic.state_dict()}
        lora = {"adapters": adapters(self.model)} if self.has_adapters else {}
        return {"steps": self.steps, "moments": self._optimizer.moments(), **critic, **lora}

    def weights(self, dtype: torch.dtype | None = None) -> Iterable[tuple[str, Tensor]]:
        """Return the whole weights of the policy, for an engine.

        This is what ``Engine.load_weights`` takes. Going through it is a collective: every rank
        must do so, as often as the others and to the end, even a rank that does not need the
        weights. Every rank gets every whole tensor, on its own device, in the same order. A tensor
        is valid until the next one is asked for: copy or send it before.

        Args:
            dtype: number format of the weights; a shard is converted before it is gathered. None
                keeps the learner's.

        Returns:
            Names and weights. The names are those of the model without adapters, which are added
            in; a tied weight comes once.
        """
        buffers = dict(self.model.named_buffers())
        return Repeatable(
            lambda: (
                each
                for each in chain.from_iterable(self.weight_buckets(dtype))
                if each[0] not in buffers
            )
        )

    def weight_buckets(
        self, dtype: torch.dtype | None = None
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield what a checkpoint holds, a bucket at a time.

        This is what ``weights`` gives, and then the model's persistent buffers. No update changes
        these, and they keep their number format.

        A bucket holds at most ``config.bucket_bytes``, or one tensor that is larger. It is emptied
        when the next one is asked for. Buckets are the same on all ranks. All collectives of a
        bucket are over before it is yielded, so that what a rank does with it (send, write, wait at
        a barrier) cannot be interleaved with them.

        Args:
            dtype: as for ``weights``.
        """
        buffers = dict(self.model.named_buffers())
        bucket: list[tuple[str, Tensor]] = []
        held = 0
        # While a tensor is gathered, its converted shard is held as well; with adapters also what
        # they add and the sums, which are not converted.
        copies = 6 if self.has_adapters else 2
        for name, weight in merged(self.model):
            kind = weight.dtype if dtype is None or name in buffers else dtype
            size = gathered_numel(weight) * kind.itemsize
            if bucket and held + copies * size > self.config.bucket_bytes:
                yield bucket
                bucket.clear()  # not a new list: the caller may still hold this one
                held = 0
            bucket.append((name, full_tensor(weight.to(kind))))
            held += size
        if bucket:
            yield bucket

    def load_state_dict(self, state: Mapping[str, Any], read: Read = read_nothing) -> None:
        """Load the state of a learner of the same model, to the bit.

        Args:
            state: what ``state_dict`` returned. A tensor may be a ``StoredTensor``, which is still
                in a checkpoint's files.
            read: reads such tensors in place; see ``Checkpoint.read``.

        Raises:
            CheckpointError: the state is that of a model with other parameters.
        """
        self._optimizer.load(state["moments"], int(state["steps"]), read)
        if self._critic is not None:
            self._critic.load_state_dict(state["critic"], read)
        if self.has_adapters:
            copy_or_read(adapters(self.model), state["adapters"], read)

    def load_weights(self, folder: Path) -> None:
        """Read the policy's weights from a checkpoint, in place; adapters stay as they are.

        Raises:
            Exception: the files cannot be read, or hold another model.
        """
        kind: Any = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        whole = None
        with together():
            stored = stored_tensors(folder)
            if any(name not in stored for name, _ in saved_tensors(self.model)):
                # One process saved other names than the model's, which transformers converts.
                whole = load_model(folder, dtype=kind, device="cpu")
        if whole is None:
            read_weights(self.model, folder)
        else:
            copy_weights(self.model, whole)

    def _prepare_batch(self, batch: Batch) -> Batch:
        """Add what all minibatches share: old and reference log-probabilities, advantages."""
        budget = self.config.micro_batch_tokens
        logprobs = partial(batch_logprobs, batch=batch, max_tokens=budget, packing=self._packing)
        if self.config.old_logprobs == "recomputed":
            batch = replace(batch, old_logprobs=logprobs(self._logprobs))
        if self._reference_logprobs is not None:
            batch = replace(batch, reference_logprobs=logprobs(self._reference_logprobs))
        elif self.algorithm.needs_reference:
            with adapters_off(self.model):
                batch = replace(batch, reference_logprobs=logprobs(self._logprobs))
        if self._critic is not None and isinstance(self.algorithm, UsesCritic):
            batch = replace(batch, values=self._critic.values(batch))
            returns = self.algorithm.returns(batch)
            batch = replace(batch, returns=self._per_token("returns", returns, len(batch.targets)))
        size = len(batch.targets)
        advantages = self._per_token("advantages", self.algorithm.advantages(batch), size)
        if self.config.importance_sampling_cap is not None:
            advantages = advantages * truncated_importance(
                batch.old_logprobs, batch.sampler_logprobs, self.config.importance_sampling_cap
            )
        return replace(batch, advantages=advantages)

    def _per_token(self, method: str, values: Any, count: int) -> Tensor:
        """Check that a method of the algorithm gave a value per action token; returns them.

        Other shapes broadcast against those of the batch, and would give another loss.
        """
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != (count,):
            raise ConfigError(
                f"{type(self.algorithm).__name__}.{method} gives {shape}, not the shape ({count},);"
                " return a tensor with one value per action token"
            )
        return values  # type: ignore[no-any-return]

    def _objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute the algorithm's objective, and check that it comes with the values to log."""
        found: Any = self.algorithm.objective(tokens)
        match found:
            case (objective, Mapping() as logged):
                return objective, logged
        raise ConfigError(
            f"{type(self.algorithm).__name__}.objective must return (values, {{name: values}}), "
            f"not {type(found).__name__}; the second may be {{}}"
        )

    def _minibatches(self, batch: Batch) -> list[Batch]:
        """Deal whole groups into as many parts as there are updates, in order."""
        if self.config.minibatches == 1:
            return [batch]
        groups = sorted(set(batch.groups.tolist()))
        part_of = {
            group: place * self.config.minibatches // len(groups)
            for place, group in enumerate(groups)
        }
        members: dict[int, list[int]] = defaultdict(list)  # by part: indices of trajectories
        for i, group in enumerate(batch.groups.tolist()):
            members[part_of[group]].append(i)
        parts = [batch.select(chosen) for chosen in members.values()]
        return [part for part in parts if len(part.targets)]

    def _step(self, batch: Batch) -> dict[str, float]:
        """Make one optimizer step on a batch."""
        try:
            metrics = self._accumulate(batch)
            norm = self._optimizer.clip()
            if not norm.isfinite():
                raise NonFiniteError(
                    f"the gradient is not finite (its norm is {norm.item()}) after {self.steps}"
                    " optimizer steps; lower the learning rate, or look at the trajectories"
                )
            rate = self._optimizer.step()
        finally:
            self._optimizer.zero_grad()
        return metrics | {"grad_norm": norm.item(), "learning_rate": rate}

    def _accumulate(self, batch: Batch) -> dict[str, float]:
        """Add up the gradient of the batch's loss, micro-batch by micro-batch."""
        advantages = batch.advantages
        if advantages is None:
            raise ValueError("the batch has no advantages; call _prepare_batch first")
        # Weights come from the whole batch, so that micro-batches change nothing.
        weights = self._per_token("weights", self.algorithm.weights(batch), len(batch.targets))
        parts: list[Batch] = []
        all_logprobs: list[Tensor] = []  # per pass [its action tokens]
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        budget = self.config.micro_batch_tokens
        for micro, counts in own_passes(batch, budget, packing=self._packing):
            part = micro.part
            logprobs, entropy = self._logprobs(micro)
            tokens = Tokens(
                logprobs=logprobs,
                old_logprobs=part.old_logprobs.to(logprobs.dtype),
                reference_logprobs=part.reference_logprobs,
                entropy=entropy,
                advantages=advantages[micro.token_index].to(logprobs.dtype),
                seq_ids=part.seq_ids,
            )
            objective, logged = self._objective(tokens)
            self._per_token("objective", objective, len(logprobs))
            for name, values in logged.items():
                self._per_token(f"objective ({name!r} to log)", values, len(logprobs))
            token_weights = weights[micro.token_index].to(objective.dtype) * counts
            loss = -(token_weights * objective).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            parts.append(part)
            all_logprobs.append(logprobs.detach())
            losses.append(loss.detach())
            difference = (logprobs.detach() - part.sampler_logprobs).abs()
            for name, values in {
                "entropy": entropy,
                "sampling_logprob_difference": difference,
                **logged,
            }.items():
                sums[name] = sums.get(name, 0.0) + values.detach().sum().double() * counts
        # Checked after the last pass, because reading a number makes the CPU wait for the GPU.
        _require_finite(parts, all_logprobs, losses, f"after {self.steps} optimizer steps")
        totals = torch.stack([torch.stack(losses).double().sum(), *sums.values()])
        total_loss, *rest = all_reduce_sum(totals).tolist()
        means = (value / len(batch.targets) for value in rest)
        return {"loss": total_loss} | dict(zip(sums, means, strict=True))


def _check(config: LearnerConfig, temperature: float) -> None:
    """Refuse settings that no update can have, with the names that a library user knows."""
    counts = {"minibatches": config.minibatches, "micro_batch_tokens": config.micro_batch_tokens}
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1")
    for name, number in {"temperature": temperature, "max_grad_norm": config.max_grad_norm}.items():
        if not number > 0:
            raise ConfigError(f"{name} is {number}; it must be above 0")
    old_logprobs, cap = config.old_logprobs, config.importance_sampling_cap
    if old_logprobs not in ("sampler", "recomputed"):
        message = f"old_logprobs is {old_logprobs!r}; known: 'sampler', 'recomputed'"
        raise ConfigError(message)
    if cap is not None and not (cap > 0 and old_logprobs == "recomputed"):
        message = (
            f"importance_sampling_cap is {cap} with old_logprobs {old_logprobs!r}; it must be above"
            " 0, with old_logprobs 'recomputed'"
        )
        raise ConfigError(message)


def _set_adapters(model: nn.Module, adapter: str | None, rank: int) -> None:
    """Give a model the adapter to train on, or a new one of this rank; rank 0 adds none.

    Raises:
        ConfigError: the adapter has another rank than the one that is asked for.
    """
    if adapter is not None:
        found = load_adapters(model, adapter)
        if rank not in (0, found):
            raise ConfigError(
                f"lora_rank is {rank}, and the adapter to train on has rank {found}; leave "
                "--lora-rank out, or give --merge-adapter to begin a new adapter"
            )
    elif rank:
        add_adapters(model, rank)


def _shard_all(
    policies: Sequence[TokenLogprobs], config: LearnerConfig, device: torch.device
) -> None:
    """Shard policies over the ranks, and read the weights of those that are not loaded yet."""
    mesh = make_mesh(device, config.shard_ranks)
    for policy in policies:
        half = config.precision == "bfloat16"
        shard(policy, gathered_units(policy.model), mesh, half=half)
        load_shards(policy, device)


def _prepare(
    policy: TokenLogprobs, *, packing: Packing, required: bool, half: bool, **settings: Any
) -> Packing:
    """Prepare a model for learning; returns its packing, "off" if it cannot do the one wanted.

    Args:
        policy: the model, sharded if there are several ranks.
        packing: the packing that is wanted.
        required: raise the error of a model that cannot do it.
        half: learning is in bfloat16 on a GPU, where attention takes another kernel.
        settings: further arguments of ``prepare``.
    """

    def attempt(model: nn.Module) -> ModelError | None:
        try:
            with torch.autocast("cuda" if half else "cpu", torch.bfloat16, enabled=half):
                prepare(model, packing=packing, **settings)
        except ModelError as error:
            return error  # raised here it would leave the weights gathered
        return None

    # All ranks must have the same packing, and so the same passes.
    problem = next(filter(None, run_together(lambda: policy(attempt))), None)
    if problem is None:
        return packing
    if required or packing == "off":
        raise_together(problem)
    warnings.warn(f"{problem} (packing is auto, so it is off)", stacklevel=3)
    policy(partial(prepare, packing="off", **settings))
    return "off"


def _require_finite(
    parts: list[Batch], logprobs: list[Tensor], losses: list[Tensor], when: str
) -> None:
    """Find the first log-probability, or else loss, that is not finite, and name it."""
    values = torch.cat([*logprobs, torch.stack(losses).to(logprobs[0].dtype)])
    if not any_rank(not bool(values.isfinite().all()), values.device):
        return
    causes = gather(list(_not_finite(parts, logprobs, losses, when)))
    raise NonFiniteError(causes[0])


def _not_finite(
    parts: list[Batch], logprobs: list[Tensor], losses: list[Tensor], when: str
) -> Iterator[str]:
    """Describe each log-probability and loss of this rank that is not finite."""
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
