"""A player in a child process, which continues to play while its parent learns.

The parent asks, the child answers: each request is the name of a method of ``Player`` and its
arguments, sent over a pipe. Between two requests the child plays the episodes that the last
``collect`` named as ``ahead``. It looks for a request between two engine steps, so an answer never
describes half a step. Weights travel as files (``weight_files``), or from the parent directly to
the servers that the child samples from.

If the child dies, the next request raises an error. If the parent dies, the child ends.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from research_agent.active_rollout import EpisodeKey
from research_agent.config import TrainConfig
from research_agent.distributed import portable, rank_and_size, together
from research_agent.engines.base import Engine, ServerBacked
from research_agent.engines.checks import CONTINUE
from research_agent.errors import EngineError
from research_agent.models.policy import episode_context, load_model
from research_agent.player import Player
from research_agent.renderer import Renderer, open_renderer
from research_agent.system.terminal import escaped_logs
from research_agent.system.torchrun import without_torchrun
from research_agent.trace import Trace
from research_agent.trajectory import Trajectory
from research_agent.weight_files import WeightFolder

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
PlayerRequest = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Name of a method of ``Player``, and its arguments."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_TIMEOUT = 10.0  # seconds that a child has to end by itself
_ALIVE_CHECK = 1.0  # seconds between looks at a child that does not answer


@dataclass(frozen=True)
class _Setup:
    """What the child needs to know to make its player."""

    config: TrainConfig
    slots: int
    stage_args: Mapping[str, Any]
    trace_start: float | None  # None: no trace
    weights: Path  # folder that the child removes if the parent is dead
    gpu: int | None  # index of the parent's device; None: no GPU
    threads: int  # torch's, as in the parent


class PlayerProcess:
    """A ``Player`` in a child process, with the same methods.

    Args:
        config: as for ``Player``.
        slots: as for ``Player``.
        stage_args: as for ``Player``.
        trace: as for ``Player``; the child appends to the same file.

    Raises:
        EngineError: every method raises it if the child has died.
    """

    def __init__(
        self,
        config: TrainConfig,
        slots: int,
        stage_args: Mapping[str, Any],
        trace: Trace | None = None,
    ) -> None:
        self._weights = WeightFolder()
        self._servers: ServerBacked | None = None
        # A rank's player takes the rank's GPU; without ranks all GPUs are the player's too.
        on_own_gpu = rank_and_size()[1] > 1 and torch.cuda.is_available()
        setup = _Setup(
            config,
            slots,
            stage_args,
            trace.start if trace else None,
            self._weights.root,
            torch.cuda.current_device() if on_own_gpu else None,
            torch.get_num_threads(),
        )
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup), name="player")
        with _stop_signals_blocked():
            self._process.start()
        theirs.close()

    def start(
        self,
        load: Callable[[], tuple[Engine, Renderer]],
        servers: ServerBacked | None = None,
    ) -> None:
        """Make the engine in the child.

        Args:
            load: called in the child, so it must be picklable.
            servers: an engine of this process over the servers that the child samples from. It
                gives them weights, and the child's engine can be used after the first transfer.
        """
        self._servers = servers
        self._ask(Player.start, load)

    def fingerprints(self) -> dict[str, str]:
        """See ``Player``."""
        return self._ask(Player.fingerprints)

    def collect(
        self, episodes: Sequence[EpisodeKey], ahead: Sequence[EpisodeKey]
    ) -> list[Trajectory]:
        """See ``Player``; the child continues with the episodes in ``ahead`` by itself."""
        return self._ask(Player.collect, episodes, ahead)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Let the child give its engine new weights; all ranks take part."""
        if self._servers:
            transferred = self._servers.push_weights(weights, version)
            with together():
                self._ask(Player.load_weights, transferred, version)
            return
        folder = self._weights.share(weights, str(version))
        with together():
            self._ask(Player.read_weights, folder, version)
        self._weights.clear()

    def num_eval_tasks(self) -> int | None:
        """See ``Player``."""
        return self._ask(Player.num_eval_tasks)

    def shows(self) -> dict[str, str]:
        """See ``Player``."""
        return self._ask(Player.shows)

    def evaluate(self, episodes: Sequence[EpisodeKey]) -> list[Trajectory]:
        """See ``Player``."""
        return self._ask(Player.evaluate, episodes)

    def state(self) -> dict[str, Any]:
        """See ``Player``."""
        return self._ask(Player.state)

    def restore(
        self, states: Sequence[Mapping[str, Any]], episodes: Collection[EpisodeKey]
    ) -> None:
        """See ``Player``."""
        self._ask(Player.restore, states, episodes)

    def clear(self) -> None:
        """See ``Player``."""
        self._ask(Player.clear)

    def open_stage(self, stage_args: Mapping[str, Any]) -> None:
        """See ``Player``."""
        self._ask(Player.open_stage, stage_args)

    def close(self) -> None:
        """End the child, by force if it does not end by itself."""
        if self._servers:
            self._servers.close()
        self._connection.close()
        self._process.join(_EXIT_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._weights.close()

    def _ask(
        self, method: Callable[Concatenate[Player, P], T], *args: P.args, **named: P.kwargs
    ) -> T:
        """Ask for a method of the child's player; raises what it raises there."""
        with suppress(OSError):  # a child that failed is gone; its answer says why
            self._connection.send((method.__name__, args, named))
        # A process that the child forked keeps the sentinel open when the child is dead.
        while not wait([self._connection, self._process.sentinel], _ALIVE_CHECK):
            if not self._process.is_alive():
                break
        try:
            if not self._connection.poll():
                raise EOFError
            is_error, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_EXIT_TIMEOUT)
            raise EngineError(
                f"the process that plays the episodes {_how_it_ended(self._process.exitcode)} "
                f"(its output is above). {CONTINUE}"
            ) from None
        if is_error:
            if self._servers:
                self._servers.require_alive()
            raise answer
        result: T = answer
        return result


