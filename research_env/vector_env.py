"""The environment for many episodes at a time: in lockstep, or each at its own pace."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from research_env.core import EnvSettings, StepOutput, reset_seed, resolve_search
from research_env.episode import Action, Episode, TruncationReason, advance, truncate
from research_env.errors import (
    ActionError,
    ClosedError,
    ConfigurationError,
    EpisodeError,
    UnknownNameError,
)
from research_env.info import SHOWS, batch_infos
from research_env.retrieval.batching import Found, QueryBatcher, SearchCounts, raise_bug
from research_env.sessions import Sessions
from research_env.spaces import UnicodeText

Mask = npt.NDArray[np.bool_]
Rewards = npt.NDArray[np.float64]


class StepResult(NamedTuple):
    """The result of a step of one sub-environment."""

    env_id: int
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class SearchQAVectorEnv(VectorEnv[tuple[str, ...], Sequence[Action], npt.NDArray[Any]]):
    """Many :class:`~research_env.env.SearchQAEnv` that share data, engine and searches.

    ``step`` plays in lockstep and asks the engine once for all sub-environments that search.
    ``send`` and ``recv`` (after EnvPool, Weng et al. 2022) let each go at its own pace: searches
    run in the background, in batches of bounded size and waiting time. In both ways a query that
    several ask at the same time is sent once, and the results are those of single environments.

    The arguments are those of the single environment and:

    - ``num_envs``: how many sub-environments.
    - ``autoreset_mode``: NextStep (default), SameStep, Disabled; see Gymnasium's AutoresetMode.
    - ``max_batch``, ``max_wait``, ``cache_size``: see :class:`~research_env.sessions.Sessions`. The
      first two are for searches in the background; the queries of a ``step`` are one batch.

    The seed draws one order of questions for all: without options sub-environment i plays the
    episodes i, i + num_envs, i + 2 num_envs, ... of that order, at whatever pace. A group of
    samples of one question is ``reset(options={"episodes": [n, n, n, ...]})``.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "shows": SHOWS}  # noqa: RUF012 (Gymnasium's own type)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = "NextStep",
        max_batch: int = 256,
        max_wait: float = 0.002,
        cache_size: int = 10_000,
        render_mode: str | None = None,
        **settings: Unpack[EnvSettings],
    ) -> None:
        """Make the sub-environments; see the class for the arguments.

        Raises:
            ResearchEnvError: a setting that cannot be used; the message says which and what to do.
        """
        self.closed = True  # until there is something to close
        modes = {mode.value: mode for mode in AutoresetMode}
        if autoreset_mode not in (*modes, *AutoresetMode):
            raise UnknownNameError("autoreset mode", autoreset_mode, modes)
        mode = AutoresetMode(autoreset_mode)
        if render_mode not in (None, "ansi"):
            raise UnknownNameError("render mode", render_mode, ["ansi"])
        if not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ConfigurationError(f"num_envs is an integer of at least 1, not {num_envs!r}")
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "autoreset_mode": mode}
        self._mode = mode
        self._sessions = Sessions(
            max_batch=max_batch, max_wait=max_wait, cache_size=cache_size, **settings
        )
        self._core = self._sessions.core
        self._searches: QueryBatcher[tuple[int, Episode, int]] = self._sessions.searches
        self.single_action_space = self._core.action_space()
        self.single_observation_space = UnicodeText()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._episodes: list[Episode | None] = [None] * num_envs
        self._rewards = [0.0] * num_envs  # what their last steps returned
        self._next = list(range(num_envs))  # the number of each one's next episode
        self._sent: set[int] = set()  # who sent an action and has not received its result
        self._found: dict[int, dict[int, Found]] = {}  # results of a part of an action's requests
        self._ready: list[StepResult] = []
        self.closed = False

    @property
    def num_tasks(self) -> int:
        """How many questions there are: episodes 0 to ``num_tasks - 1`` ask each once."""
        return len(self._core.questions)

    def fingerprints(self) -> dict[str, str]:
        """What results depend on besides the policy: fingerprints of questions, index, prompt."""
        return self._sessions.fingerprints()

    @property
    def search_counts(self) -> SearchCounts:
        """How many queries were asked so far, and how many of them the engine did not get."""
        return self._searches.counts

    @property
    def episodes(self) -> tuple[Episode | None, ...]:
        """The present episodes; None for a sub-environment that was never reset."""
        return tuple(self._episodes)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Start episodes in all sub-environments or in some.

        An action that was sent, and whose result was not yet received, is dropped.

        Args:
            seed: draws the order of the questions, the same for all sub-environments.
            options: ``{"episodes": [...]}``, num_envs numbers of episodes in that order, or
                ``{"question_ids": [...]}``, num_envs ids of questions; and
                ``{"reset_mask": [...]}``, num_envs booleans: which ones to reset.

        Returns:
            num_envs prompts, empty where a sub-environment was not reset, and the infos.

        Raises:
            ConfigurationError: an unknown option, one of the wrong length, no such question, or a
                seed that is not an integer from 0 on.
        """
        seed = reset_seed(self, seed)
        rest = dict(options or {})
        chosen = self._chosen(rest.pop("reset_mask", None))
        numbers, ids = rest.pop("episodes", None), rest.pop("question_ids", None)
        if rest:
            raise ConfigurationError(
                f"reset takes the options 'episodes' and 'reset_mask', not {sorted(rest)}; "
                "'question_ids' may take the place of 'episodes'"
            )
        if numbers is not None and ids is not None:
            raise ConfigurationError("reset takes one of 'episodes' and 'question_ids', not both")
        for name, entry, given in (("episodes", "number", numbers), ("question_ids", "name", ids)):
            count = 0 if isinstance(given, str) else _count(given)
            if given is not None and count != self.num_envs:
                raise ConfigurationError(
                    f"{name!r} has a {entry} for each of the {self.num_envs} sub-environments; "
                    f"{given!r:.80} has {count}"
                )
        # All are looked up before any begins: an error leaves the seed and every episode as it is.
        following = self._next if seed is None else list(range(self.num_envs))
        if ids is not None:
            indexes = {i: self._core.find_question(ids[i]) for i in chosen}
        else:
            order = int(self.np_random_seed or 0) if seed is None else seed
            drawn = following if numbers is None else numbers
            indexes = {i: self._core.draw_question(order, drawn[i]) for i in chosen}
            for i in chosen:
                following[i] = int(drawn[i]) + self.num_envs
        super().reset(seed=seed)
        self._next = following
        self._drop_sent(chosen)

        observations = [""] * self.num_envs
        infos = {}
        for i in chosen:
            observations[i], infos[i] = self._begin(i, indexes[i])
        return tuple(observations), batch_infos(infos, self.num_envs)

    def step(
        self, actions: Sequence[Action], mask: Mask | Sequence[bool] | None = None
    ) -> tuple[
        tuple[str, ...], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]
    ]:
        """Take an action of each sub-environment, with one search for all that search.

        Args:
            actions: one per sub-environment: a text, or what the protocol's tools take.
            mask: num_envs booleans: which sub-environments take a step; None: all. The others stay
                as they are, with an empty observation, reward 0 and no info.

        Returns:
            observations, rewards, terminations, truncations (num_envs each), infos.

        Raises:
            ActionError: an action is of a type that the protocol does not take; then no
                sub-environment has moved.
            EpisodeError: a sub-environment is not reset, is over (mode Disabled), or has sent.
            RewardError: a reward failed; then no sub-environment has moved.
            ClosedError: a search after ``close``.
        """
        if isinstance(actions, str) or _count(actions) != self.num_envs:
            raise ActionError(
                f"step takes {self.num_envs} texts, one per sub-environment, not {actions!r:.80}"
            )
        moved = {i: self._advance(i, actions[i]) for i in self._chosen(mask)}
        requests = [r for episode in moved.values() if episode for r in episode.pending_requests]
        found = iter(self._searches.ask(requests))
        for i, episode in moved.items():
            if episode is not None:
                moved[i] = resolve_search(episode, *islice(found, len(episode.pending_requests)))

        observations = [""] * self.num_envs
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        infos = {}
        for result in self._conclude(moved):
            i = result.env_id
            _, observations[i], rewards[i], terminations[i], truncations[i], infos[i] = result
        all_infos = batch_infos(infos, self.num_envs)
        return tuple(observations), rewards, terminations, truncations, all_infos

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        """Take actions of some sub-environments; their searches run in the background.

        Raises:
            ActionError: an action is of a type that the protocol does not take; then no
                sub-environment has moved.
            EpisodeError: as in ``step``.
            RewardError: as in ``step``.
            ClosedError: a search after ``close``; then no sub-environment has moved.
        """
        if isinstance(actions, str) or _count(env_ids) != _count(actions):
            raise ActionError(
                f"send takes a text for each of the {_count(env_ids)} ids, not {actions!r:.80}"
            )
        moved: dict[int, Episode | None] = {}
        for i, action in zip(env_ids, actions, strict=True):
            if i in moved:
                raise EpisodeError(f"sub-environment {i} is sent two actions at once")
            moved[int(i)] = self._advance(int(i), action)
        waiting = {i: each for i, each in moved.items() if each and each.pending is not None}
        if waiting and self._searches.closed:
            raise ClosedError
        self._ready += self._conclude({i: moved[i] for i in moved if i not in waiting})
        self._sent.update(moved)
        for i, episode in waiting.items():
            self._episodes[i] = episode
            for number, request in enumerate(episode.pending_requests):
                self._searches.submit((i, episode, number), request)

    def recv(self, timeout: float | None = None, min_results: int = 1) -> list[StepResult]:
        """All results that are ready, in the order in which they became ready.

        Args:
            timeout: seconds to wait for ``min_results``; None: as long as it takes.
            min_results: how many results to wait for; if fewer actions are sent, for all of these.

        Returns:
            Possibly more than ``min_results``; fewer if the time is up; none if nothing was sent.

        Raises:
            RewardError: a reward failed.
            ClosedError: the environment was closed before an action had its result.
            Exception: whatever a retriever raised that is no ``RetrievalError`` (a bug). After an
                error the action has no result; the results of other actions are kept.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if len(self._ready) >= min(min_results, len(self._sent)):
                wait: float | None = 0
            else:
                wait = None if deadline is None else max(0, deadline - time.monotonic())
            taken = self._searches.take(wait)
            if taken is None:
                break
            (i, asked, number), found = taken
            if i not in self._sent or self._episodes[i] is not asked:
                continue  # the action was dropped in the meantime
            held = self._found.setdefault(i, {})
            try:
                held[number] = raise_bug(found)
                if len(held) == len(asked.pending_requests):
                    answers = [held[n] for n in sorted(self._found.pop(i))]
                    self._ready += self._conclude({i: resolve_search(asked, *answers)})
            except BaseException:  # also Ctrl-C while a reward is computed
                self._drop_sent([i])
                raise
        results, self._ready = self._ready, []
        self._sent.difference_update(result.env_id for result in results)
        return results

    def truncate(
        self, env_ids: Sequence[int], reason: TruncationReason = "length"
    ) -> list[StepResult]:
        """End episodes from outside, because their budgets of tokens are spent.

        An action that was sent, and whose result was not yet received, is dropped.

        Args:
            env_ids: the sub-environments whose episodes end.
            reason: becomes the ``stop_reason`` of their infos.

        Returns:
            A result each, in order, with the reward and metrics of all that the policy wrote.

        Raises:
            EpisodeError: a sub-environment is not reset, is named twice, or its episode is over;
                then no other has changed either.
            RewardError: as in ``step``.
        """
        truncated: dict[int, Episode | None] = {}
        for i in map(int, env_ids):
            if i in truncated:
                raise EpisodeError(f"sub-environment {i} is named twice; truncate it once")
            if any(
                each.env_id == i and (each.terminated or each.truncated) for each in self._ready
            ):
                raise EpisodeError(f"sub-environment {i} has ended its episode; call recv first")
            truncated[i] = truncate(self._episode(i), reason)
        results = self._conclude(truncated)
        self._drop_sent(truncated)
        return results

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """Let the targets continue from the source's present state; the source stays as it is.

        An episode is immutable, so nothing is copied.

        Args:
            source: a sub-environment in the middle of its episode.
            targets: other sub-environments; their own episodes, and what they sent, are dropped.

        Raises:
            EpisodeError: the source is not reset, is over, or has sent an action; or there is no
                such target. Then nothing has changed.
        """
        episode = self._episode(source)
        if episode.over:
            raise EpisodeError(f"sub-environment {source} cannot branch: its episode is over")
        if source in self._sent:
            raise EpisodeError(f"sub-environment {source} has sent an action; call recv first")
        others = {self._check_id(int(i)) for i in targets} - {source}
        self._drop_sent(others)
        for i in others:
            self._episodes[i] = episode

    def render(self) -> tuple[str, ...] | None:
        """The transcripts so far in mode ``ansi``."""
        if self.render_mode != "ansi":
            return None
        return tuple(
            self._core.transcript(each, reward) if each else ""
            for each, reward in zip(self._episodes, self._rewards, strict=True)
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the background searches and release the search engine."""
        self._sessions.close()

    def _chosen(self, mask: Mask | Sequence[bool] | None) -> list[int]:
        """The numbers of the sub-environments that a mask chooses."""
        if mask is None:
            return list(range(self.num_envs))
        if _count(mask) != self.num_envs:
            raise ConfigurationError(
                f"a mask has a boolean for each of the {self.num_envs} sub-environments; "
                f"{mask!r:.80} has {_count(mask)}"
            )
        return [i for i, chosen in enumerate(mask) if chosen]

    def _begin(self, i: int, index: int | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode of the question with this index, or the next one of the order."""
        if index is None:
            index = self._core.draw_question(int(self.np_random_seed or 0), self._next[i])
            self._next[i] += self.num_envs
        self._episodes[i], observation, info = self._core.start(index)
        return observation, info

    def _drop_sent(self, env_ids: Collection[int]) -> None:
        """Forget the actions that these sub-environments sent, and their results."""
        self._sent.difference_update(env_ids)
        self._ready = [result for result in self._ready if result.env_id not in env_ids]
        for i in env_ids:
            self._found.pop(i, None)

    def _check_id(self, i: int) -> int:
        if not 0 <= i < self.num_envs:
            raise EpisodeError(f"there is no sub-environment {i}, only 0 to {self.num_envs - 1}")
        return i

    def _episode(self, i: int) -> Episode:
        episode = self._episodes[self._check_id(i)]
        if episode is None:
            raise EpisodeError(f"sub-environment {i} has no episode yet; call reset first")
        return episode

    def _advance(self, i: int, action: Action) -> Episode | None:
        """The episode after an action; None if it was over, and the action resets it instead."""
        episode = self._episode(i)
        if i in self._sent:
            raise EpisodeError(f"sub-environment {i} has sent an action; call recv first")
        if episode.over and self._mode is AutoresetMode.NEXT_STEP:
            return None
        return advance(episode, action)

    def _conclude(self, episodes: Mapping[int, Episode | None]) -> list[StepResult]:
        """The results of steps to these episodes, with the resets that may belong to them.

        All rewards are computed first: if one fails, no sub-environment has moved.
        """
        outputs = {i: self._core.output(each) for i, each in episodes.items() if each}
        return [self._move(i, each, outputs.get(i)) for i, each in episodes.items()]

    def _move(self, i: int, episode: Episode | None, output: StepOutput | None) -> StepResult:
        if episode is None or output is None:
            observation, info = self._begin(i)
            return StepResult(i, observation, 0.0, False, False, info)
        self._episodes[i], self._rewards[i] = episode, output.reward
        if not episode.over or self._mode is not AutoresetMode.SAME_STEP:
            return StepResult(i, *output)
        observation, info = self._begin(i)
        info |= {"final_obs": output.observation, "final_info": output.info}
        return StepResult(i, observation, output.reward, output.terminated, output.truncated, info)


def _count(values: object) -> int:
    """How many values there are; 0 if it has no length."""
    return len(values) if isinstance(values, Sized) else 0
