"""The player of a rank: its engine, its environments, and the episodes under way.

With ``max_staleness`` 0 the trainer has a player in its own process. Above 0 the player lives in a
child process (``player_process``) and continues to play while the learner updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_agent import rollout_state
from research_agent.active_rollout import EpisodeKey, InFlight
from research_agent.config import TrainConfig
from research_agent.distributed import consumed_together
from research_agent.engines.base import Engine
from research_agent.environments import Environments, make_environments, read_fingerprints
from research_agent.renderer import Renderer
from research_agent.rollout import RolloutLoop, collect, keeps_turns
from research_agent.trace import Trace, TracedEngine, TracedEnvironments
from research_agent.trajectory import Trajectory
from research_agent.weight_files import read_weights

if TYPE_CHECKING:
    from torch import Tensor


class Player:
    """Plays a rank's episodes of training and evaluation.

    Args:
        config: the run's configuration.
        slots: episodes played at the same time.
        stage_args: environment arguments that the run's present stage adds.
        trace: takes the events of engine and environments.

    Raises:
        ConfigError: the environment does not exist, or refuses its arguments.
    """

    def __init__(
        self,
        config: TrainConfig,
        slots: int,
        stage_args: Mapping[str, Any],
        trace: Trace | None = None,
    ) -> None:
        self._config = config
        self._slots = slots
        self._trace = trace
        self._stack = ExitStack()
        self._stage = self._stack.enter_context(ExitStack())  # closes the stage's environments
        self._started = False
        self._environments = self._open(stage_args)
        self._eval_environments: Environments | None = None
        if config.run.eval_every:
            eval_args = {**config.environment.env_args, **config.run.eval_args}
            self._eval_environments = make_environments(config.environment.env, slots, eval_args)
            self._stack.callback(self._eval_environments.close)

    def start(self, load: Callable[[], tuple[Engine, Renderer]]) -> None:
        """Make the engine and the renderer; nothing can be played before."""
        engine, self._renderer = load()
        self._stack.callback(getattr(engine, "close", lambda: None))
        self._engine = TracedEngine(engine, self._trace) if self._trace else engine
        self._loop = self._make_loop(InFlight())
        self._started = True

    def fingerprints(self) -> dict[str, str]:
        """What the episodes depend on, as the environment says; without its ``place:`` names."""
        found = read_fingerprints(self._environments)
        return {name: text for name, text in found.items() if not name.startswith("place:")}

    def collect(
        self, episodes: Sequence[EpisodeKey], ahead: Sequence[EpisodeKey]
    ) -> list[Trajectory]:
        """Play episodes to their ends.

        Args:
            episodes: the episodes that the present step learns from.
            ahead: episodes of later steps, which begin in slots that would be empty otherwise.

        Returns:
            The trajectories in the order of ``episodes``.
        """
        self._loop.enqueue([*episodes, *ahead])
        return self._loop.finish(episodes)

    @property
    def has_work(self) -> bool:
        """Whether any episode is under way or may begin."""
        return self._started and self._loop.has_work

    def advance(self) -> None:
        """Do one engine step for the episodes under way."""
        self._loop.advance()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engine new weights; turns under way continue with them.

        Args:
            weights: names and whole tensors; on several ranks, to go through them is a collective.
            version: number of training steps that made them.
        """
        if keeps_turns(self._engine):
            self._engine.load_weights(weights, version)
            return
        with consumed_together(weights) as left:
            self._loop.suspend()
            self._engine.load_weights(left, version)
            self._loop.resume()

    def read_weights(self, folder: Path, version: int) -> None:
        """Give the engine the weights in a folder."""
        self.load_weights(read_weights(folder), version)

    def num_eval_tasks(self) -> int | None:
        """Number of held-out tasks: None if there is no end of them, 0 without evaluations."""
        return self._eval_environments.num_tasks if self._eval_environments else 0

    def shows(self) -> dict[str, str]:
        """What the observations of evaluations show; see ``read_shows``."""
        return dict(getattr(self._eval_environments, "shows", {}))

    def evaluate(self, episodes: Sequence[EpisodeKey]) -> list[Trajectory]:
        """Play held-out tasks; returns their trajectories in the order of ``episodes``."""
        assert self._eval_environments
        sampling, run = self._config.sampling, self._config.run
        self._loop.suspend()
        played = collect(
            self._engine,
            self._eval_environments,
            self._renderer,
            episodes,
            replace(sampling, temperature=run.eval_temperature),
            seed=run.seed,
            overlong_prompts=self._config.rollout.overlong_prompts,
        )
        self._loop.resume()
        return played

    def state(self) -> dict[str, Any]:
        """The episodes under way, for a checkpoint."""
        return rollout_state.to_state(self._loop.in_flight)

    def restore(
        self, states: Sequence[Mapping[str, Any]], episodes: Collection[EpisodeKey]
    ) -> None:
        """Continue the episodes of a checkpoint, once the engine has the present weights.

        Args:
            states: what ``state`` returned on each rank of the run that was saved.
            episodes: the episodes that this rank plays.
        """
        sampling, seed = self._config.sampling, self._config.run.seed
        self._loop = self._make_loop(
            rollout_state.from_state(
                states,
                self._environments,
                sampling,
                seed,
                episodes,
                plan=self._config.rollout.tree_plan,
            )
        )
        self._loop.resume()

    def clear(self) -> None:
        """Drop the episodes under way. They start again when a step asks for them."""
        self._loop.release()
        self._loop = self._make_loop(InFlight())

    def open_stage(self, stage_args: Mapping[str, Any]) -> None:
        """Drop the episodes under way, and open the environments of the next stage."""
        self._loop.release()
        self._stage.close()
        self._environments = self._open(stage_args)
        self._loop = self._make_loop(InFlight())

    def close(self) -> None:
        """Close the engine and the environments."""
        self._stack.close()

    def _open(self, stage_args: Mapping[str, Any]) -> Environments:
        config = self._config.environment
        environments = make_environments(config.env, self._slots, {**config.env_args, **stage_args})
        self._stage.callback(environments.close)
        return TracedEnvironments(environments, self._trace) if self._trace else environments

    def _make_loop(self, in_flight: InFlight) -> RolloutLoop:
        config = self._config
        return RolloutLoop(
            self._engine,
            self._environments,
            self._renderer,
            config.sampling,
            seed=config.run.seed,
            in_flight=in_flight,
            plan=config.rollout.tree_plan,
            overlong_prompts=config.rollout.overlong_prompts,
        )
