"""A watch for collapse: a policy that had learned something, and loses it.

The reward of training is averaged over a few steps; when that falls below a share of the best such
average, the run has collapsed. What may be done is to stop, or to go back to the last checkpoint of
the best steps and go on with tasks that are new to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW = 10


@dataclass
class CollapseMonitor:
    """Rewards of the steps since the start, or since the last time that the run was set back.

    Args:
        share: of the best average, from 0 to 1.
        window: steps of an average.
        history: pairs of a step and its mean reward, oldest first; a checkpoint keeps it.
    """

    share: float
    window: int = WINDOW
    history: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, reward: float) -> int | None:
        """Take in the reward of a step.

        Args:
            step: its number.
            reward: mean over its episodes.

        Returns:
            None while all is well; else the last step of the best average.
        """
        self.history.append((step, reward))
        ends = range(self.window, len(self.history) + 1)
        means = [sum(r for _, r in self.history[e - self.window : e]) / self.window for e in ends]
        if not means:
            return None
        best = max(range(len(means)), key=lambda i: (means[i], i))  # of equals the latest
        if means[best] <= 0 or means[-1] >= self.share * means[best]:
            return None
        return self.history[best + self.window - 1][0]
