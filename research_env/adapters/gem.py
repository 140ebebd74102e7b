"""GEM: environments over shared sessions, for ``gem.make``, ``gem.make_vec`` and GEM's wrappers.

Example:
    >>> import gem
    >>> from research_env.adapters.gem import register
    >>> from research_env.sessions import Sessions
    >>> sessions = Sessions(dataset="miniworld", template="question")
    >>> register("research:MiniWorld-v0", sessions)
    >>> env = gem.make("research:MiniWorld-v0", seed=7)
    >>> prompt, info = env.reset()
    >>> prompt == sessions.tasks(seed=7)[0]["prompt"]
    True
    >>> sessions.close()
"""

from __future__ import annotations

from typing import Any

from research_env.adapters import require
from research_env.adapters.task_order import TaskOrder
from research_env.core import StepOutput
from research_env.sessions import Sessions

require("gem-llm", "0.1", "gem")

from gem.core import Env  # noqa: E402
from gem.envs.registration import register as _register  # noqa: E402


class _Info(dict[str, Any]):
    """An info whose deep copy is shallow.

    GEM's vector environments copy each info deeply, which takes longer than a step. Nothing in it
    changes after the step.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Info:
        return _Info(self)


class ResearchEnv(Env):  # type: ignore[misc]
    """One environment of GEM.

    Each ``reset`` opens the next task of the order that the seed draws; ``reset(seed=...)`` begins
    an order. GEM's vector environments give each environment a seed of its own.

    Attributes:
        terminators: the strings after which generation pauses.
    """

    def __init__(self, *, sessions: Sessions, seed: int = 0) -> None:
        """Take the arguments of ``gem.make``."""
        super().__init__()
        self.terminators = sessions.terminators
        self._order = TaskOrder(sessions, seed)
        self._last: dict[str, Any] = {}

    def reset(
        self, seed: int | None = None, *, question_id: str | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Open an episode.

        Args:
            seed: begins the order that it draws; None continues the present one.
            question_id: the task; None takes the next of the order.

        Returns:
            The prompt, and the info of ``reset``. If an episode has just ended, its last info is
            ``info["final_info"]``: GEM's vector environments reset in the same step, and would
            lose its metrics otherwise.

        Raises:
            UnknownTaskError: no task has this id.
        """
        last, self._last = self._last, {}
        session = self._order.open(seed, question_id)
        final = {"final_info": last} if last.get("metrics") else {}
        return session.prompt, _Info(session.info, **final)

    def step(self, action: str) -> StepOutput:
        """Take what the policy wrote; see :meth:`research_env.sessions.Session.step`.

        Raises:
            EpisodeError: before ``reset`` or after the end.
        """
        return self._output(self._order.session.step(action))

    def truncate(self) -> StepOutput:
        """End the episode because the trainer's budget of tokens is spent; it is scored."""
        return self._output(self._order.session.truncate("length"))

    def spawn(self, same_state: bool = False, **kwargs: Any) -> ResearchEnv:
        """A second environment over the same sessions; no data are loaded again.

        Args:
            same_state: continue from the present state of this episode.
            **kwargs: other arguments, such as ``seed``.
        """
        order = self._order
        child = ResearchEnv(**{"sessions": order.sessions, "seed": order.seed, **kwargs})
        if same_state:
            child._order.number = order.number
            child._order.opened = order.opened and order.opened.fork()
        return child

    def _output(self, output: StepOutput) -> StepOutput:
        self._last = _Info(output.info)
        return output._replace(info=self._last)


def register(name: str, sessions: Sessions) -> None:
    """Make ``gem.make(name)`` and ``gem.make_vec([name] * n)`` open tasks of these sessions.

    Args:
        name: the id in GEM's registry, such as ``research:MiniWorld-v0``.
        sessions: shared by all environments of this name.
    """
    _register(name, ResearchEnv, sessions=sessions)
