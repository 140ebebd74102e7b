"""An engine without a model: its turns come from a script. For tests and benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from research_agent.engines.base import Completion, Finish, SamplingParams, make_completion
from research_agent.engines.checks import require_idle, require_no_turns
from research_agent.errors import ContextError
from research_agent.renderer import Renderer

if TYPE_CHECKING:
    from torch import Tensor

Script = Callable[[Sequence[int], SamplingParams], Sequence[int]]
"""The tokens that a turn would have, from all tokens before it and how it is sampled."""


@dataclass
class _Turn:
    completion: Completion
    started: int  # the engine's steps when the turn was submitted
    due: int  # steps of the engine when it is finished
    versions: list[int]  # versions of the tokens before the last load of weights

    def said(self, steps: int) -> int:
        """How many tokens the time so far allowed."""
        share = (steps - self.started) / (self.due - self.started)
        return int(share * len(self.completion.tokens))


class ScriptedEngine:
    """An ``Engine`` that says what a script says, within the limits that any engine keeps.

    Args:
        script: makes the tokens of a turn. They are cut after the first end token, where a stop
            string is complete, and at the limits of length and context.
        renderer: the tokenizer.
        max_context: tokens that a trajectory may have.
        delay: how many more steps a turn takes than one; called once per turn.
        keeps_turns: turns continue when new weights come (see ``KeepsTurns``).
    """

    def __init__(
        self,
        script: Script,
        renderer: Renderer,
        max_context: int = 4096,
        delay: Callable[[], int] = lambda: 0,
        *,
        keeps_turns: bool = False,
    ) -> None:
        self.max_context = max_context
        self.keeps_turns = keeps_turns
        self._script = script
        self._renderer = renderer
        self._delay = delay
        self._held: dict[int, list[int]] = {}
        self._turns: dict[int, _Turn] = {}
        self._steps = 0
        self._due: defaultdict[int, list[int]] = defaultdict(list)  # slots; some released since
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
        require_idle(slot, self._turns)
        held = self._held.setdefault(slot, [])
        held += tokens
        room = self.max_context - len(held)
        if not held or room < 1:
            raise ContextError(f"{len(held)} tokens in a context of {self.max_context}")
        before = len(held) - params.resumed_tokens
        said, finish = self._cut(
            self._script(tuple(held[:before]), params)[
                : params.resumed_tokens + min(params.max_tokens, room)
            ],
            params.stop,
        )
        del said[: params.resumed_tokens]
        held += said
        certain = [0.0] * len(said)
        completion = make_completion(
            self._renderer, slot, said, certain, finish_reason=finish, version=self._version
        )
        due = self._steps + 1 + self._delay()
        self._turns[slot] = _Turn(completion, self._steps, due, [])
        self._due[due].append(slot)

    def step(self) -> list[Completion]:
        """Finish the turns whose time has come."""
        self._steps += 1
        done: list[Completion] = []
        for slot in self._due.pop(self._steps, ()):
            turn = self._turns.get(slot)
            if turn is not None and turn.due == self._steps:
                done.append(self._versioned(self._turns.pop(slot)))
        return done

    def interrupt(self) -> list[Completion]:
        """End the turns under way: each has said the share of its tokens that its time allowed."""
        turns = []
        for slot, turn in sorted(self._turns.items()):
            whole = self._versioned(turn)
            count = turn.said(self._steps)
            turns.append(
                replace(
                    whole,
                    tokens=whole.tokens[:count],
                    logprobs=whole.logprobs[:count],
                    text=self._renderer.decode(whole.tokens[:count]),
                    finish_reason="interrupted",
                    versions=whole.versions[:count],
                )
            )
            self.release(slot)
        return turns

    def release(self, slot: int) -> None:
        """Forget what the slot holds."""
        self._turns.pop(slot, None)
        self._held.pop(slot, None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a new version number; a script has no weights.

        Raises:
            ValueError: a turn is under way, and the engine does not keep turns.
        """
        if not self.keeps_turns:
            require_no_turns(self.busy)
            self._held.clear()
        for turn in self._turns.values():
            new = turn.said(self._steps) - len(turn.versions)
            turn.versions += [self._version] * new
        self._version = version

    def _versioned(self, turn: _Turn) -> Completion:
        """The turn with the versions of its tokens; those after the last load are the newest's."""
        rest = len(turn.completion.tokens) - len(turn.versions)
        versions = (*turn.versions, *[self._version] * rest)
        return replace(turn.completion, version=self._version, versions=versions)

    def _cut(self, tokens: Sequence[int], stop: tuple[str, ...]) -> tuple[list[int], Finish]:
        said: list[int] = []
        may_stop = self._renderer.stop_flags(stop)
        for token in tokens:
            said.append(token)
            if token in self._renderer.end_ids:
                return said, "end"
            if may_stop[token] and self._renderer.stops(said, stop):
                return said, "stop"
        return said, "length"
