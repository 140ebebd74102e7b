"""The environment for many episodes at a time: in lockstep, or each at its own pace."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from research_env.core import EnvSettings, resolve_search
from research_env.episode import Action, CutReason, Episode, advance, truncate
from research_env.errors import (
    ActionError,
    ConfigurationError,
    EpisodeError,
    RetrievalError,
    UnknownNameError,
)
from research_env.info import SHOWS
from research_env.retrieval.batching import Found, QueryBatcher, SearchCounts
from research_env.sessions import Sessions
from research_env.spaces import UnicodeText

_NUMBERS = (int, float, bool)
Mask = npt.NDArray[np.bool_]
Rewards = npt.NDArray[np.float64]


class StepResult(NamedTuple):
    """What ``step`` would return, for one sub-environment."""

    env_id: int
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class SearchQAVectorEnv(VectorEnv[tuple[str, ...], Sequence[Action], npt.NDArray[Any]]):
    """Many :class:`~research_env.env.SearchQAEnv` that share data, engine and searches.

    ``step`` plays in lockstep and asks the engine once for all sub-environments that search.
    ``send`` and ``recv`` (after EnvPool, Weng et al. 2022) let each go at its own pace: the
    searches run in the background, the same query of several is asked once, and batches are
    bounded in size and waiting time. Either way the results are those of single environments.

    The arguments are those of the single environment and:

    - ``num_envs``: how many sub-environments.
    - ``autoreset_mode``: NextStep (default), SameStep, Disabled; see Gymnasium's AutoresetMode.
    - ``max_batch``: the most queries of a search in the background; those of a ``step`` go to the
      engine together, which divides them as it needs.
    - ``max_wait``: seconds that a batch of queries in the background waits for one more to join it.
    - ``cache_size``: how many queries' hits are cached at most; 0: none. Failures are never cached.
      ``search_counts`` tells what that saved.

    One seed, one order of questions for all: without options sub-environment i asks the episodes
    i, i + num_envs, i + 2 num_envs, ... of that order, whatever the pace of each. A group of
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
        counts = (num_envs, max_batch)
        whole = all(isinstance(count, int | np.integer) and count >= 1 for count in counts)
        if not whole or not isinstance(max_wait, int | float) or not max_wait >= 0:
            raise ConfigurationError(
                f"num_envs and max_batch are integers of at least 1, max_wait is at least 0, not "
                f"{num_envs!r}, {max_batch!r} and {max_wait!r}"
            )
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "autoreset_mode": mode}
        self._mode = mode
        self._sessions = Sessions(
            max_batch=int(max_batch), max_wait=max_wait, cache_size=cache_size, **settings
        )
        self._core = self._sessions.core
        self._searches: QueryBatcher[tuple[int, Episode, int]] = self._sessions.searches
        self.single_action_space = self._core.action_space()
        self.single_observation_space = UnicodeText()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._episodes: list[Episode | None] = [None] * num_envs
        self._next = list(range(num_envs))
        self._ready: list[StepResult] = []
        self._sent: set[int] = set()
        self._found: dict[int, dict[int, Found]] = {}  # for some of the queries of an action
        self.closed = False

    @property
    def num_tasks(self) -> int:
        """How many questions there are: episodes 0 to ``num_tasks - 1`` ask each once."""
        return len(self._core.questions)

    def provenance(self) -> dict[str, str]:
        """What results depend on besides the policy: fingerprints of questions, index, prompt."""
        return self._sessions.provenance()

    @property
    def search_counts(self) -> SearchCounts:
        """How many queries were asked so far, and how many of them the engine was spared."""
        return self._searches.counts

    @property
    def episodes(self) -> tuple[Episode | None, ...]:
        """The episodes as they stand; None before a first reset."""
        return tuple(self._episodes)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Start episodes, of all sub-environments or of some.

        What a sub-environment had sent and not yet received is dropped.

        Args:
            seed: draws the order of the questions, for all sub-environments alike.
            options: ``{"episodes": [...]}``, the number of each one's episode in that order, or
                ``{"question_ids": [...]}``, the id of each one's question; and
                ``{"reset_mask": [...]}``, which of them to reset (num_envs booleans).

        Returns:
            The prompts, empty where a sub-environment was not reset, and the infos.

        Raises:
            ConfigurationError: an unknown option, or one of the wrong length.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._next = list(range(self.num_envs))
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
        indexes = {i: self._core.find_question(ids[i]) for i in chosen} if ids is not None else {}
        self._drop_sent(chosen)

        observations = [""] * self.num_envs
        infos = {}
        for i in chosen:
            number = self._next[i] if numbers is None else numbers[i]
            observations[i], infos[i] = self._begin(i, number, indexes.get(i))
        return tuple(observations), batched_infos(infos, self.num_envs)

    def step(
        self, actions: Sequence[Action], mask: Mask | Sequence[bool] | None = None
    ) -> tuple[
        tuple[str, ...], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]
    ]:
        """Take an action of each sub-environment, with one search for all that search.

        Args:
            actions: num_envs texts.
            mask: the sub-environments that take theirs (num_envs booleans; None: all). The others
                stay as they are: an empty observation, reward 0, no info.

        Returns:
            observations, rewards, terminations, truncations (num_envs each), infos.

        Raises:
            ActionError: an action is not a string; then no sub-environment has moved.
            EpisodeError: a sub-environment is not reset, is over (mode Disabled), or has sent.
        """
        if isinstance(actions, str) or _count(actions) != self.num_envs:
            raise ActionError(
                f"step takes {self.num_envs} texts, one a sub-environment, not {actions!r:.80}"
            )
        moved = {i: self._advance(i, actions[i]) for i in self._chosen(mask)}
        asked = [(i, query) for i, each in moved.items() if each for query in each.pending_requests]
        found: dict[int, list[Found]] = {}
        for (i, _), hits in zip(asked, self._searches.ask([q for _, q in asked]), strict=True):
            found.setdefault(i, []).append(hits)

        observations = [""] * self.num_envs
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        infos = {}
        for i, episode in moved.items():
            settled = resolve_search(episode, *found.get(i, ())) if episode else None
            result = self._conclude(i, settled)
            _, observations[i], rewards[i], terminations[i], truncations[i], infos[i] = result
        together = batched_infos(infos, self.num_envs)
        return tuple(observations), rewards, terminations, truncations, together

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        """Take actions of some sub-environments; their searches run in the background.

        Raises:
            ActionError: an action is not a string; then no sub-environment has moved.
            EpisodeError: as in ``step``.
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
        for i, episode in moved.items():
            self._sent.add(i)
            if episode is None or episode.pending is None:
                self._ready.append(self._conclude(i, episode))
                continue
            self._episodes[i] = episode
            for number, query in enumerate(episode.pending_requests):
                self._searches.submit((i, episode, number), query)

    def recv(self, timeout: float | None = None, min_results: int = 1) -> list[StepResult]:
        """The results that are ready, in the order in which they became so.

        Args:
            timeout: seconds to wait for ``min_results`` of them; None: as long as it takes.
            min_results: how many to wait for (all that were sent, where that is fewer).

        Returns:
            Perhaps more than asked for; fewer when time is up; none when nothing was sent.
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
            if self._episodes[i] is not asked:
                continue  # it was reset in the meantime
            if isinstance(found, Exception) and not isinstance(found, RetrievalError):
                self._drop_sent([i])
                raise found
            held = self._found.setdefault(i, {})
            held[number] = found
            if len(held) == len(asked.pending_requests):
                answers = [held[n] for n in sorted(self._found.pop(i))]
                self._ready.append(self._conclude(i, resolve_search(asked, *answers)))
        results, self._ready = self._ready, []
        self._sent.difference_update(result.env_id for result in results)
        return results

    def truncate(self, env_ids: Sequence[int], reason: CutReason = "length") -> list[StepResult]:
        """End episodes from outside, because their budgets of tokens are spent.

        What a sub-environment had sent and not yet received is dropped.

        Args:
            env_ids: whose episodes.
            reason: becomes the ``stop_reason`` of their infos.

        Returns:
            A result each, in order, with the reward and metrics of all that the policy wrote.

        Raises:
            EpisodeError: a sub-environment is not reset, or its episode is over; then no other
                has changed either.
        """
        cut = {int(i): truncate(self._episode(int(i)), reason) for i in env_ids}
        self._drop_sent(cut)
        return [self._conclude(i, episode) for i, episode in cut.items()]

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """Let the targets continue from the source's present state; the source stays as it is.

        An episode is immutable, so this copies nothing. What a target had sent and not yet received
        is dropped.

        Args:
            source: a sub-environment in the middle of its episode.
            targets: other sub-environments; whatever they were playing is dropped.

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
        return tuple(self._core.transcript(each) if each else "" for each in self._episodes)

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the background searches and release the search engine."""
        self._sessions.close()

    def _chosen(self, mask: Mask | Sequence[bool] | None) -> list[int]:
        if mask is None:
            return list(range(self.num_envs))
        if _count(mask) != self.num_envs:
            raise ConfigurationError(
                f"a mask has a boolean for each of the {self.num_envs} sub-environments; "
                f"{mask!r:.80} has {_count(mask)}"
            )
        return [i for i, chosen in enumerate(mask) if chosen]

    def _begin(self, i: int, number: int, index: int | None = None) -> tuple[str, dict[str, Any]]:
        """Start the numbered episode, or one of the question with this index."""
        if index is None:
            index = self._core.draw_question(int(self.np_random_seed or 0), number)
            self._next[i] = int(number) + self.num_envs
        self._episodes[i], observation, info = self._core.start(index)
        return observation, info

    def _drop_sent(self, env_ids: Collection[int]) -> None:
        """Forget what these sub-environments have sent and not yet received."""
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
        """The episode after an action; None: it was over, and the action is spent on a reset."""
        episode = self._episode(i)
        if i in self._sent:
            raise EpisodeError(f"sub-environment {i} has sent an action; call recv first")
        if episode.over and self._mode is AutoresetMode.NEXT_STEP:
            return None
        return advance(episode, action)

    def _conclude(self, i: int, episode: Episode | None) -> StepResult:
        if episode is None:
            observation, info = self._begin(i, self._next[i])
            return StepResult(i, observation, 0.0, False, False, info)
        self._episodes[i] = episode
        output = self._core.output(episode)
        if not episode.over or self._mode is not AutoresetMode.SAME_STEP:
            return StepResult(i, *output)
        observation, info = self._begin(i, self._next[i])
        info |= {"final_obs": output.observation, "final_info": output.info}
        return StepResult(i, observation, output.reward, output.terminated, output.truncated, info)