def connect_engine(
    make: Callable[[Renderer], Engine], config: TrainConfig, model: str
) -> tuple[Engine, Renderer]:
    """Make an engine over servers, in the process of a player.

    Args:
        make: what ``ServerBacked.engine_factory`` returned.
        config: the run's configuration.
        model: the model that the run began with.
    """
    renderer = open_renderer(config.policy, model)
    return make(renderer), renderer


def load_engine(
    make_engine: Callable[..., Engine],
    config: TrainConfig,
    model: str,
    *,
    slots: int,
    merge_adapter: bool,
) -> tuple[Engine, Renderer]:
    """Load a model and make an engine of it, in the process of a player.

    Args:
        make_engine: called as ``engines.make_engine`` is.
        config: the run's configuration.
        model: the model that the run began with. The weights that learn follow by ``load_weights``.
        slots: episodes played at the same time.
        merge_adapter: add an adapter to the weights of its base.
    """
    from transformers.utils import logging  # noqa: PLC0415 - slow to import

    logging.disable_progress_bar()  # it would break the run's
    renderer = open_renderer(config.policy, model)
    loaded = load_model(
        model,
        dtype=config.learner.precision,
        device=config.policy.device,
        merge_adapter=merge_adapter,
    )
    sampling = config.sampling
    engine = make_engine(
        sampling.engine,
        loaded,
        renderer,
        max_slots=slots,
        max_context=episode_context(loaded, sampling),
        dtype=config.learner.precision,
        share=True,
    )
    del loaded  # vLLM has its own copy, and another process needs the memory
    gc.collect()
    torch.cuda.empty_cache()
    return engine, renderer


@escaped_logs()
def _serve(connection: Connection, setup: _Setup) -> None:
    """Run the child: answer requests until the parent closes the pipe, and play in between."""
    for number in _STOP_SIGNALS:  # the parent decides when to stop
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, args=(setup.weights,), daemon=True).start()
    for name in os.environ.keys() - without_torchrun(os.environ).keys():
        del os.environ[name]
    if setup.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            visible.split(",")[setup.gpu] if visible else str(setup.gpu)
        )
    torch.set_num_threads(setup.threads)
    player = None
    try:
        path = setup.config.run.trace
        trace = Trace(path, setup.trace_start) if path and setup.trace_start is not None else None
        player = Player(setup.config, setup.slots, setup.stage_args, trace)
        while request := _next_request(connection, player):
            method, args, named = request
            _answer(connection, False, getattr(player, method)(*args, **named))
    except Exception as error:
        error.add_note("In the process that plays the episodes:\n" + traceback.format_exc())
        _answer(connection, True, portable(error))
    finally:
        if player:
            player.close()
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():
            shutil.rmtree(setup.weights, ignore_errors=True)


def _next_request(connection: Connection, player: Player) -> PlayerRequest | None:
    """Play until there is a request; None if the parent has closed the pipe, or is dead."""
    while player.has_work and not connection.poll():
        player.advance()
    try:
        request: PlayerRequest = connection.recv()
    except (EOFError, OSError):
        return None
    return request


def _answer(connection: Connection, is_error: bool, answer: Any) -> None:
    """Send what a method returned, or raised."""
    with suppress(OSError):  # the parent is dead
        connection.send((is_error, answer))


def _end_with_parent(weights: Path) -> None:
    """End this process some time after its parent, whatever it is busy with."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(_EXIT_TIMEOUT)
        shutil.rmtree(weights, ignore_errors=True)
        os._exit(1)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block the signals that stop a run; a child that starts meanwhile has them blocked too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how_it_ended(code: int | None) -> str:
    """Describe a process's exit code in words that follow "the process"."""
    if code is None:
        return "does not answer"
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit status {code}"
