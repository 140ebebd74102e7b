"""OpenEnv: a server whose WebSocket sessions share questions and engine, and its client.

Example:
    .. code-block:: python

        with AppServer(make_app(Sessions(dataset="miniworld"))) as server:
            with SearchClient(base_url=server.url).sync() as env:
                prompt = env.reset(seed=7, index=0).observation.text
                result = env.step(SearchAction(text="<search>Who founded it?</search>"))

``research-env serve --openenv`` starts the same server.
"""

from __future__ import annotations

from typing import Any

from research_env.adapters import require
from research_env.adapters.task_order import TaskOrder
from research_env.core import StepOutput
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.sessions import Sessions

require("openenv", "0.10", "openenv")

from fastapi import FastAPI  # noqa: E402
from openenv.core import EnvClient  # noqa: E402
from openenv.core.client_types import StepResult  # noqa: E402
from openenv.core.env_server.http_server import create_fastapi_app  # noqa: E402
from openenv.core.env_server.interfaces import Environment  # noqa: E402
from openenv.core.env_server.types import Action, Observation, State  # noqa: E402
from pydantic import Field  # noqa: E402


class SearchAction(Action):  # type: ignore[misc]
    """One turn of the policy."""

    text: str = Field(default="", description="What the policy wrote, up to a terminator or end.")
    truncate: bool = Field(
        default=False, description="End the episode: the budget of tokens is spent. It is scored."
    )


class SearchObservation(Observation):  # type: ignore[misc]
    """What the environment answers; ``reward`` is None for a void episode, which is no evidence."""

    text: str = Field(default="", description="The text to append: the prompt, or the passages.")
    messages: list[dict[str, Any]] = Field(default=[], description="The same as chat messages.")
    tools: list[dict[str, Any]] = Field(default=[], description="JSON Schemas of the tools.")
    terminators: list[str] = Field(default=[], description="Where generation pauses.")
    question_id: str = ""
    terminated: bool = False
    truncated: bool = False
    void: bool = Field(default=False, description="The search engine failed: drop the episode.")
    stop_reason: str = ""
    metrics: dict[str, float] = Field(default={}, description="At the end; constant keys.")


class SearchEnvironment(Environment[SearchAction, SearchObservation, State]):  # type: ignore[misc]
    """One WebSocket session; it plays one episode after another."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, sessions: Sessions) -> None:
        """Share the questions and the engine of these sessions."""
        super().__init__()
        self._sessions = sessions
        self._order = TaskOrder(sessions)
        self._split = str(sessions.core.settings.get("split", "train"))
        self._state = State()

    async def reset_async(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        split: str | None = None,
        index: int | None = None,
        question_id: str | None = None,
        **_: Any,
    ) -> SearchObservation:
        """Open an episode.

        Args:
            seed: begins the order that it draws, with ``index`` at this task; None continues the
                present one.
            episode_id: returned by ``state``.
            split: the server's split, or None.
            index: number of the task in the order of the seed (of seed 0 without one).
            question_id: the task by its id. Without it and ``index``: the next of the order.

        Raises:
            UnknownTaskError: there is no such task.
            UnknownNameError: the server has another split.
            ConfigurationError: both ``index`` and ``question_id``.
        """
        self._check_split(split)
        if index is not None and question_id is not None:
            raise ConfigurationError(
                f"reset takes one of index ({index}) and question_id ({question_id!r}), not both"
            )
        if index is not None:
            session = self._order.opened = self._sessions.open(index, seed or 0)
            if seed is not None:
                self._order.seed, self._order.number = seed, index + 1
        else:
            session = self._order.open(seed, question_id)
        info = session.info
        self._state = State(episode_id=episode_id, question_id=info["question_id"], stop_reason="")
        return SearchObservation(
            text=session.prompt,
            messages=info["messages"],
            tools=[dict(tool) for tool in info["tools"]],
            terminators=list(self._sessions.terminators),
            question_id=info["question_id"],
        )

    async def step_async(
        self, action: SearchAction, timeout_s: float | None = None, **_: Any
    ) -> SearchObservation:
        """Take a turn; searches of all WebSocket sessions share calls of the engine.

        Raises:
            EpisodeError: before ``reset`` or after the end.
        """
        session = self._order.session
        if action.truncate:
            output = session.truncate("length")
        else:
            output = await session.astep(action.text)
        self._state.step_count += 1
        self._state.stop_reason = output.info["stop_reason"]
        return _observation(output)

    def reset(self, *_: Any, **__: Any) -> SearchObservation:
        """Not available: the server calls the async methods."""
        raise NotImplementedError("await reset_async or step_async")

    step = reset

    @property
    def state(self) -> State:
        """What ``client.state()`` returns, with ``question_id`` and ``stop_reason``."""
        return self._state

    def list_splits(self) -> list[str]:
        """The one split that this server has."""
        return [self._split]

    def num_tasks(self, split: str) -> int:
        """How many tasks the split has."""
        self._check_split(split)
        return self._sessions.num_tasks

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Id and question of the task that ``reset(index=index)`` opens.

        Raises:
            UnknownTaskError: the split has no such task; it is an ``IndexError``, too.
        """
        self._check_split(split)
        info = self._sessions.open(index).info
        return {"id": info["question_id"], "index": index, "question": info["question"]}

    def get_task_range(
        self, split: str, start: int | None = None, stop: int | None = None
    ) -> list[dict[str, Any]]:
        """The tasks of a slice."""
        indices = range(*slice(start, stop).indices(self._sessions.num_tasks))
        return [self.get_task(split, index) for index in indices]

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """The first hundred tasks."""
        return self.get_task_range(split, stop=100)

    def _check_split(self, split: str | None) -> None:
        if split not in (None, self._split):
            raise UnknownNameError("split", str(split), [self._split])


def _observation(output: StepOutput) -> SearchObservation:
    info = output.info
    return SearchObservation(
        text=output.observation,
        messages=info["messages"],
        reward=None if info["void"] else output.reward,
        done=output.terminated or output.truncated,
        terminated=output.terminated,
        truncated=output.truncated,
        **{key: info[key] for key in ("question_id", "void", "stop_reason", "metrics")},
    )


def make_app(sessions: Sessions, max_sessions: int = 256) -> FastAPI:
    """The server's application.

    Args:
        sessions: shared by all WebSocket sessions.
        max_sessions: further ones are refused.
    """
    app: FastAPI = create_fastapi_app(
        lambda: SearchEnvironment(sessions),
        SearchAction,
        SearchObservation,
        max_concurrent_envs=max_sessions,
        env_name="research",
    )
    return app


class SearchClient(EnvClient[SearchAction, SearchObservation, State]):  # type: ignore[misc]
    """The client; see ``EnvClient`` for its arguments."""

    def _step_payload(self, action: SearchAction) -> dict[str, Any]:
        return {"text": action.text, "truncate": action.truncate}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[SearchObservation]:
        ends = {"done": payload.get("done", False), "reward": payload.get("reward")}
        observation = SearchObservation(**payload["observation"], **ends)
        return StepResult(observation=observation, **ends)

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)