def _count(values: object) -> int:
    """How many values there are; 0 where it is no sequence."""
    return len(values) if isinstance(values, Sized) else 0


def batched_infos(infos: Mapping[int, Mapping[str, Any]], num_envs: int) -> dict[str, Any]:
    """Merge the infos of sub-environments into one.

    The same as Gymnasium's ``VectorEnv._add_info`` makes of them one after the other, in a quarter
    of its time: an array a key, with zero or None where a sub-environment has it not, and under
    ``_key`` which have it; of dictionaries, and theirs, such a dictionary.

    Args:
        infos: by the number of the sub-environment, from 0.
        num_envs: how many sub-environments there are.
    """
    columns: dict[str, dict[int, Any]] = {}
    for i, info in infos.items():
        for key, value in info.items():
            if key in columns:
                columns[key][i] = value
            else:
                columns[key] = {i: value}
    batched: dict[str, Any] = {}
    for key, column in columns.items():
        mask = np.zeros(num_envs, dtype=np.bool_)
        mask[list(column)] = True
        batched[key], batched[f"_{key}"] = _array(column, num_envs), mask
    return batched


def _array(column: Mapping[int, Any], num_envs: int) -> Any:
    """The values of a key; their type is that of the first."""
    first = next(iter(column.values()))
    if isinstance(first, dict):
        return batched_infos(column, num_envs)
    array: npt.NDArray[Any]
    if type(first) in _NUMBERS or isinstance(first, np.number):
        array = np.zeros(num_envs, dtype=type(first))
    elif isinstance(first, np.ndarray):
        array = np.zeros((num_envs, *first.shape), dtype=first.dtype)
    else:
        array = np.full(num_envs, None, dtype=object)
    for i, value in column.items():
        array[i] = value
    return array
