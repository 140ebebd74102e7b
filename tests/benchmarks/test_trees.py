"""What trees save: the command runs, and its counts are those of the trajectories."""

from __future__ import annotations

import json

import pytest

from benchmarks.trees import main, sampling_costs
from tests.research_agent.rollouts import action, observation, prompt, trajectory


def test_costs_count_what_is_shared_once() -> None:
    chain = trajectory(prompt(1), action([2, 3]), observation(4), action([5]))
    branch = trajectory(prompt(1), action([2, 3]), observation(4), action([6, 7]), lineage=(0,))
    costs = sampling_costs([chain, branch], 9)
    assert costs == {
        "sampled tokens": 2.5,
        "tokens through the sampler": 4.5,
        "environment steps": 1.5,
        "turns of a trajectory": 2.0,
    }


def test_a_tiny_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--json"])
    found = json.loads(capsys.readouterr().out)
    chains, trees = found["sampling"]["chains"], found["sampling"]["trees"]
    assert chains["sampled tokens"] > 0 and trees["tokens through the sampler"] > 0
    assert chains["environment steps"] == chains["turns of a trajectory"]  # nothing is shared
    assert trees["environment steps"] <= trees["turns of a trajectory"]
    for learning in found["learning"].values():
        assert learning["tokens"]["tree"] < learning["tokens"]["on"] <= learning["tokens"]["off"]
        assert all(seconds > 0 for seconds in learning["seconds"].values())
    assert all(cost > 0 for cost in found["branch"].values())
