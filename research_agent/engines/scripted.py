"""An engine without a model: its turns come from a script. For tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.codec import Codec
from research_agent.engines.base import Completion, Finish, SamplingParams
from research_agent.errors import ContextError

if TYPE_CHECKING:
    from torch import Tensor

Script = Callable[[Sequence[int], SamplingParams], Sequence[int]]
"""The tokens that a turn would have, from all tokens before it and how it is sampled."""


@dataclass
class _Turn:
    completion: Completion
    steps: int  # until it is finished


class ScriptedEngine:
    """An ``Engine`` that says what a script says, within the limits that any engine keeps.

    Args:
        script: makes the tokens of a turn. They are cut after the first end token, where a stop
            string is complete, and at the limits of length and context.
        codec: the tokenizer.
        max_context: tokens that a trajectory may have.
        delay: how many more steps a turn takes than one; called once a turn.
    """

    def __init__(
        self,
        script: Script,
        codec: Codec,
        max_context: int = 4096,
        delay: Callable[[], int] = lambda: 0,
    ) -> None:
        self.max_context = max_context
        self._script = script
        self._codec = codec
        self._delay = delay
        self._held: dict[int, list[int]] = {}
        self._turns: dict[int, _Turn] = {}
        self._version = 0

    @property
    def busy(self) -> int:
        """Number of slots with a turn under way."""
        return len(self._turns)

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Append tokens to what the slot holds already, and play a turn from there.

        Raises:
            ContextError: nothing to continue from, or no room left for a token.
            ValueError: the slot's turn is under way.
        """
        if slot in self._turns:
            raise ValueError(f"slot {slot} has a turn under way; wait for it or release it")
        held = self._held.setdefault(slot, [])
        held += tokens
        room = self.max_context - len(held)
        if not held or room < 1:
            raise ContextError(f"{len(held)} tokens in a context of {self.max_context}")
        said, finish = self._cut(
            self._script(tuple(held), params)[: min(params.max_tokens, room)], params.stop
        )
        held += said
        completion = Completion(
            slot=slot,
            tokens=tuple(said),
            logprobs=(0.0,) * len(said),  # a script is certain
            text=self._codec.decode(said[:-1] if finish == "end" else said),
            finish=finish,
            version=self._version,
        )
        self._turns[slot] = _Turn(completion, self._delay())

    def step(self) -> list[Completion]:
        """Finish the turns whose time has come."""
        due = [slot for slot, turn in self._turns.items() if turn.steps <= 0]
        for turn in self._turns.values():
            turn.steps -= 1
        return [self._turns.pop(slot).completion for slot in due]

    def release(self, slot: int) -> None:
        """Forget what the slot holds."""
        self._turns.pop(slot, None)
        self._held.pop(slot, None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a new version number; a script has no weights."""
        self._version = version
        self._held.clear()

    def _cut(self, tokens: Sequence[int], stop: tuple[str, ...]) -> tuple[list[int], Finish]:
        said: list[int] = []
        for token in tokens:
            said.append(token)
            if token in self._codec.end_ids:
                return said, "end"
            if self._codec.stops(said, stop):
                return said, "stop"
        return said, "length"
