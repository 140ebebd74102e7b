"""What a training step logs about its episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from research_agent.trajectory import SKIPPED, Group, Trajectory


def of_episodes(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Average the episodes of a step.

    Args:
        trajectories: all episodes of the step; at least one.

    Returns:
        Means over the episodes that are not void, if there are any, and fractions of all episodes;
        docs/reference/metrics.md lists the names.
    """
    played = [t for t in trajectories if not t.void]
    return {
        **(_means(played) if played else {}),
        "sampled_tokens": float(sum(len(s.tokens) for t in trajectories for s in t.own_turns)),
        "sampled_turns": float(sum(len(t.own_turns) for t in trajectories)),
        "void_fraction": void_fraction(trajectories),
        "skipped_fraction": sum(t.stop_reason == SKIPPED for t in trajectories) / len(trajectories),
        "episodes": float(len(trajectories)),
        "truncated_fraction": sum(t.truncated and t.stop_reason != SKIPPED for t in trajectories)
        / len(trajectories),
    }


def _means(played: Sequence[Trajectory]) -> dict[str, float]:
    names = dict.fromkeys(name for t in played for name in t.metrics)  # in the environment's order
    sums = {
        "reward": sum(t.reward for t in played),
        **{f"env/{n}": sum(t.metrics.get(n, 0.0) for t in played) for n in names},
        "turns": sum(s.provenance == "action" for t in played for s in t.segments),
        "action_tokens": sum(t.num_action_tokens for t in played),
        "tokens": sum(len(t.tokens) for t in played),
    }
    return {name: total / len(played) for name, total in sums.items()}


def void_fraction(trajectories: Sequence[Trajectory]) -> float:
    """Fraction of all episodes that are void (failed infrastructure); skipped ones do not count."""
    void = sum(t.void and t.stop_reason != SKIPPED for t in trajectories)
    return void / len(trajectories)


def staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Measure by how many updates the weights that sampled the tokens are older than the learner.

    Args:
        groups: the groups that were learned from.
        version: number of the weights that learned, before their update.

    Returns:
        ``staleness``, the mean over action tokens, and ``staleness_max``.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    versions = [v for t in trajectories for segment in t.segments for v in segment.versions or ()]
    mean = sum(versions) / len(versions) if versions else version
    return {
        "staleness": version - mean,
        "staleness_max": float(version - min(versions, default=version)),
    }


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Name metrics ``prefix/name``."""
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}
