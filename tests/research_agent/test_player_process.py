"""The player in a child process: what it plays meanwhile, and how each side survives the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from research_agent.active_rollout import EpisodeKey
from research_agent.cli import main
from research_agent.config import EnvironmentConfig, TrainConfig
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import make_environments
from research_agent.errors import ConfigError, EngineError, NonFiniteError
from research_agent.player import Player
from research_agent.player_process import PlayerProcess
from research_agent.rollout import collect
from research_agent.run_logger import read_lines
from tests.research_agent.conftest import byte_tokenizer, tiny_qwen2
from tests.research_agent.fake_vllm import FakeVllm
from tests.research_agent.scripted_player import (
    CONFIG,
    RENDERER,
    SAMPLING,
    SLOTS,
    Checked,
    say,
    scripted,
    weights,
)
from tests.research_agent.test_staleness import plain, require_each_once, tasks, versions
from tests.research_agent.test_trainer import flags


def played_alone(episodes: Sequence[EpisodeKey]) -> list[object]:
    engine = ScriptedEngine(say, RENDERER)
    environments = make_environments(CONFIG.environment.env, 1, {"turns": 3})
    return [plain(t) for t in collect(engine, environments, RENDERER, episodes, SAMPLING)]


@contextmanager
def started() -> Iterator[PlayerProcess]:
    process = PlayerProcess(CONFIG, SLOTS, {})
    try:
        process.start(scripted)
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[PlayerProcess]:
    with started() as process:
        yield process


@pytest.fixture
def player(shared: PlayerProcess) -> PlayerProcess:
    """One that no other test left anything in."""
    shared.open_stage({})
    shared.load_weights(weights(0), 0)
    return shared


def ended(player: PlayerProcess) -> set[EpisodeKey]:
    """Episodes that have ended and that nobody has asked for."""
    return {(each["episode"], each["sample"]) for each in player.state()["done"]}


def wait_for(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        time.sleep(0.01)


def test_it_plays_ahead_while_nobody_asks(player: PlayerProcess) -> None:
    now, later = tasks(0, 2, 2), tasks(1, 2, 2)
    first = player.collect(now, later)
    assert [plain(t) for t in first] == played_alone(now)
    wait_for(lambda: ended(player) == set(later))  # it goes on by itself, no further than allowed
    assert player.state()["active"] == []
    player.load_weights(weights(1), 1)
    last = tasks(2, 2, 2)
    second = player.collect(later, last)
    assert [plain(t) for t in second] == played_alone(later)
    assert {v for t in second for v in versions(t)} == {0}
    held_out = player.evaluate([(each, 0) for each in range(4)])
    assert player.num_eval_tasks() == 4
    assert [t.episode for t in held_out] == [0, 1, 2, 3]
    assert {v for t in held_out for v in versions(t)} == {1}
    third = player.collect(last, ())
    assert [plain(t) for t in third] == played_alone(last)

    # What it kept goes to another player.
    player.collect([(50, 0)], tasks(30, 2, 2))
    wait_for(lambda: ended(player) == set(tasks(30, 2, 2)))
    state = player.state()
    player.clear()
    assert player.state()["done"] == []
    player.restore([state], set(tasks(30, 2, 2)[:3]))
    assert ended(player) == set(tasks(30, 2, 2)[:3])
    player.open_stage({"turns": 1})
    assert player.state()["done"] == []
    assert [len(t.turns) for t in player.collect([(0, 0)], ())] == [1]
    assert player.fingerprints() == {}


def test_the_same_episodes_as_in_this_process(player: PlayerProcess) -> None:
    here = Player(CONFIG, SLOTS, {})
    closed: list[bool] = []

    def load() -> tuple[Checked, Any]:
        engine, renderer = scripted()
        engine.close = lambda: closed.append(True)  # type: ignore[attr-defined]
        return engine, renderer

    here.start(load)
    episodes = tasks(4, 3, 3)
    assert player.collect(episodes, ()) == here.collect(episodes, ())
    here.close()
    assert closed  # the engine too


@pytest.mark.usefixtures("forks")
def test_an_error_keeps_its_type_and_says_where() -> None:
    with started() as player:
        player.load_weights(weights(99), 99)
        with pytest.raises(NonFiniteError, match="not finite") as caught:
            player.collect(tasks(0, 1, 1), ())
        assert "In the process that plays the episodes" in caught.value.__notes__[0]
        with pytest.raises(EngineError, match="exit status 0"):
            player.state()


@pytest.mark.usefixtures("forks")
def test_a_refusal_at_the_start_is_the_one_of_this_process() -> None:
    config = TrainConfig(environment=EnvironmentConfig(env="tests.nowhere:X-v0"))
    process = PlayerProcess(config, SLOTS, {})
    try:
        with pytest.raises(ConfigError, match=r"no environment 'tests.nowhere:X-v0'"):
            process.fingerprints()
    finally:
        process.close()


def test_a_child_survives_the_signals_that_stop_the_run_and_its_death_is_an_error() -> None:
    with started() as player:
        pid = player._process.pid
        assert pid
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert len(player.collect(tasks(0, 2, 2), ())) == 4
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"was killed by SIGKILL \(out of memory\?\)"):
            player.collect(tasks(1, 2, 2), ())


def scripted_beside_a_worker() -> tuple[Checked, Any]:
    """As an environment with a pool of processes, which outlive the child that forked them."""
    fork = multiprocessing.get_context("fork")
    fork.Process(target=time.sleep, args=(60,), name="worker").start()
    return scripted()


def test_a_dead_child_is_an_error_even_if_a_process_that_it_forked_lives_on() -> None:
    process = PlayerProcess(CONFIG, SLOTS, {})
    try:
        process.start(scripted_beside_a_worker)
        assert len(process.collect(tasks(0, 2, 2), ())) == 4
        pid = process._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert pid and children
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="was killed by SIGKILL"):
            process.collect(tasks(1, 2, 2), ())
        assert all(Path(f"/proc/{child}").exists() for child in children)
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    finally:
        process.close()


PARENT = """
import sys, time
from research_agent import player_process
from research_agent.player_process import PlayerProcess
from tests.research_agent.scripted_player import CONFIG, SLOTS, scripted

