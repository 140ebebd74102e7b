"""Continuing a run: what may change, what may not, and what a damaged or foreign folder does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from research_agent.checkpoint import CHECKSUMS, _checksums
from research_agent.cli import main
from research_agent.run_logger import read_lines
from research_agent.system.files import folder_lock
from tests.research_agent.test_trainer import (
    flags,
    metrics,
    refusal,
    start,
    wait_for_step,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(letters: Path, tmp_path: Path) -> Path:
    """The folder of a run with two steps and a checkpoint after each."""
    main(flags(letters, tmp_path / "run", "--steps", "2", "--save-every", "1"))
    return tmp_path / "run"


def continued(letters: Path, run: Path, *more: str) -> list[str]:
    return flags(letters, run, "--steps", "3", "--save-every", "1", *more)


NEUTRAL = [
    ("--micro-batch-tokens 50", "learner.micro_batch_tokens"),
    ("--packing on", "learner.packing"),
    ("--gradient-checkpointing", "learner.gradient_checkpointing"),
    ("--max-in-flight 3", "sampling.max_in_flight"),
    ("--max-prompt 9", "sampling.max_prompt"),
]


@pytest.mark.parametrize(("words", "name"), NEUTRAL)
def test_settings_of_memory_and_speed_may_change(
    letters: Path, run: Path, words: str, name: str
) -> None:
    main(continued(letters, run, *words.split()))
    assert metrics(run)[-1]["step"] == 3
    (change,) = read_lines(run / "changes.jsonl")
    assert change["step"] == 2
    assert list(change["neutral"]) == [name]
    assert change["results"] == {}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--learning-rate 0.5", "learner.learning_rate"),
        ("--max-prompt 7", "sampling.max_prompt"),
        ("--env-args turns=1", "environment.env_args"),  # this environment has no provenance
    ],
)
def test_settings_of_the_results_change_on_request_only(
    letters: Path, run: Path, capsys: Capture, words: str, name: str
) -> None:
    more = words.split()
    said = refusal(capsys, continued(letters, run, *more))
    assert name in said and "--override" in said
    assert metrics(run)[-1]["step"] == 2
    main(continued(letters, run, *more, "--override"))
    assert metrics(run)[-1]["step"] == 3
    (change,) = read_lines(run / "changes.jsonl")
    assert list(change["results"]) == [name]


MODULE = """
import gymnasium as gym
from gymnasium.spaces import Text

class Named(gym.Env):
    metadata = {"render_modes": []}
    num_tasks = 4
    def __init__(self, data="a", place="here"):
        self.action_space = self.observation_space = Text(max_length=99)
        self.found = {"data": open(data).read(), "place: server": place}
    def fingerprints(self):
        return self.found
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "b=", {}
    def step(self, action):
        return "", 1.0, True, False, {}

