"""What all engines check alike: the context, room for a turn, and that weights are the model's."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from research_agent.errors import ConfigError, ContextError, ModelError, NonFiniteError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONTINUE = "If there is a checkpoint, the same command continues from it"
"""What an error of an engine that died ends with."""


def require_context(model: Any, max_context: int | None) -> int:
    """Return how many tokens a trajectory may have; refuse more than the model can read.

    Args:
        model: model of the transformers library.
        max_context: tokens that are wanted; None: as many as the model has positions for.

    Raises:
        ContextError: more than the model has positions for, or more than it reads alike beside
            other sequences (``require_same_positions``).
        ModelError: none are wanted, and the model names no limit.
    """
    from research_agent.models.prepare import require_same_positions  # noqa: PLC0415 - torch

    limit = getattr(model.config, "max_position_embeddings", None)
    context = limit if max_context is None else max_context
    if context is None:
        raise ModelError("the model names no context length; give max_context")
    if limit is not None and context > limit:
        raise ContextError(
            f"max_context is {context}, but the model has {limit} positions; lower it"
        )
    require_same_positions(model, context)
    return int(context)


def require_room(slot: int, length: int, max_context: int) -> None:
    """Check that a slot of ``length`` tokens has something to continue from, and room for a token.

    Raises:
        ContextError: it has nothing to continue from, or no room left to sample a token.
    """
    if not length:
        raise ContextError(f"slot {slot} holds nothing, and no tokens were submitted")
    if length >= max_context:
        raise ContextError(f"{length} tokens leave no room to sample in a context of {max_context}")


def require_slot(slot: int, max_slots: int) -> None:
    """Check that an engine has a slot.

    Raises:
        ValueError: it has not.
    """
    if not 0 <= slot < max_slots:
        raise ValueError(f"slot {slot} of an engine with slots 0 .. {max_slots - 1}")


def require_idle(slot: int, busy: Container[int]) -> None:
    """Check that a slot is not among those with a turn under way.

    Raises:
        ValueError: it is.
    """
    if slot in busy:
        raise ValueError(f"slot {slot} has a turn under way; wait for it or release it")


def require_no_turns(busy: int) -> None:
    """Check that no turn is under way, for an engine that cannot keep one with new weights.

    Raises:
        ValueError: some have.
    """
    if busy:
        raise ValueError(f"{busy} turns are under way; finish or release them before new weights")


def require_temperature(temperature: float) -> None:
    """Refuse a temperature that vLLM would silently raise to 0.01.

    Raises:
        ValueError: it is above 0 and below 0.01.
    """
    if 0 < temperature < 0.01:
        raise ValueError(f"temperature is {temperature}; vLLM takes 0, or 0.01 and more")


def require_gpus(kind: str, count: int, device: torch.device) -> None:
    """Check that this machine has the GPUs that vLLM is to use; without any it runs on the CPU.

    Raises:
        ConfigError: there are fewer.
    """
    import torch  # noqa: PLC0415 - slow to import

    there = torch.cuda.device_count() if device.type == "cuda" else count
    if count > there:
        raise ConfigError(
            f"--engine {kind} with {count} GPUs (tp times dp): {there} are visible here; lower tp "
            "or dp, or look at CUDA_VISIBLE_DEVICES"
        )


def not_finite(version: int) -> NonFiniteError:
    """The error for log-probabilities that are not finite, of weights of this version."""
    return NonFiniteError(
        f"the policy's logits are not finite (weights of version {version}); "
        "lower the learning rate or go back to an earlier checkpoint"
    )


class WeightNames:
    """The names that a model's weights go by, a tied one by several, and their shapes.

    Args:
        model: model of the transformers library.
    """

    def __init__(self, model: Any) -> None:
        named = model.state_dict(keep_vars=True)
        of_tensor: dict[int, list[str]] = {}
        for name, tensor in named.items():
            of_tensor.setdefault(id(tensor), []).append(name)
        self._shapes = {name: tensor.shape for name, tensor in named.items()}
        self._needed = [name for name, _ in model.named_parameters()]
        self.ties = {name: of_tensor[id(tensor)] for name, tensor in named.items()}
        """Each name, to all names of the same tensor, itself among them."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the order in which ``checked`` yields the weights of ``named_parameters``."""
        ties = [tie for name in self._needed for tie in self.ties[name] if tie != name]
        return {name: tuple(self._shapes[name]) for name in (*self._needed, *ties)}

    def require(self, name: str, weight: Tensor) -> None:
        """Check that the model has a weight of this name and shape.

        Raises:
            ModelError: it has not.
        """
        shape = self._shapes.get(name)
        if shape != weight.shape:
            has = "none of that name" if shape is None else f"{list(shape)}"
            raise ModelError(f"weight {name!r} {list(weight.shape)}: the model has {has}")

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """All weights of the model, tied ones under all their names.

        Raises:
            ModelError: a name or shape that the model does not have, or a weight left out.
        """
        given: set[str] = set()
        again: dict[str, Tensor] = {}  # vLLM has a packed copy of a tied head on CPUs
        for name, new in weights:
            self.require(name, new)
            given.add(name)
            again |= {tie: new for tie in self.ties[name] if tie != name}
            yield name, new
        self.require_all(given)
        yield from again.items()

    def require_all(self, given: Collection[str]) -> None:
        """Check that no parameter is missing, a tied one under each of its names.

        Raises:
            ModelError: naming one of those that are.
        """
        missing = sorted(n for n in self._needed if not any(tie in given for tie in self.ties[n]))
        if missing:
            raise ModelError(f"{len(missing)} weights were left out, such as {missing[0]!r}")
