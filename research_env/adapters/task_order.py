"""Tasks in the order that a seed draws, for frameworks that reset without naming a task."""

from __future__ import annotations

from research_env.sessions import Session, Sessions


class TaskOrder:
    """Opens one task after another; each pass over all tasks has an order of its own."""

    def __init__(self, sessions: Sessions, seed: int = 0) -> None:
        """Begin with the first task of the seed's order."""
        self.sessions = sessions
        self.seed = seed
        self.number = 0

    def open(self, seed: int | None = None, question_id: str | None = None) -> Session:
        """Open an episode.

        Args:
            seed: begins the order that it draws; None continues the present one.
            question_id: the task; None takes the next of the order.

        Raises:
            UnknownTaskError: no task has this id.
        """
        if seed is not None:
            self.seed, self.number = seed, 0
        if question_id is not None:
            return self.sessions.open(question_id)
        passes, number = divmod(self.number, self.sessions.num_tasks)
        self.number += 1
        return self.sessions.open(number, self.seed + passes)
