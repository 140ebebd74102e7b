"""Tasks in the order that a seed draws, for frameworks that reset without naming a task."""

from __future__ import annotations

from research_env.errors import EpisodeError
from research_env.sessions import Session, Sessions


class TaskOrder:
    """Opens one task after another; each pass over all tasks has an order of its own.

    Attributes:
        opened: the episode that was opened last; None before the first.
    """

    def __init__(self, sessions: Sessions, seed: int = 0) -> None:
        """Begin with the first task of the seed's order."""
        self.sessions = sessions
        self.seed = seed
        self.number = 0
        self.opened: Session | None = None

    @property
    def session(self) -> Session:
        """The episode that was opened last.

        Raises:
            EpisodeError: none was opened.
        """
        if self.opened is None:
            raise EpisodeError("call reset before step")
        return self.opened

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
            self.opened = self.sessions.open(question_id)
        else:
            core = self.sessions.core
            index = core.draw_question(self.seed, self.number)
            self.number += 1
            self.opened = self.sessions.open(core.questions[index].id)
        return self.opened