def stuck():
    player_process._EXIT_TIMEOUT = 0.0
    print("stuck", flush=True)
    time.sleep(10**6)

if __name__ == "__main__":
    player = PlayerProcess(CONFIG, SLOTS, {})
    print(player._process.pid, player._weights.root, flush=True)
    player.start(stuck if sys.argv[1:] else scripted)
    player.collect([(0, 0), (0, 1)], [(task, 0) for task in range(1, 10**4)])
    print("playing", flush=True)
    time.sleep(10**6)
"""


@pytest.mark.parametrize("words", [[], ["stuck"]])
def test_a_dead_parent_ends_the_child(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), *words]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}
    ) as parent:
        assert parent.stdout
        pid, folder = parent.stdout.readline().split()
        assert parent.stdout.readline()
        assert Path(folder).is_dir()
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert not Path(folder).exists()


@pytest.mark.usefixtures("forks")
def test_turns_on_servers_go_on_while_weights_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learner gives the weights, and the child samples: no turn is cut or asked for twice."""
    tokenizer, model = byte_tokenizer(), tiny_qwen2(hidden=32)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    server = FakeVllm(sizes=(2, 264, 32))
    try:
        more = "--env-args turns=2 --max-turn-tokens 4 --max-response 40 --overlap --steps 3"
        more += f" --max-staleness 1 --log-episodes 99 --engine server:{server.url}"
        main(flags(tmp_path / "model", tmp_path / "run", *more.split()))
    finally:
        server.stop()
    assert "is finished: 3 steps" in capsys.readouterr().out
    require_each_once(tmp_path / "run", 3, staleness=1)
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(record["staleness_max"] for record in records) == 1
    paths = server.paths()
    assert "/pause?mode=keep" in paths and "/resume" in paths
    asked = [(*tokens, params["seed"]) for tokens, params in server.turns]
    assert len(asked) == len(set(asked)) >= 3 * 32 * 2
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    final = load_file(folder / "model.safetensors")
    assert all(torch.equal(server.weights[name], weight) for name, weight in final.items())
