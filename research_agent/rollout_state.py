"""Episodes that began ahead of their training step: into a checkpoint, and back.

Their tokens, log-probabilities and versions are kept to the bit. Environments are not saved: to
bring back a half-played episode, its actions are taken again. A turn that was being sampled
continues from the part that had been sampled when the engine last got new weights.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from research_agent.active_rollout import ActiveRollout, EpisodeKey, InFlight
from research_agent.config import SamplingConfig
from research_agent.engines.base import Completion
from research_agent.environments import Environments
from research_agent.trajectory import NOT_GROWN, Segment, Trajectory
from research_agent.tree_plan import CHAINS, TreePlan

_TRAJECTORY = (
    *("episode", "sample", "reward", "terminated", "truncated", "stop_reason", "void"),
    *("lineage", "tree"),
)
_ROLLOUT = ("episode", "sample", "reward", "prompt_length", "response_length", "state_key")


def to_state(in_flight: InFlight) -> dict[str, Any]:
    """Convert the episodes under way to tensors and plain values, for a checkpoint.

    Infos become JSON values, as in the logs.
    """
    segments: list[Segment | Completion] = []

    def kept(segment: Segment) -> list[Any]:
        segments.append(segment)
        return [
            segment.provenance,
            len(segment.tokens),
            segment.text,
            _plain(segment.info),
            segment.reward,
            segment.state_key,
        ]

    rollouts = []
    for slot, rollout in sorted(in_flight.active.items()):
        fields = {name: getattr(rollout, name) for name in _ROLLOUT}
        parts = [kept(segment) for segment in rollout.segments]
        partial = [len(part.tokens) for part in rollout.partial_turns]
        segments += rollout.partial_turns
        awaiting_env = slot in in_flight.awaiting_env
        fields |= {"segments": parts, "partial_turns": partial, "awaiting_env": awaiting_env}
        rollouts.append({"slot": slot, **fields})
    done = [
        {name: getattr(trajectory, name) for name in _TRAJECTORY}
        | {"metrics": dict(trajectory.metrics), "info": _plain(trajectory.info)}
        | {"segments": [kept(segment) for segment in trajectory.segments]}
        for trajectory in in_flight.done.values()
    ]
    return {
        "active": rollouts,
        "done": done,
        "tokens": torch.tensor([t for s in segments for t in s.tokens], dtype=torch.int64),
        "logprobs": torch.tensor(
            [value for s in segments for value in s.logprobs or ()], dtype=torch.float64
        ),
        "versions": torch.tensor(
            [version for s in segments for version in s.versions or ()], dtype=torch.int64
        ),
    }


def from_state(
    states: Iterable[Mapping[str, Any]],
    environments: Environments,
    sampling: SamplingConfig,
    seed: int,
    episodes: Collection[EpisodeKey],
    *,
    plan: TreePlan = CHAINS,
) -> InFlight:
    """Restore the episodes that ``to_state`` saved.

    Args:
        states: its results, one per rank of the run that was saved.
        environments: they take the actions of half-played episodes again. An episode is dropped,
            and begins again later, if its environment answers differently than before, or if there
            are fewer environments than before and none is left for it.
        sampling: as in ``collect``.
        seed: as in ``collect``.
        episodes: the episodes that this rank plays; others are left out.
        plan: as in ``collect``. Trees that are not whole are dropped, and begin again later.
    """
    in_flight = InFlight()
    for state in states:
        active, done = _read(state, sampling, seed)
        done = [t for t in done if not t.void or t.stop_reason == NOT_GROWN]  # failed: played again
        if plan.branches:
            active, done = [], _whole_trees(done, plan)
        for slot, rollout, awaiting_env in active:
            if rollout.key not in episodes:
                continue
            free = (n for n in (slot, *range(environments.num_envs)) if n not in in_flight.active)
            place = next((n for n in free if n < environments.num_envs), None)
            if place is None:
                continue
            in_flight.active[place] = rollout
            if awaiting_env:
                in_flight.awaiting_env.add(place)
        for trajectory in done:
            key = trajectory.episode, trajectory.sample
            if key in episodes:
                in_flight.done[key] = trajectory
    _replay(in_flight, environments, seed)
    return in_flight


def _read(
    state: Mapping[str, Any], sampling: SamplingConfig, seed: int
) -> tuple[list[tuple[int, ActiveRollout, bool]], list[Trajectory]]:
    """Read the active episodes of a state (slot, rollout, awaits its environment), and the done."""
    tokens, logprobs, versions = (
        iter(state[name].tolist()) for name in ("tokens", "logprobs", "versions")
    )

    def segment(provenance: Any, count: int, text: str, info: Any, *turn: Any) -> Segment:
        taken = tuple(islice(tokens, count))
        if provenance != "action":
            return Segment(provenance, taken, text=text, info=info)
        sampled = tuple(islice(logprobs, count)), tuple(islice(versions, count))
        return Segment("action", taken, *sampled, text, info, *turn)

    def part(count: int) -> Completion:
        taken, sampled = tuple(islice(tokens, count)), tuple(islice(logprobs, count))
        numbers = tuple(islice(versions, count))
        return Completion(0, taken, sampled, "", "interrupted", numbers[-1], numbers)

    active = []
    for saved in state["active"]:
        rollout = ActiveRollout(
            seed=seed, sampling=sampling, **{name: saved[name] for name in _ROLLOUT}
        )
        rollout.segments = [segment(*each) for each in saved["segments"]]
        rollout.partial_turns = [part(count) for count in saved["partial_turns"]]
        rollout.unsent_tokens = rollout.tokens
        active.append((int(saved["slot"]), rollout, bool(saved["awaiting_env"])))
    done = []
    for saved in state["done"]:
        fields = {name: saved[name] for name in (*_TRAJECTORY, "metrics", "info")}
        fields["lineage"] = tuple(fields["lineage"])
        parts = tuple(segment(*each) for each in saved["segments"])
        done.append(Trajectory(segments=parts, **fields))
    return active, done


def _whole_trees(done: Sequence[Trajectory], plan: TreePlan) -> list[Trajectory]:
    """The trajectories of the trees whose samples have all ended."""
    grown = Counter((t.episode, plan.root(t.sample)) for t in done)
    return [t for t in done if grown[t.episode, plan.root(t.sample)] == plan.size]


def _replay(in_flight: InFlight, environments: Environments, seed: int) -> None:
    """Bring the environments to where their episodes were."""
    active, awaiting_env = in_flight.active, in_flight.awaiting_env
    if not active:
        return

    def drop(slot: int) -> None:
        del active[slot], moves[slot]
        awaiting_env.discard(slot)

    moves = {slot: _moves(rollout) for slot, rollout in active.items()}
    waiting = {slot: moves[slot].pop()[0] for slot in sorted(awaiting_env)}
    prompts = environments.reset({slot: rollout.episode for slot, rollout in active.items()}, seed)
    for slot, (observation, _) in prompts.items():
        if observation != active[slot].segments[0].text:
            drop(slot)
    for turn in range(max(map(len, moves.values()), default=0)):
        now = {slot: each[turn] for slot, each in sorted(moves.items()) if turn < len(each)}
        environments.send(list(now), [action for action, _ in now.values()])
        for result in environments.recv(len(now)):
            slot = result.env_id
            is_over = result.terminated or result.truncated
            if is_over or result.observation != now[slot][1]:
                drop(slot)
    slots = [slot for slot in waiting if slot in awaiting_env]
    environments.send(slots, [waiting[slot] for slot in slots])


def _moves(rollout: ActiveRollout) -> list[tuple[str, str]]:
    """The actions of an episode, with what the environment answered."""
    moves: list[tuple[str, str]] = []
    for segment in rollout.segments[1:]:
        if segment.provenance == "action":
            moves.append((segment.text, ""))
        else:
            moves[-1] = (moves[-1][0], segment.text)
    return moves


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    def nearest(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    loaded: dict[str, Any] = json.loads(json.dumps(dict(info), default=nearest))
    return loaded
