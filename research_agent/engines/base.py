"""What an engine is: token sequences go in, turns of sampled tokens come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.renderer import Renderer

Finish = Literal["stop", "end", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample a turn."""

    temperature: float = 1.0  # 0 is greedy; log-probabilities are then those at temperature 1
    max_tokens: int = 512  # limit of this turn
    stop: tuple[str, ...] = ()  # generation pauses after the token that completes one of these
    seed: int = 0  # this trajectory's: its draws do not depend on the others in the batch
    # How many of the submitted tokens are the beginning of this turn, sampled before it was
    # interrupted. A stop string may begin in them; max_tokens and the completion leave them out.
    resumed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished turn.

    ``finish_reason``: "stop" (a stop string was completed), "end" (the end token, the last of
    ``tokens``), "length" (``max_tokens`` or the context ran out), or "interrupted" (see
    ``Interruptible``).

    ``version`` numbers the weights that sampled the last token, ``versions`` those of each token.
    They differ only in turns of an engine that keeps its turns while it takes new weights
    (``KeepsTurns``); others leave ``versions`` out.

    ``message`` is the turn as an assistant message with tool calls, in the form of OpenAI's API, if
    that is how it was sampled: then it is the action.
    """

    slot: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # [tokens], at the sampling temperature
    text: str  # the text of the tokens, the end token left out
    finish_reason: Finish
    version: int
    versions: tuple[int, ...] = ()  # [tokens]; ``version`` for each if left out
    message: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Fill in the version of each token."""
        if len(self.versions) != len(self.tokens):
            object.__setattr__(self, "versions", (self.version,) * len(self.tokens))


def make_completion(
    renderer: Renderer,
    slot: int,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    *,
    finish_reason: Finish,
    version: int,
    versions: Sequence[int] = (),
) -> Completion:
    """Make the completion of a turn, with its text; see ``Completion`` for the arguments."""
    said = tokens[:-1] if finish_reason == "end" else tokens
    return Completion(
        slot=slot,
        tokens=tuple(tokens),
        logprobs=tuple(logprobs),
        text=renderer.decode(said) if said else "",
        finish_reason=finish_reason,
        version=version,
        versions=tuple(versions),
    )


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
        """Take new weights. Slots forget what they hold, unless the engine ``KeepsTurns``.

        Only called when no slot is busy, unless the engine ``KeepsTurns``. Trajectories under way
        continue all the same: their turns are interrupted before (``Interruptible``), and
        afterwards all their tokens are submitted again, like those of a new trajectory.
        """
        ...


@runtime_checkable
class KeepsTurns(Protocol):
    """An engine that takes new weights between two tokens of its turns: pause, load, resume.

    ``load_weights`` may be called while slots are busy. No turn is cut or submitted again, slots
    keep what they hold, and each completion says which weights sampled which token. The keys and
    values of earlier tokens may stay those of the weights that sampled them.
    """

    @property
    def keeps_turns(self) -> bool:
        """Whether it does; a wrapper has the property in any case."""
        ...


@runtime_checkable
class ServerBacked(Protocol):
    """An engine over servers that an engine in another process can sample from as well."""

    def push_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Any:
        """Give the servers new weights, from all ranks together.

        Returns:
            What ``load_weights`` of the engine in the other process takes. It is pickled.
        """
        ...

    def engine_factory(self) -> Callable[..., Engine]:
        """A function, to be pickled, that makes the other process an engine from its renderer."""
        ...

    def require_alive(self) -> None:
        """Raise an ``EngineError`` that says why a server which this engine started has ended."""
        ...

    def close(self) -> None:
        """Delete the weights, and end what belongs to this engine."""
        ...


@runtime_checkable
class Interruptible(Protocol):
    """An engine that can hand over turns before they are finished. Others lose such turns.

    Used where turns are under way when new weights come (``max_staleness``) or an evaluation
    begins. The player calls ``interrupt`` and releases all slots. After ``load_weights`` it submits
    each trajectory whole, the interrupted turn's tokens last; ``SamplingParams.resumed_tokens`` is
    their number. So the engine needs no memory of what it held, and computes the keys and values of
    all tokens again with the new weights.
    """

    def interrupt(self) -> list[Completion]:
        """End the turns under way where they are: ``finish_reason`` is "interrupted".

        Afterwards no slot is busy, and those that were hold nothing. A turn may have no token yet,
        or fewer than were sampled (an engine far away may not know them all): the rest is sampled
        again.
        """
        ...
