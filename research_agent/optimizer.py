"""AdamW over named parameters, whole or sharded, and two variants that need less memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from research_agent.distributed import full_tensor, local_tensor, rank_and_size, shard_on_cpu
from research_agent.errors import CheckpointError, ConfigError
from research_agent.sharded import Read, StoredTensor

Kind = Literal["adamw", "adamw_8bit", "adamw_offload"]


class Optimizer:
    """AdamW with decoupled weight decay, a linear warm-up, and clipped gradients.

    Args:
        parameters: by name. If they are sharded, so are the moments.
        kind: "adamw"; "adamw_8bit" with moments of 8 bits (needs bitsandbytes); "adamw_offload"
            with moments in the CPU's memory, where the step is computed.
        learning_rate: after the warm-up.
        betas: decay rates of AdamW.
        weight_decay: weight decay of AdamW.
        warmup_steps: optimizer steps over which the learning rate rises linearly from zero.
        max_grad_norm: longer gradients are scaled down to this length.

    Raises:
        ConfigError: an unknown kind, or one that cannot be used here.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        kind: Kind = "adamw",
    ) -> None:
        self.parameters = dict(parameters)
        self.steps = 0  # optimizer steps made so far
        self._learning_rate = learning_rate
        self._warmup_steps = warmup_steps
        self._max_grad_norm = max_grad_norm
        self._stepped = self.parameters  # what torch's optimizer updates: these, or copies
        if kind == "adamw_offload":
            self._stepped = {
                name: local_tensor(p.detach()).to("cpu", copy=True)
                for name, p in self.parameters.items()
            }
        settings = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
        self._kind = kind
        self._optimizer = _make(kind, list(self._stepped.values()), **settings)

    def clip(self) -> Tensor:
        """Scale the gradient down if it is too long; returns its length before that."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self._max_grad_norm)
        return full_tensor(norm)

    @torch.no_grad()
    def step(self) -> float:
        """Make one optimizer step; returns its learning rate."""
        rate = self._learning_rate * min(1.0, (self.steps + 1) / max(1, self._warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        copies = [] if self._stepped is self.parameters else list(self._stepped.items())
        for name, copy in copies:
            parameter = self.parameters[name]
            copy.copy_(local_tensor(parameter))
            gradient = parameter.grad
            copy.grad = None if gradient is None else local_tensor(gradient).to(copy.device)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, copy in copies:
            local_tensor(self.parameters[name]).copy_(copy)
        self.steps += 1
        return rate

    def zero_grad(self) -> None:
        """Free the gradients, so that the next rollout can use their memory."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def moments(self) -> dict[str, dict[str, Any]]:
        """Return AdamW's state of each parameter by its name; the tensors are the live ones."""
        return {
            name: {
                key: self._as_sharded(name, value) if isinstance(value, Tensor) else value
                for key, value in self._optimizer.state[stepped].items()
            }
            for name, stepped in self._stepped.items()
        }

    def load(self, moments: Mapping[str, Mapping[str, Any]], steps: int, read: Read) -> None:
        """Load what ``moments`` returned, to the bit.

        Args:
            moments: moments of an optimizer of the same parameters. Tensors are copied, and
                each ``StoredTensor`` is read.
            steps: optimizer steps made so far.
            read: fills tensors in place, by their names in the files.

        Raises:
            CheckpointError: the state is that of a model with other parameters, or of an optimizer
                with moments of another kind.
        """
        self._require_same(moments)
        wanted: dict[str, Tensor] = {}
        state: dict[int, dict[str, Any]] = {}
        for place, (name, stepped) in enumerate(self._stepped.items()):
            if not moments[name]:
                continue
            state[place] = {}
            for key, value in moments[name].items():
                if isinstance(value, StoredTensor):
                    new = torch.zeros(value.shape, dtype=value.dtype)
                    if value.shape == tuple(self.parameters[name].shape):
                        new = torch.zeros_like(stepped, dtype=value.dtype, requires_grad=False)
                    wanted[value.name] = self._as_sharded(name, new)
                    state[place][key] = new
                else:
                    state[place][key] = value.clone() if isinstance(value, Tensor) else value
        read(wanted)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.steps = steps

    def _require_same(self, moments: Mapping[str, Mapping[str, Any]]) -> None:
        message = "the optimizer's state is that of another model: "
        if moments.keys() != self.parameters.keys():
            odd = sorted(moments.keys() ^ self.parameters.keys())[0]
            raise CheckpointError(f"{message}they differ in {odd!r}")
        for name, parameter in self.parameters.items():
            if moments[name] and ("exp_avg" in moments[name]) == (self._kind == "adamw_8bit"):
                raise CheckpointError(
                    f"the optimizer's state is not one of {self._kind!r}, whose moments have other "
                    "numbers of bits; give the --optimizer of before"
                )
            found = tuple(moments[name].get("exp_avg", parameter).shape)
            if found != tuple(parameter.shape):
                raise CheckpointError(
                    f"{message}{name!r} has the shape {tuple(parameter.shape)} here and {found}"
                    " there"
                )

    def _as_sharded(self, name: str, value: Tensor) -> Tensor:
        """View an offloaded optimizer's tensor as this rank's shard, as checkpoints store it."""
        stepped = self._stepped[name]
        if stepped is self.parameters[name] or value.shape != stepped.shape:
            return value
        return shard_on_cpu(value, self.parameters[name])


def _make(kind: str, parameters: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
    if kind == "adamw_8bit":
        if rank_and_size()[1] > 1:
            message = "optimizer 'adamw_8bit' works in one process only; take 'adamw_offload'"
            raise ConfigError(message)
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
