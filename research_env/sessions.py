"""Episodes for other people's trainers: opened by task, stepped from any thread or coroutine.

A :class:`Sessions` is made once, from the settings of an environment. It lists the tasks, and opens
a :class:`Session` per rollout, in microseconds. The searches of all sessions go to the engine in
shared batches. The adapters and the vector environment are built on it.

Example:
    >>> from research_env.sessions import Sessions
    >>> with Sessions(dataset="miniworld", template="question") as sessions:
    ...     task = sessions.tasks()[0]
    ...     session = sessions.open(task["id"])
    ...     output = session.step("<search>Who founded it?</search>")
    ...     output = session.truncate("length")
    >>> output.info["stop_reason"], sorted(output.info["metrics"])
    ('length', ['cem', 'em', 'f1', 'format', 'searches', 'support_recall'])
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack

import numpy as np

from research_env.core import EnvCore, EnvSettings, StepOutput, make_core, resolve_search
from research_env.episode import Action, Episode, TruncationReason, advance, truncate
from research_env.errors import ClosedError, ConfigurationError, EpisodeError, UnknownTaskError
from research_env.fingerprint import environment_fingerprints
from research_env.info import strata
from research_env.protocol import Message
from research_env.retrieval.batching import Found, QueryBatcher, SearchCounts

_LONGEST_WAIT = 3600  # seconds


class Task(TypedDict):
    """A row of :meth:`Sessions.tasks`, as data sets of other trainers want it.

    Attributes:
        id: the question's id; ``Sessions.open`` takes it.
        prompt: the first observation.
        messages: the same as chat messages.
        tools: JSON schemas of tools for the chat template; empty if it shows none.
        strata: the groups by which evaluations report means, such as the number of hops.
    """

    id: str
    prompt: str
    messages: list[Message]
    tools: list[Mapping[str, Any]]
    strata: dict[str, str]


class Sessions:
    """Tasks, rules, engine and reward of one set of settings; opens episodes.

    All methods may be called from any thread. The sessions share searches: a query that several ask
    at the same time is sent once, by no more threads than the engine allows.

    Attributes:
        core: questions, rules and reward.
        searches: the queue in front of the engine.
    """

    def __init__(
        self,
        *,
        max_batch: int = 256,
        max_wait: float = 0.002,
        cache_size: int = 10_000,
        **settings: Unpack[EnvSettings],
    ) -> None:
        """Read the data, open the engine, check every setting.

        Args:
            max_batch: the most queries that go to the engine together.
            max_wait: seconds that a batch of queries waits for one more to join it.
            cache_size: the most queries whose hits are cached; 0: none. Failures are never cached.
            **settings: those of :class:`research_env.env.SearchQAEnv`.

        Raises:
            ResearchEnvError: a setting that cannot be used; the message says which and what to do.
        """
        if not isinstance(max_batch, int | np.integer) or max_batch < 1:
            raise ConfigurationError(f"max_batch is an integer of at least 1, not {max_batch!r}")
        if not isinstance(max_wait, int | float) or not 0 <= max_wait <= _LONGEST_WAIT:
            raise ConfigurationError(
                f"max_wait is at least 0 seconds, and at most {_LONGEST_WAIT}, not {max_wait!r}"
            )
        if not isinstance(cache_size, int) or cache_size < 0:
            raise ConfigurationError(f"cache_size={cache_size!r} must be an integer, 0 or more")
        self.core: EnvCore = make_core(**settings)
        # An engine without the attribute takes one call at a time.
        in_flight = int(getattr(self.core.retriever, "in_flight", 1))
        self.searches: QueryBatcher[Any] = QueryBatcher(
            self.core.search, int(max_batch), max_wait, cache_size, in_flight
        )

    @property
    def num_tasks(self) -> int:
        """How many tasks there are: episodes 0 to ``num_tasks - 1`` ask each once."""
        return len(self.core.questions)

    @property
    def terminators(self) -> tuple[str, ...]:
        """The strings after which generation pauses."""
        return self.core.protocol.terminators

    @property
    def search_counts(self) -> SearchCounts:
        """How many queries were asked so far, and how many of them the engine did not get."""
        return self.searches.counts

    def tasks(self, seed: int = 0) -> list[Task]:
        """All tasks as rows; row ``n`` is what ``open(n, seed)`` opens.

        Args:
            seed: draws their order.

        Raises:
            ConfigurationError: the seed is not an integer from 0 on.
        """
        rows: list[Task] = []
        tools = self.core.tool_schemas()
        for number in range(self.num_tasks):
            question = self.core.questions[self.core.draw_question(seed, number)]
            rows.append(
                {
                    "id": question.id,
                    "prompt": self.core.protocol.prompt(self.core.template, question.question),
                    "messages": self.core.protocol.messages(self.core.template, question.question),
                    "tools": tools,
                    "strata": strata(question),
                }
            )
        return rows

    def open(self, task: str | int, seed: int = 0) -> Session:
        """Start an episode.

        Args:
            task: the id of a question, or the number of an episode as in
                ``reset(seed=seed, options={"episode": number})``.
            seed: draws the order of the questions.

        Raises:
            UnknownTaskError: no task has this id, or the number is not in 0 to ``num_tasks - 1``.
            ConfigurationError: the seed is not an integer from 0 on.
            ClosedError: :meth:`close` was called before.
        """
        if self.searches.closed:
            raise ClosedError
        if isinstance(task, str):
            index = self.core.find_question(task)
        elif isinstance(task, int | np.integer) and 0 <= task < self.num_tasks:
            index = self.core.draw_question(seed, task)
        else:
            raise UnknownTaskError(
                f"there is no task {task!r}: a task is the id of a question, or a number from 0 to "
                f"{self.num_tasks - 1}"
            )
        episode, prompt, info = self.core.start(index)
        return Session(self, episode, prompt, info)

    def fingerprints(self) -> dict[str, str]:
        """What results depend on besides the policy: fingerprints of questions, index, prompt."""
        return environment_fingerprints(self.core)

    def close(self) -> None:
        """Finish the searches that have begun, and close the engine.

        Steps whose search has not begun raise ``ClosedError``. With an engine that does not answer
        this takes until its deadline.
        """
        self.searches.close()
        self.core.close()

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Session:
    """One episode. Take one step at a time, from any thread or coroutine.

    A step that fails (wrong action, closed engine, cancelled coroutine) leaves the session as it
    was.

    Attributes:
        prompt: the first observation.
        info: the info of ``reset``: ``question_id``, ``question``, ``messages``, ``strata``, ...
        episode: the present episode, an immutable value.
    """

    def __init__(
        self, sessions: Sessions, episode: Episode, prompt: str, info: dict[str, Any]
    ) -> None:
        """Wrap an episode; use :meth:`Sessions.open`."""
        self.prompt = prompt
        self.info = info
        self.episode = episode
        self._sessions = sessions
        self._stepping = threading.Lock()

    def step(self, action: Action) -> StepOutput:
        """Take what the policy wrote, and wait for the search if it asks for one.

        Args:
            action: a text, or with tool calls a :class:`~research_env.tools.ToolTurn` or an
                assistant message. What follows the first terminator is ignored.

        Returns:
            (observation, reward, terminated, truncated, info), as a Gymnasium environment.

        Raises:
            ActionError: the action is of another type.
            EpisodeError: the episode is over, or another step of this session is under way.
            ClosedError: the sessions have been closed.
        """
        with self._one_step():
            episode = advance(self.episode, action)
            asked = [self._sessions.searches.request(each) for each in episode.pending_requests]
            return self._conclude(episode, [each.result() for each in asked])

    async def astep(self, action: Action) -> StepOutput:
        """The same as :meth:`step`, without blocking the event loop during the search."""
        with self._one_step():
            episode = advance(self.episode, action)
            asked = [self._sessions.searches.request(each) for each in episode.pending_requests]
            found = await asyncio.gather(*map(asyncio.wrap_future, asked))
            return self._conclude(episode, found)

    def truncate(self, reason: TruncationReason = "length") -> StepOutput:
        """End the episode because its budget of tokens is spent; it is scored like any other.

        Args:
            reason: becomes ``info["stop_reason"]``.

        Raises:
            EpisodeError: the episode is over, or a step of this session is under way.
        """
        with self._one_step():
            return self._conclude(truncate(self.episode, reason), ())

    def total_reward(self, end: StepOutput) -> float:
        """The rewards of all steps of a finished episode, for trainers that take one number.

        Args:
            end: the episode's last output.

        Returns:
            Their sum; 0 for a void episode.
        """
        if self.episode.void:
            return 0.0
        turn_reward = self._sessions.core.turn_reward
        return end.reward + (turn_reward.earned_before(self.episode) if turn_reward else 0.0)

    def fork(self) -> Session:
        """A second session that continues from the present state; this one stays as it is."""
        return Session(self._sessions, self.episode, self.prompt, self.info)

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        """Refuse a second step while one is under way, rather than letting it wait."""
        if not self._stepping.acquire(blocking=False):
            raise EpisodeError("this session is taking a step; wait for its result, or fork it")
        try:
            yield
        finally:
            self._stepping.release()

    def _conclude(self, episode: Episode, found: Sequence[Found]) -> StepOutput:
        answered = resolve_search(episode, *found)
        output = self._sessions.core.output(answered)
        self.episode = answered
        return output