gym.register("Named-v0", entry_point="named_env:Named")
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The data of an environment that names what its tasks depend on, and where they are."""
    (tmp_path / "named_env.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data").write_text("one")
    yield tmp_path / "data"
    sys.modules.pop("named_env", None)


def test_provenance_says_whether_an_environment_is_the_same(
    letters: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    def words(steps: int, file: Path, place: str) -> list[str]:
        args = ["--env-args", f"data={file}", f"place={place}", "--steps", str(steps)]
        return flags(letters, tmp_path / "run", *args, env="named_env:Named-v0")

    main(words(1, data, "here"))
    moved = tmp_path / "moved"
    moved.write_text("one")
    main(words(2, moved, "there"))  # another path and another host, the same data
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    moved.write_text("two")  # the same names, other data
    said = refusal(capsys, words(3, moved, "there"))
    assert "environment's data: 'one' in the folder, 'two' now" in said
    assert metrics(tmp_path / "run")[-1]["step"] == 2


DATED = "{{ 'a' if strftime_now('%Y') == '2025' else 'b' }}{% if x %}c{% endif %}="


def test_a_chat_template_goes_on_with_the_day_and_arguments_of_its_run(
    letters: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = shutil.copytree(letters, tmp_path / "model")
    template = DATED + "{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)

    def words(steps: int, *more: str) -> list[str]:
        return flags(model, tmp_path / "run", "--chat-template", "--steps", str(steps), *more)

    def prompt() -> list[str]:
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        return [config["policy"]["chat_template_date"], config["policy"]["chat_template_args"]]

    args = ["--chat-template-args", "x=true"]
    main(words(1, *args, "--chat-template-date", "2025-01-01"))
    main(words(2, *args))
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    assert prompt() == ["2025-01-01", {"x": True}]
    said = refusal(capsys, words(3, *args, "--chat-template-date", "2025-01-02"))
    assert "policy.chat_template_date: '2025-01-01' in the folder, '2025-01-02' now" in said
    assert "policy.chat_template_args" in refusal(capsys, words(3))
    assert "reads no 'y'" in refusal(
        capsys, [*words(3), "--output", str(tmp_path / "other"), "--chat-template-args", "y=1"]
    )


def test_a_prompt_that_is_too_long_stops_a_run_and_both_cures_continue_it(
    letters: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ["--steps", "3", "--save-every", "1", "--env-args", "long=1"]
    words = flags(letters, tmp_path / "run", *more, env="tests.research_agent.quiz_env:Quiz-v0")
    assert "21 tokens, not 1 to 8 " in refusal(capsys, words)
    other = shutil.copytree(tmp_path / "run", tmp_path / "other")
    main([*words, "--overlong-prompts", "skip"])
    skipped = [record["skipped_fraction"] for record in metrics(tmp_path / "run")]
    assert len(skipped) == 3 and max(skipped) == 0.25
    main([*words, "--output", str(other), "--max-prompt", "21"])
    assert [record["skipped_fraction"] for record in metrics(other)] == [0, 0, 0]


@pytest.mark.parametrize("name", ["model.safetensors", "state/state.safetensors", "state.json"])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_offered(
    letters: Path, run: Path, capsys: Capture, name: str
) -> None:
    newest = run / "checkpoints" / "step-000002"
    content = bytearray((newest / name).read_bytes())
    content[-5] ^= 1
    (newest / name).write_bytes(content)
    said = refusal(capsys, continued(letters, run))
    assert name in said or name == "state.json"
    assert f"delete {newest}" in said and "continue from step-000001" in said


def test_a_checkpoint_cannot_name_another_model_to_load(
    letters: Path, run: Path, capsys: Capture
) -> None:
    newest = run / "checkpoints" / "step-000002"
    text = (newest / "state.json").read_text()
    state = json.loads(text.replace(json.dumps(str(letters)), '"/somewhere/else"'))
    state["config"]["policy"]["model"] = str(letters)
    (newest / "state.json").write_text(json.dumps(state))
    (newest / CHECKSUMS).write_text(json.dumps(_checksums(newest)))
    said = refusal(capsys, continued(letters, run))
    assert "began with the model '/somewhere/else'" in said


def test_training_into_the_folder_of_its_model_is_refused(
    letters: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = shutil.copytree(letters, tmp_path / "model")
    before = (model / "config.json").read_bytes()
    said = refusal(capsys, flags(model, model, "--steps", "1"))
    assert str(model / "config.json") in said and "give another --output" in said
    assert (model / "config.json").read_bytes() == before
    assert not (model / "checkpoints").exists()


OVERRIDES = {
    "--algorithm ppo": "algorithm.algorithm: 'grpo' in the folder, 'ppo' now",
    "--stages turns=1": "rollout.stages: ['steps=1', 'steps=1', 'turns=1'] in the folder, ",
}


@pytest.mark.parametrize("words", OVERRIDES)
def test_an_override_that_the_checkpoint_cannot_follow_names_the_settings_and_changes_no_file(
    letters: Path, tmp_path: Path, capsys: Capture, words: str
) -> None:
    run = tmp_path / "run"
    begun = ["--stages", "steps=1", "steps=1", "turns=1"] if "stages" in words else []
    main(flags(letters, run, "--steps", "2", *begun))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = flags(letters, run, "--steps", "3", *words.split(), "--override")
    if "ppo" in words:  # which has other arguments
        command = [word for word in command if "coef" not in word and word != "--algorithm-args"]
    message = refusal(capsys, command)
    assert OVERRIDES[words] in message
    assert "delete" not in message and "give another --output" in message
    assert {path: path.read_bytes() for path in files} == files
    assert not (run / "changes.jsonl").exists()


def test_a_monitor_of_collapse_can_be_added(letters: Path, run: Path) -> None:
    main(continued(letters, run, "--collapse", "0.5", "--override"))
    assert metrics(run)[-1]["step"] == 3


def test_a_model_that_was_moved_is_taken_on_request(
    letters: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = shutil.copytree(letters, tmp_path / "model")
    main(flags(model, tmp_path / "run", "--steps", "1"))
    moved = model.rename(tmp_path / "moved")
    words = flags(moved, tmp_path / "run", "--steps", "2")
    assert "policy.model" in refusal(capsys, words)
    main([*words, "--override"])
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["policy"]["model"] == str(moved)


def test_a_run_whose_first_model_was_dropped_by_its_own_run_says_how_to_continue(
    letters: Path, tmp_path: Path, capsys: Capture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    main(flags(letters, first, "--steps", "1", "--keep", "1"))
    main(flags(first, second, "--steps", "1"))
    main(flags(letters, first, "--steps", "2", "--keep", "1"))
    words = flags(first, second, "--steps", "2")
    said = refusal(capsys, words)
    assert f"{first / 'checkpoints' / 'step-000001'}, which is gone" in said
    assert "--override" in said and str(first / "checkpoints" / "step-000002") in said
    main([*words, "--override"])
    assert metrics(second)[-1]["step"] == 2


def test_a_folder_with_the_name_of_the_link_to_the_best_stops_no_run(
    letters: Path, run: Path
) -> None:
    """As a copy that follows links leaves it."""
    best = run / "checkpoints" / "best"
    shutil.copytree(run / "checkpoints" / "step-000002", best)
    with pytest.warns(UserWarning, match=r"best cannot be a link to step-000003: .*continues"):
        main(continued(letters, run, "--eval-every", "1"))
    assert metrics(run)[-1]["step"] == 3
    assert best.is_dir() and not best.is_symlink()


def test_what_a_killed_run_did_after_its_checkpoint_is_neither_told_nor_kept(
    letters: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    words = flags(letters, run, "--eval-every", "2", "--json")
    main([*words, "--steps", "4"])
    shutil.rmtree(run / "checkpoints" / "step-000004")  # as if it had been killed before
    capsys.readouterr()
    main([*words, "--steps", "2"])
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 2
    assert told["reward last"] == metrics(run)[2]["reward"]  # the first line is of step 0
    assert told["eval/right last"] == metrics(run)[2]["eval/right"]
    assert told["seconds of training"] == read_lines(run / "timings.jsonl")[2]["seconds"]
    main([*words, "--steps", "3", "--eval-every", "0"])
    assert [path.name for path in sorted((run / "evaluations").iterdir())] == [
        "step-000000",
        "step-000002",
    ]


def test_one_process_trains_into_a_folder(letters: Path, run: Path, capsys: Capture) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from research_agent.system.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('locked', flush=True); time.sleep(999)"
    )
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        said = refusal(capsys, continued(letters, run))
        assert f"process {other.pid} on" in said and "give another --output" in said
        other.kill()  # a killed process leaves no lock behind
    main(continued(letters, run))
    assert metrics(run)[-1]["step"] == 3
    with folder_lock(run):
        pass


@pytest.mark.slow
def test_a_hangup_saves(letters: Path, tmp_path: Path) -> None:
    words = flags(letters, tmp_path / "run", "--steps", "100000", "--save-every", "100000")
    process = start(words, tmp_path / "log")
    wait_for_step(process, tmp_path / "run", 1)
    os.kill(process.pid, signal.SIGHUP)
    process.join()
    assert process.exitcode == 128 + signal.SIGHUP
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
