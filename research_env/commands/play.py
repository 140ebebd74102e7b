"""The command ``research-env play``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, TextIO

from tyro.conf import Positional, arg

from research_env.commands.shared import parse_env_args
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.system.terminal import show


@dataclass(frozen=True)
class Play:
    r"""Play an episode by hand: you are the policy.

    Write an action after the prompt, and read the observation. An action ends with a line that
    contains a mark such as </search>, with an empty line, or with the end of the input.

    For example:
      research-env play ReSearch-MiniWorld-v0
      research-env play ReSearch-MuSiQue-v0 --env-args split=dev protocol=search-r1 --episode 3
      printf '<search>Citibank</search>\n<answer>\\boxed{1812}</answer>\n' |
        research-env play ReSearch-MuSiQue-v0
    """

    id: Positional[Annotated[str, arg(metavar="ID")]]
    """Id of the environment, for example ReSearch-MiniWorld-v0."""
    env_args: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Arguments of the environment, for example split=dev top_k=3 hops=2."""
    seed: int = 0
    """Seed of the order of the questions."""
    episode: int = 0
    """The number of the question in that order."""

    def run(self) -> None:
        """Carry the command out."""
        import gymnasium as gym  # noqa: PLC0415

        import research_env  # noqa: F401, PLC0415  (registers the ids)
        from research_env.registration import IDS  # noqa: PLC0415
        from research_env.spaces import UnicodeText  # noqa: PLC0415

        try:
            env: gym.Env[str, str] = gym.make(self.id, **parse_env_args(self.env_args))
        except gym.error.UnregisteredEnv:
            name = self.id.rpartition(":")[2]
            raise UnknownNameError("environment", name, IDS) from None
        except (gym.error.Error, ImportError) as error:
            raise ConfigurationError(f"{self.id!r} is no environment: {error}") from error
        except TypeError as error:  # an argument that the environment does not have
            raise ConfigurationError(f"--env-args: {error}") from error
        if not isinstance(env.observation_space, UnicodeText):
            raise UnknownNameError("text environment", self.id, IDS)
        terminators = tuple(getattr(env.action_space, "terminators", ()))
        try:
            observation, _ = env.reset(seed=self.seed, options={"episode": self.episode})
            show(observation)
            if sys.stdin.isatty():
                show(f"[an action ends with {' '.join(terminators)} or an empty line]")
            for action in _actions(sys.stdin, terminators):
                observation, reward, terminated, truncated, info = env.step(action)
                show(observation)
                if terminated or truncated:
                    show(f"reward {float(reward):g}")
                    told = ("stop_reason", "prediction", "answers", "metrics")
                    show("\n".join(f"{key}: {info[key]}" for key in told if key in info))
                    return
            show("[the input ended before the episode did]")
        finally:
            env.close()


def _actions(lines: TextIO, terminators: Sequence[str]) -> Iterator[str]:
    """Gather lines into actions: each ends with a terminator, or with an empty line.

    Raises:
        ConfigurationError: the input is no text.
    """
    written: list[str] = []
    try:
        for line in lines:
            if line.strip():
                written.append(line)
            if written and (not line.strip() or any(mark in line for mark in terminators)):
                yield "".join(written).removesuffix("\n")
                written.clear()
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the input is no {error.encoding} text: {error}") from None
    if written:
        yield "".join(written).removesuffix("\n")
