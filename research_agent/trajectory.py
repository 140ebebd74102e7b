"""Trajectories: the tokens of an episode, and who wrote each of them.

A token is an action token because the policy sampled it, never because a string was found again:
provenance is recorded when the token is made, and every mask follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

SKIPPED = "prompt"
"""Stop reason of an episode that was not played, because its prompt is too long."""

NOT_GROWN = "tree budget"
"""Stop reason of a sample that was not played, because its tree has spent its budget."""

Provenance = Literal["prompt", "action", "observation"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one provenance.

    ``logprobs`` are the sampler's log-probabilities at its temperature; ``versions`` are the
    numbers of the weights that sampled the tokens. Both have one entry per token of an action.

    An action segment is a turn. ``reward`` is what ``step`` returned for it; ``state_key`` names
    the state in which the turn was taken (``info["state_key"]`` of the observation before it).
    """

    provenance: Provenance
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None  # [tokens], actions only
    versions: tuple[int, ...] | None = None  # [tokens], actions only
    text: str = ""  # the text of these tokens as the environment saw or gave it
    info: Mapping[str, object] = field(default_factory=dict)  # what came with an observation
    reward: float = 0.0  # the turn's, actions only
    state_key: str = ""  # name of the state before the turn, actions only; "": it has no name


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished episode: its segments in order, and how the environment ended it.

    A trajectory may branch off another one of its group. Then its first turns, with everything
    before and between them, come from other samples: ``lineage`` names the sample in which each of
    these turns was sampled.
    """

    episode: int  # number of the episode; samples of one group share it
    sample: int  # 0 .. group size - 1
    segments: tuple[Segment, ...]
    reward: float  # the sum of its turns' rewards
    terminated: bool
    truncated: bool  # by the environment, or because a budget of tokens was spent
    stop_reason: str = ""  # the environment's, or the spent budget: "length" or "context"
    void: bool = False  # failed infrastructure; never learned from
    metrics: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, object] = field(default_factory=dict)  # the environment's last info
    lineage: tuple[int, ...] = ()  # samples in which its first turns were sampled
    tree: int | None = None  # the sample that its tree grew from; None: it is that sample itself

    @property
    def turns(self) -> list[Segment]:
        """The trajectory's actions, in order."""
        return [segment for segment in self.segments if segment.provenance == "action"]

    @property
    def own_turns(self) -> list[Segment]:
        """The actions that were sampled in this trajectory: those after its branch point."""
        return self.turns[len(self.lineage) :]

    @property
    def tokens(self) -> list[int]:
        """All tokens, in order."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def action_mask(self) -> list[bool]:
        """True where the policy sampled the token. Shape [tokens]."""
        return [s.provenance == "action" for s in self.segments for _ in s.tokens]

    @property
    def num_action_tokens(self) -> int:
        """How many tokens the policy sampled."""
        return sum(len(s.tokens) for s in self.segments if s.provenance == "action")


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one episode number: same task, same prompt."""

    episode: int
    trajectories: Sequence[Trajectory]
