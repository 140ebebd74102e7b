"""What an engine is: token sequences go in, turns of sampled tokens come out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Finish = Literal["stop", "end", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample a turn."""

    temperature: float = 1.0  # 0 is greedy; log-probabilities are then those at temperature 1
    max_tokens: int = 512  # of this turn
    stop: tuple[str, ...] = ()  # generation pauses after the token that completes one of these
    seed: int = 0  # of this trajectory: its draws do not depend on the others in the batch
    resumed_tokens: int = (
        0  # the last tokens submitted that are this turn's already, from before an
    )
    # interruption: a stop string may begin in them; max_tokens and the completion leave them out


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished turn.

    ``finish_reason``: "stop" (a stop string was completed), "end" (the end token, the last of
    ``tokens``), "length" (``max_tokens`` or the context ran out), or "interrupted" (see
    ``Interruptible``). All tokens are of one version of the weights. ``message`` is the turn as an
    assistant message with tool calls, in the form of OpenAI's API, if that is how it was sampled:
    then it is the action.
    """

    slot: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # [tokens], at the sampling temperature
    text: str  # of tokens, the end token left out
    finish_reason: Finish
    version: int
    message: Mapping[str, Any] | None = None


class Engine(Protocol):
    """A sampler with slots. A slot holds one trajectory; its cache lives across turns."""

    max_context: int

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Append tokens to what the slot holds already, and sample a turn from there."""
        ...

    def step(self) -> list[Completion]:
        """Do one unit of work for every busy slot; return the turns that it finished."""
        ...

    def release(self, slot: int) -> None:
        """Forget what the slot holds, so that another trajectory can use it."""
        ...

    @property
    def busy(self) -> int:
        """Number of slots with a turn under way."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights. Only called when no slot is busy; slots forget what they hold.

        Trajectories under way go on all the same: before, they are interrupted (``Interruptible``),
        and after, all their tokens are submitted again, as those of a new trajectory are.
        """
        ...


@runtime_checkable
class Interruptible(Protocol):
    """An engine that can hand over turns before they are finished. Others lose such turns.

    It is used where collection runs ahead of learning (``max_staleness``). The collector calls
    ``interrupt``, releases all slots, and after ``load_weights`` submits each trajectory whole,
    the interrupted turn's tokens last; ``SamplingParams.resumed_tokens`` is their number. So an
    engine needs no memory of what it held, and no completion mixes versions.
    """

    def interrupt(self) -> list[Completion]:
        """End the turns under way where they are: ``finish_reason`` is "interrupted".

        No slot is busy afterwards, and those that were hold nothing. A turn may have no token yet,
        or fewer than were sampled (an engine far away may not know them all): the rest is sampled
        again.
        """
        ...
