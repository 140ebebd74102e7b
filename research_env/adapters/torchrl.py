r"""TorchRL: environments over shared sessions, for rollouts, collectors and environment pools.

Example:
    >>> from research_env.adapters.torchrl import make_env
    >>> from research_env.sessions import Sessions
    >>> sessions = Sessions(dataset="miniworld", template="question")
    >>> env = make_env(sessions, seed=7)
    >>> def policy(td):
    ...     return td.set("action", "<answer> \\boxed{?} </answer>")
    >>> data = env.rollout(4, policy)
    >>> data["observation"][0] == sessions.tasks(seed=7)[0]["prompt"]
    True
    >>> data["next", "terminated"].tolist(), data["next", "metrics", "em"].tolist()
    ([[True]], [[0.0]])
    >>> sessions.close()
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from research_env.adapters import require
from research_env.adapters.task_order import TaskOrder
from research_env.core import StepOutput
from research_env.errors import ConfigurationError
from research_env.sessions import Sessions
from research_env.spaces import UnicodeText

require("torchrl", "0.14", "torchrl")

from tensordict import TensorDictBase  # noqa: E402
from torchrl.data import Binary, Composite, NonTensor, Unbounded  # noqa: E402
from torchrl.envs import GymWrapper  # noqa: E402
from torchrl.envs.gym_like import BaseInfoDictReader  # noqa: E402
from torchrl.envs.libs.gym import register_gym_spec_conversion  # noqa: E402


class SessionEnv(gym.Env[str, str]):
    """A Gymnasium environment over sessions; :func:`make_env` wraps it.

    Its searches share calls of the engine with those of all environments of the same sessions.
    """

    def __init__(self, sessions: Sessions, seed: int = 0) -> None:
        """Take the sessions, and the seed that draws the order of tasks."""
        self.action_space = UnicodeText(terminators=sessions.terminators)
        self.observation_space = UnicodeText()
        self._order = TaskOrder(sessions, seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Open the next task, or that of ``options={"question_id": ...}``.

        Raises:
            ConfigurationError: another option.
            UnknownTaskError: no task has this id.
        """
        rest = dict(options or {})
        question_id = rest.pop("question_id", None)
        if rest:
            raise ConfigurationError(f"reset takes the option 'question_id', not {sorted(rest)}")
        session = self._order.open(seed, question_id)
        return session.prompt, session.info

    def step(self, action: str) -> StepOutput:
        """Take what the policy wrote.

        Raises:
            EpisodeError: before ``reset`` or after the end.
        """
        return self._order.session.step(action)

    def truncate(self) -> StepOutput:
        """End the episode because the trainer's budget of tokens is spent; it is scored."""
        return self._order.session.truncate("length")


class InfoReader(BaseInfoDictReader):  # type: ignore[misc]
    """Puts ``question_id``, ``void`` and every metric into the TensorDict; 0 before the end."""

    def __init__(self, sessions: Sessions) -> None:
        """Take the names of the metrics from an episode of the sessions."""
        super().__init__()
        names = sessions.open(0).truncate().info["metrics"]
        self._spec = Composite(
            metrics=Composite({name: Unbounded(shape=(1,)) for name in names}),
            question_id=NonTensor(shape=(), example_data=""),
            void=Binary(n=1),
        )
        self._zero = self._spec.zero()

    @property
    def info_spec(self) -> Composite:
        """The specs of the entries."""
        return self._spec

    def __call__(self, info: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        """Write the entries of an info; TorchRL calls this after every reset and step."""
        entries = self._zero.clone()
        for name, value in info["metrics"].items():
            entries["metrics", name].fill_(value)
        entries["void"].fill_(info["void"])
        return tensordict.update(entries).set_non_tensor("question_id", info["question_id"])


@register_gym_spec_conversion(UnicodeText)  # type: ignore[untyped-decorator]
def _convert(spec: UnicodeText, dtype: Any = None, device: Any = None, **_: Any) -> NonTensor:
    return NonTensor(shape=(), device=device, example_data="")


def make_env(sessions: Sessions, seed: int = 0) -> GymWrapper:
    """An environment of TorchRL; make as many as you like over the same sessions.

    Args:
        sessions: tasks, rules, engine and reward.
        seed: draws the order of tasks; ``reset(options={"question_id": id})`` names one.

    Returns:
        A ``GymWrapper``: texts under ``observation`` and ``action``, and ``reward``,
        ``terminated``, ``truncated``, ``void``, ``question_id``, ``("metrics", name)``.
        ``env.truncate()`` ends an episode whose budget is spent, and returns what ``step`` of
        Gymnasium returns.
    """
    return GymWrapper(SessionEnv(sessions, seed)).set_info_dict_reader(InfoReader(sessions))
