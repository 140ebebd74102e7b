r"""skyrl-gym: one environment per rollout, stepped from threads, over shared sessions.

Example:
    >>> import skyrl_gym
    >>> from research_env.adapters.skyrl import register
    >>> from research_env.sessions import Sessions
    >>> sessions = Sessions(dataset="miniworld", template="question")
    >>> register("research", sessions)
    >>> row = sessions.tasks()[0]
    >>> env = skyrl_gym.make("research", extras={"extra_info": {"question_id": row["id"]}})
    >>> messages, _ = env.init(row["messages"])
    >>> messages == row["messages"], env.step("<answer> \\boxed{?} </answer>")["done"]
    (True, True)
    >>> sessions.close()
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from research_env.adapters import require
from research_env.errors import ConfigurationError, EpisodeError, RetrievalError
from research_env.sessions import Session, Sessions

require("skyrl-gym", "0.4", "skyrl")

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput  # noqa: E402
from skyrl_gym.envs.registration import register as _register  # noqa: E402

if TYPE_CHECKING:
    from research_env.core import StepOutput


class ResearchTextEnv(BaseTextEnv):  # type: ignore[misc]
    """One rollout of skyrl-gym.

    The row names its task: ``extras["question_id"]``, or the same in ``extras["extra_info"]``.
    After ``extras["max_turns"]`` turns the episode is truncated and scored.
    """

    def __init__(
        self,
        env_config: object = None,
        extras: Mapping[str, Any] | None = None,
        *,
        sessions: Sessions,
    ) -> None:
        """Take the arguments of ``skyrl_gym.make``; ``env_config`` is not used.

        Raises:
            ConfigurationError: the row has no ``question_id``.
        """
        super().__init__()
        row = extras or {}
        task = {**row, **(row.get("extra_info") or {})}.get("question_id")
        if task is None:
            raise ConfigurationError(
                "the row has no question_id, neither in extras nor in extras['extra_info']; "
                f"it has {sorted(row)}. Make rows of Sessions.tasks()"
            )
        self._sessions = sessions
        self._task = str(task)
        self._session: Session | None = None
        self._last: StepOutput | None = None
        self.max_turns = int(row["max_turns"]) if "max_turns" in row else sys.maxsize

    def init(self, prompt: object) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Open the episode of the row.

        Args:
            prompt: the row's prompt; the environment's own messages replace it.

        Returns:
            The first messages, and the info of ``reset``.

        Raises:
            UnknownTaskError: no task has this id.
        """
        self._session, self._last = self._sessions.open(self._task), None
        self.turns = 0
        return self._session.info["messages"], self._session.info

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Take what the policy wrote.

        Returns:
            ``observations`` (one message of the user while the episode goes on), ``reward``,
            ``done`` and the info as ``metadata``.

        Raises:
            EpisodeError: before ``init`` or after the end.
            RetrievalError: the search engine failed. skyrl-gym cannot drop a sample, so the
                trainer must not learn from the batch.
        """
        session = self._opened()
        self.turns += 1
        self._last = session.step(action)
        if self._last.info.get("void"):
            raise RetrievalError(
                f"the search engine failed in the episode of {self._task!r}, which says nothing "
                "about the policy; make sure that the engine answers, and repeat the batch"
            )
        if self.turns >= self.max_turns and not session.episode.over:
            end = session.truncate("length")
            self._last = end._replace(reward=self._last.reward + end.reward)
        return self._output(self._last)

    def truncate(self) -> BaseTextEnvStepOutput:
        """End the episode because the trainer's budget of tokens is spent; it is scored."""
        self._last = self._opened().truncate("length")
        return self._output(self._last)

    def get_metrics(self) -> dict[str, float]:
        """The metrics of the episode, as if it were cut now if it is not over; {} before init."""
        if self._session is None:
            return {}
        if self._last is None or not self._last.info["metrics"]:
            self._last = self._session.fork().truncate("length")
        return {**self._last.info["metrics"], "void": float(self._last.info["void"])}

    def _opened(self) -> Session:
        if self._session is None:
            raise EpisodeError("call init before step")
        return self._session

    @staticmethod
    def _output(output: StepOutput) -> BaseTextEnvStepOutput:
        observation, reward, terminated, truncated, info = output
        done = terminated or truncated
        return BaseTextEnvStepOutput(
            observations=[] if done else [{"role": "user", "content": observation}],
            reward=reward,
            done=done,
            metadata=info,
        )


def register(name: str, sessions: Sessions) -> None:
    """Make ``skyrl_gym.make(name, extras=row)`` open tasks of these sessions.

    Args:
        name: the value of ``env_class`` in the trainer's rows.
        sessions: shared by all environments of this name.
    """

    def make(**arguments: Any) -> ResearchTextEnv:
        return ResearchTextEnv(**arguments, sessions=sessions)

    _register(id=name, entry_point=make)
