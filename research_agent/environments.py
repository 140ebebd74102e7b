"""Many episodes at once, of any Gymnasium environment that speaks text.

An environment that registers a vector environment with ``send`` and ``recv`` is used through it.
Any other is made as many times as there are episodes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from research_agent.errors import ConfigError, EnvironmentContractError, ResearchAgentError
from research_agent.system.imports import import_setting

Action = str | Mapping[str, Any]
"""A text, or an assistant message with tool calls for environments that list tools."""


class StepResult(NamedTuple):
    """What ``step`` returned, and in which environment."""

    env_id: int
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


class Environments(Protocol):
    """``num_envs`` environments, each at its own pace."""

    num_envs: int
    num_tasks: int | None  # distinct tasks: episodes 0 .. num_tasks - 1; None: without end
    terminators: tuple[str, ...]  # strings after which generation pauses

    def reset(
        self, assignments: Mapping[int, int], seed: int
    ) -> dict[int, tuple[str, Mapping[str, Any]]]:
        """Begin episodes. The same seed and episode number are the same task in any slot.

        Args:
            assignments: index of an environment to the number of its next episode.
            seed: the run's.

        Returns:
            Index of an environment to its first observation and info.
        """
        ...

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        """Take actions; their results come from ``recv``."""
        ...

    def recv(self, min_results: int) -> list[StepResult]:
        """Wait for at least this many results (0: do not wait); returns all that are ready."""
        ...

    def close(self) -> None:
        """Release what the environments hold."""
        ...


@runtime_checkable
class Truncating(Protocol):
    """Environments that may score an episode which the trainer cuts."""

    def truncate(self, env_id: int) -> StepResult | None:
        """End an episode whose budget of tokens is spent; None if the environment has no way to."""
        ...


def make_environments(
    env_id: str, num_envs: int, env_args: Mapping[str, Any] | None = None
) -> Environments:
    """Make environments by their Gymnasium id.

    Args:
        env_id: such as ``"package:Name-v0"``; the module before the colon is imported first.
        num_envs: how many.
        env_args: arguments of each.

    Raises:
        ConfigError: no such module or id, or the environment refuses its arguments.
        EnvironmentContractError: the environment does not speak text, or begins the next episode in
            the step that ends one.
    """
    module, colon, name = env_id.rpartition(":")
    try:
        if colon:
            import_setting(module)
        spec = gym.spec(name)
    except (ImportError, gym.error.Error) as error:
        raise ConfigError(
            f"no environment {env_id!r}: {error}; "
            "write MODULE:ID, where importing the module registers the id, for example "
            "research_env:ReSearch-MiniWorld-v0"
        ) from error
    args = dict(env_args or {})
    try:
        return _make(spec, num_envs, args)
    except ResearchAgentError:
        raise
    except Exception as error:  # the environment's own kinds of errors, which nobody here knows
        given = " ".join(f"{key}={value}" for key, value in args.items()) or "no arguments"
        raise ConfigError(f"cannot make {env_id} with {given}: {error}") from error


def _make(spec: EnvSpec, num_envs: int, args: dict[str, Any]) -> Environments:
    if spec.vector_entry_point is not None:
        vector = gym.make_vec(
            spec.id, num_envs=num_envs, vectorization_mode="vector_entry_point", **args
        )
        if hasattr(vector, "send") and hasattr(vector, "recv"):
            mode = (getattr(vector, "metadata", None) or {}).get("autoreset_mode")
            if mode == AutoresetMode.SAME_STEP:  # its infos are the next episode's
                vector.close()
                raise EnvironmentContractError(
                    f"the environment {spec.id} has the autoreset mode {mode.value}, which begins "
                    "the next episode in the step that ends one; make it in the mode "
                    f"{AutoresetMode.NEXT_STEP.value}"
                )
            return _Native(vector)
        vector.close()
    return _Singles([gym.make(spec.id, disable_env_checker=True, **args) for _ in range(num_envs)])


class _Native:
    """A vector environment with ``send`` and ``recv``."""

    def __init__(self, vector: Any) -> None:
        self._vector = vector
        self.num_envs = int(vector.num_envs)
        self.num_tasks: int | None = getattr(vector, "num_tasks", None)
        self.terminators = _terminators(vector.single_action_space)
        self.shows = read_shows(vector)
        self.branches = hasattr(vector, "branch")  # whether episodes can be branched

    def reset(
        self, assignments: Mapping[int, int], seed: int
    ) -> dict[int, tuple[str, Mapping[str, Any]]]:
        mask = np.zeros(self.num_envs, dtype=np.bool_)
        mask[list(assignments)] = True
        episodes = [0] * self.num_envs
        for i, episode in assignments.items():
            episodes[i] = episode
        observations, infos = self._vector.reset(
            seed=seed, options={"episodes": episodes, "reset_mask": mask}
        )
        return {i: (_text(observations[i]), _sub_info(infos, i)) for i in assignments}

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        self._vector.send(env_ids, actions)

    def recv(self, min_results: int) -> list[StepResult]:
        timeout = None if min_results else 0
        received = self._vector.recv(timeout=timeout, min_results=min_results)
        return [_step_result(result[0], result[1:]) for result in received]

    def truncate(self, env_id: int) -> StepResult | None:
        if not hasattr(self._vector, "truncate"):
            return None
        (result,) = self._vector.truncate([env_id], "length")
        return _step_result(env_id, result[1:])

    def branch(self, source: int, targets: Sequence[int]) -> None:
        self._vector.branch(source, targets)

    def close(self) -> None:
        self._vector.close()

    def fingerprints(self) -> dict[str, str]:
        return read_fingerprints(self._vector)


class _Singles:
    """Environments of ``gym.make``, stepped one after the other."""

    def __init__(self, envs: Sequence[gym.Env[Any, Any]]) -> None:
        self._envs = envs
        self._ready: list[StepResult] = []
        self.num_envs = len(envs)
        self.num_tasks: int | None = getattr(envs[0].unwrapped, "num_tasks", None)
        self.terminators = _terminators(envs[0].action_space)
        self.shows = read_shows(envs[0].unwrapped)

    def reset(
        self, assignments: Mapping[int, int], seed: int
    ) -> dict[int, tuple[str, Mapping[str, Any]]]:
        self._ready = [result for result in self._ready if result.env_id not in assignments]
        started: dict[int, tuple[str, Mapping[str, Any]]] = {}
        for i, episode in assignments.items():
            # With num_tasks the option names the task and the seed orders the tasks. Any other
            # environment may not know the option, so its seed depends on the episode too.
            own = seed
            if self.num_tasks is None:
                own = int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])
            observation, info = self._envs[i].reset(seed=own, options={"episode": episode})
            started[i] = (_text(observation), info)
        return started

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        for i, action in zip(env_ids, actions, strict=True):
            self._ready.append(_step_result(i, self._envs[i].step(action)))

    def recv(self, min_results: int) -> list[StepResult]:
        results, self._ready = self._ready, []
        return results

    def truncate(self, env_id: int) -> StepResult | None:
        env = self._envs[env_id]
        if not env.has_wrapper_attr("truncate"):
            return None
        return _step_result(env_id, env.get_wrapper_attr("truncate")("length"))

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def fingerprints(self) -> dict[str, str]:
        return read_fingerprints(self._envs[0].unwrapped)


def read_fingerprints(environment: Any) -> dict[str, str]:
    """What an environment says that its episodes depend on; empty if it says nothing."""
    found = getattr(environment, "fingerprints", None)
    if callable(found):
        found = found()
    return {str(key): str(value) for key, value in (found or {}).items()}


def read_shows(environment: Any) -> dict[str, str]:
    """Read ``metadata["shows"]``: where the infos have the items that an observation shows.

    Returns:
        The entries that ``research_agent/README.md`` lists under "What reports show"; empty if the
        environment has none.
    """
    shows = (getattr(environment, "metadata", None) or {}).get("shows") or {}
    return {str(key): str(value) for key, value in shows.items()}


def _terminators(space: Any) -> tuple[str, ...]:
    return tuple(getattr(space, "terminators", ()))


def _text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise EnvironmentContractError(
            f"the environment observes {type(observation).__name__} ({observation!r:.60}), not "
            "text; only environments whose observations and actions are strings can be played"
        )
    return observation


def _step_result(env_id: int, step: Any) -> StepResult:
    """Check what ``step`` returned, and convert numpy's numbers to Python's.

    Raises:
        EnvironmentContractError: it is not observation, reward, terminated, truncated and info.
    """
    if not isinstance(step, tuple | list) or len(step) != 5:
        raise EnvironmentContractError(
            f"the environment's step returns {step!r:.60}; return "
            "observation, reward, terminated, truncated and info"
        )
    observation, reward, terminated, truncated, info = step
    if not isinstance(info, Mapping):
        raise EnvironmentContractError(f"the environment's info is {info!r:.60}; return a dict")
    return StepResult(
        env_id=int(env_id),
        observation=_text(observation),
        reward=read_number(reward, "reward"),
        terminated=bool(terminated),
        truncated=bool(truncated),
        info=info,
    )


def read_number(value: Any, name: str) -> float:
    """Read a number that an environment returned.

    Raises:
        EnvironmentContractError: it is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise EnvironmentContractError(
            f"the environment's {name} is {value!r:.60}; return a number"
        ) from error


def _sub_info(infos: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return the info of sub-environment ``i`` from a vector environment's infos."""
    return {
        key: _sub_info(value, i) if isinstance(value, Mapping) else value[i]
        for key, value in infos.items()
        if not key.startswith("_") and (f"_{key}" not in infos or infos[f"_{key}"][i])
    }
