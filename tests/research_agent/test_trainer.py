"""Training through the command line, on environments that have nothing to do with search."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from research_agent import checkpoint, step_metrics, trainer
from research_agent.cli import main
from research_agent.curriculum import CollapseMonitor
from research_agent.engines.transformers import TransformersEngine
from research_agent.evaluation.predictions import read_predictions
from research_agent.learner import Learner
from research_agent.player import Player
from research_agent.run_logger import RunLogger, read_lines
from tests.forks import FORKS
from tests.research_agent.disks import resize, small_disk
from tests.research_agent.torchrun import in_two_processes
from tests.research_agent.toy_env import CopyLetter

COPY = "tests.research_agent.toy_env:CopyLetter-v0"
FAILING = "tests.research_agent.failing_env:Failing-v0"

pytestmark = pytest.mark.usefixtures("one_thread")


def flags(model: Path, output: Path, *more: str, env: str = COPY) -> list[str]:
    words = f"train miniworld --env {env} --model {model} --output {output} --algorithm-args"
    words += " kl_coef=0 entropy_coef=0.001 --prompts-per-step 4 --group-size 8 --max-prompt 8"
    words += " --max-response 12 --max-turn-tokens 2 --learning-rate 0.003 --warmup-steps 0"
    words += " --save-every 2 --eval-every None --quiet --device cpu"
    return [*words.split(), *more]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return loaded


def refusal(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one message with which a command refuses."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("research-agent: error: ")
    assert "Traceback" not in message
    return message


def metrics(output: Path) -> list[dict[str, Any]]:
    return read_lines(output / "metrics.jsonl")


def final_bytes(output: Path) -> dict[str, bytes]:
    """What two equal runs have in common to the bit: weights, optimizer, log."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    files = {name: newest / name for name in ("model.safetensors", "state/state.safetensors")}
    files |= {name: output / name for name in ("metrics.jsonl", "trajectories.jsonl")}
    return {"newest": newest.name.encode(), **{n: path.read_bytes() for n, path in files.items()}}


def test_the_trainer_learns_a_game_that_is_not_search(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--steps", "60", "--eval-every", "30", "--env-args", "turns=2", "--json"]
    main(flags(letters, tmp_path / "run", *more))
    summary = last_json(capsys)
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(61))
    assert records[1]["reward"] < 0.8  # 2 is the most; a tenth is right by chance
    assert records[-1]["reward"] > 1.6
    assert records[0]["eval/right"] < 0.5
    assert records[-1]["eval/right"] == 1.0
    assert summary["eval/right last"] == 1.0
    assert summary["steps"] == 60

    model = Path(summary["model"])
    AutoModelForCausalLM.from_pretrained(model)
    AutoTokenizer.from_pretrained(model)
    words = f"eval --env {COPY} --env-args turns=2 --model {model} --output {tmp_path / 'eval'}"
    main([*words.split(), "--max-turn-tokens", "2", "--json", "--quiet"])
    evaluated = last_json(capsys)
    assert (evaluated["episodes"], evaluated["void"], evaluated["reward"]) == (4, 0, 2.0)
    assert evaluated["metrics"]["right"] == 1.0
    assert len((tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()) == 1 + 4

    main(["report", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<script type="application/json"' in page
    assert "before" in page


def test_a_run_in_two_parts_equals_one_run_to_the_bit(letters: Path, tmp_path: Path) -> None:
    main(flags(letters, tmp_path / "whole", "--steps", "5", "--env-args", "turns=2"))
    for steps in ("1", "4", "5"):
        main(flags(letters, tmp_path / "parts", "--steps", steps, "--env-args", "turns=2"))
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")


def test_another_seed_is_another_run(letters: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        main(flags(letters, tmp_path / seed, "--steps", "1", "--seed", seed))
    assert final_bytes(tmp_path / "1") != final_bytes(tmp_path / "2")


def test_evaluations_change_nothing_of_what_is_learned(letters: Path, tmp_path: Path) -> None:
    main(flags(letters, tmp_path / "without", "--steps", "3"))
    main(flags(letters, tmp_path / "with", "--steps", "3", "--eval-every", "1"))
    one, other = final_bytes(tmp_path / "with"), final_bytes(tmp_path / "without")
    for name in ("model.safetensors", "state/state.safetensors", "trajectories.jsonl"):
        assert one[name] == other[name]


def test_a_reference_policy_and_several_updates_survive_a_resume(
    letters: Path, tmp_path: Path
) -> None:
    more = "--algorithm-args kl_coef=0.1 --minibatches 2 --warmup-steps 9 --old-logprobs recomputed"
    for output, steps in (("whole", "4"), ("parts", "1"), ("parts", "4")):
        main([*flags(letters, tmp_path / output), *more.split(), "--steps", steps])
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    records = metrics(tmp_path / "whole")
    assert [r["learner/optimizer_steps"] for r in records] == [2.0] * 4
    assert records[0]["learner/kl"] == pytest.approx(0, abs=1e-3)
    assert records[-1]["learner/kl"] > 1e-5


def test_stages_follow_each_other_also_after_a_resume(letters: Path, tmp_path: Path) -> None:
    stages = ["steps=2 letters=a turns=2", "until=0 letters=bc", "letters=d"]
    for output, steps in (("whole", "9"), ("parts", "1"), ("parts", "3"), ("parts", "9")):
        main([*flags(letters, tmp_path / output), "--steps", steps, "--stages", *stages])
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    records = metrics(tmp_path / "whole")
    assert [r["stage"] for r in records] == [1, 1, 2, 2, 2, 2, 2, 3, 3]  # until: of five steps
    played = read_lines(tmp_path / "whole" / "trajectories.jsonl")
    prompts = {r["step"]: r["segments"][0]["text"] for r in played}
    assert (prompts[1], prompts[9]) == ("a=", "d=")
    assert {prompts[step] for step in range(3, 8)} <= {"b=", "c="}


def given_rewards(monkeypatch: pytest.MonkeyPatch, rewards: list[float]) -> None:
    """Let the steps have these mean rewards, and collapse be noticed from two steps."""
    describe, given = step_metrics.of_episodes, iter(rewards)
    monkeypatch.setattr(
        step_metrics, "of_episodes", lambda played: describe(played) | {"reward": next(given)}
    )
    monkeypatch.setattr(trainer, "CollapseMonitor", partial(CollapseMonitor, window=2))


def test_rewards_of_two_stages_are_not_compared(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_rewards(monkeypatch, [1, 1, 1, 0.3, 0.3, 0.3])
    more = ["--steps", "6", "--collapse", "0.5", "--on-collapse", "stop"]
    main([*flags(letters, tmp_path), *more, "--stages", "steps=3 letters=a", "letters=b"])
    assert [record["stage"] for record in metrics(tmp_path)] == [1, 1, 1, 2, 2, 2]


def test_a_run_that_goes_back_goes_back_in_its_stages(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It collapses at step 4; the checkpoint of step 2 has done two steps of its stage."""
    given_rewards(monkeypatch, [1, 1, 0.9, 0, 0, 0, 0, 0])
    more = ["--steps", "8", "--collapse", "0.6", "--on-collapse", "rollback"]
    main([*flags(letters, tmp_path), *more, "--stages", "steps=5 letters=a", "letters=b"])
    assert [record["stage"] for record in metrics(tmp_path)] == [1] * 7 + [2]


@pytest.mark.parametrize(("stops", "evaluations"), [((3, 8), "0"), ((3, 4, 8), "0"), ((8,), "1")])
def test_a_rollback_depends_on_neither_stops_nor_evaluations(
    letters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[int, ...],
    evaluations: str,
) -> None:
    """It collapses at step 5. The best steps end with step 3; the checkpoint before is of step 2.

    A stop adds the checkpoint of step 3, and so does an evaluation that is better than before.
    """
    more = ["--collapse", "0.5", "--on-collapse", "rollback"]
    for name, steps, each in (("whole", (8,), "0"), ("parts", stops, evaluations)):
        with monkeypatch.context() as patch:
            given_rewards(patch, [0.5, 1, 1, 0.3, 0.1, 1, 1, 1])
            patch.setattr(trainer, "best_step", lambda output: metrics(output)[-1]["step"])
            for stop in steps:
                words = flags(letters, tmp_path / name, "--steps", str(stop), *more)
                main([*words, "--eval-every", each])
    one, other = final_bytes(tmp_path / "parts"), final_bytes(tmp_path / "whole")
    if evaluations != "0":
        assert (tmp_path / "parts" / "evaluations" / "step-000003").is_dir()
        del one["metrics.jsonl"], other["metrics.jsonl"]
    assert one == other


def test_environments_are_closed_once(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[CopyLetter] = []

    def close(self: CopyLetter) -> None:
        closed.append(self)

    monkeypatch.setattr(CopyLetter, "close", close)
    stages = ["--stages", "steps=1 letters=a", "letters=b", "--eval-every", "2"]
    main(flags(letters, tmp_path, "--steps", "2", *stages))
    assert len(closed) == 3 * 32  # two stages, and the evaluations
    assert len({id(each) for each in closed}) == len(closed)


def test_numbers_of_the_environment_that_are_not_finite_are_null_in_all_files(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    step = CopyLetter.step

    def with_nan(self: CopyLetter, action: str) -> tuple[Any, ...]:
        observation, reward, *ended, info = step(self, action)
        void = self.at == 0
        nan = float("nan")
        info |= {"metrics": {"right": nan}, "score": [nan], "void": void}
        return observation, nan if void else reward, *ended, info

    monkeypatch.setattr(CopyLetter, "step", with_nan)
    more = ["--max-void-fraction", "1", "--eval-every", "1", "--log-episodes", "32"]
    main(flags(letters, tmp_path, "--steps", "1", *more))
    files = [tmp_path / "metrics.jsonl", tmp_path / "trajectories.jsonl"]
    logs = [json.loads(line, parse_constant=refuse) for f in files for line in f.open()]
    assert [record["env/right"] for record in logs if "env/right" in record] == [None]
    played = [record for record in logs if "segments" in record]
    assert len(played) == 32
    assert all(record["info"]["score"] == [None] for record in played)
    assert [record["reward"] is None for record in played] == [r["void"] for r in played]
    text = (tmp_path / "evaluations" / "step-000001" / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["metrics"]["right"] is None


def test_prompts_that_are_too_long_are_skipped_in_evaluations_too(
    letters: Path, tmp_path: Path
) -> None:
    more = ["--steps", "1", "--eval-every", "1", "--eval-args", "long=1"]
    more += ["--overlong-prompts", "skip"]
    main(flags(letters, tmp_path, *more, env="tests.research_agent.quiz_env:Quiz-v0"))
    _, played = read_predictions(tmp_path / "evaluations" / "step-000001")
    assert [(r["stop_reason"], r["void"]) for r in played if r["episode"] == 1] == [
        ("prompt", True)
    ]
    assert [r["void"] for r in played if r["episode"] != 1] == [False] * 5


def test_evaluations_keep_what_reports_show(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = {"request": "query", "ids": "ids"}
    monkeypatch.setitem(CopyLetter.metadata, "shows", shows)
    main(flags(letters, tmp_path, "--steps", "1", "--eval-every", "1"))
    for step in ("step-000000", "step-000001"):
        header, _ = read_predictions(tmp_path / "evaluations" / step)
        assert header == {"settings": {"chat_template": False}, "shows": shows}


def test_a_failure_without_trajectories_names_no_file(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(letters, tmp_path, "--steps", "2", "--learning-rate", "inf")
    said = refusal(capsys, words)
    assert "step 2: the policy's logits are not finite" in said
    assert "The last checkpoint is none" in said and "trajectories" not in said
    assert not (tmp_path / "failures").exists()


def test_a_gpu_that_is_not_there_is_refused(
    letters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refusal(capsys, [*flags(letters, tmp_path, "--steps", "1"), "--device", "cuda:0"])
    assert "--device is 'cuda:0', and torch finds no GPU; give auto or cpu" in said


def test_a_finished_run_says_so_and_changes_nothing(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(letters, tmp_path / "run", "--steps", "2")
    main(words)
    before = final_bytes(tmp_path / "run")
    capsys.readouterr()
    main(words)
    assert "is finished: 2 steps are done; give more --steps" in capsys.readouterr().out
    assert final_bytes(tmp_path / "run") == before


def test_the_time_limit_ends_a_run_after_a_step(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(letters, tmp_path / "run", "--steps", "500", "--time-limit", "0.001")
    main(words)
    assert "its 0.001 s are over, 1 steps are done" in capsys.readouterr().out
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1]
    main(words)
    assert "is finished" in capsys.readouterr().out
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1]


def test_void_episodes_are_counted_and_not_learned_from(letters: Path, tmp_path: Path) -> None:
    more = ["--env-args", "each=4", "--max-void-fraction", "0.25", "--steps", "2"]
    main(flags(letters, tmp_path / "run", *more, env=FAILING))
    for record in metrics(tmp_path / "run"):
        assert record["void_fraction"] == 0.25
        assert record["learner/trajectories"] == 24
        assert record["truncated_fraction"] == 0.25


def test_too_many_void_episodes_stop_the_run_which_continues_when_all_is_well(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up = tmp_path / "up"
    more = ["--env-args", "each=2", f"up={up}", "--steps", "3"]
    words = flags(letters, tmp_path / "run", *more, env=FAILING)
    message = refusal(capsys, words)
    assert "50% of the episodes of step 1 were void" in message
    assert "--max-void-fraction 20%" in message
    up.touch()
    main(words)
    main(flags(letters, tmp_path / "never", *more, env=FAILING))
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3]
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "never")


def test_a_step_of_void_episodes_only_changes_no_weight(letters: Path, tmp_path: Path) -> None:
    more = ["--env-args", "each=1", "--max-void-fraction", "1", "--steps", "1"]
    main(flags(letters, tmp_path / "run", *more, env=FAILING))
    assert metrics(tmp_path / "run")[0]["void_fraction"] == 1.0
    before = AutoModelForCausalLM.from_pretrained(letters).state_dict()
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_whose_disk_is_full_continues_when_there_is_room(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 640) as disk:  # two checkpoints have room, not three
        words = flags(letters, disk / "run", "--steps", "12")
        message = refusal(capsys, words)
        assert "No space left" in message
        assert "start the same command again" in message
        left = [path.name for path in (disk / "run" / "checkpoints").iterdir()]
        assert left
        assert all(name.startswith("step-") for name in left)
        resize(disk, 4000)
        main(words)
        main(flags(letters, tmp_path / "never", "--steps", "12"))
        assert final_bytes(disk / "run") == final_bytes(tmp_path / "never")


def test_a_run_that_could_not_be_saved_takes_no_step(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 80) as disk:
        message = refusal(capsys, flags(letters, disk / "run", "--steps", "1"))
        assert "No space left" in message and "a run that cannot be saved is not started" in message
        assert metrics(disk / "run") == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--env", "tests.research_agent.nowhere:X-v0"], "nowhere"),
        (["--env", FAILING, "--env-args", "each=0"], "each is 0; it must be at least 1"),
        (["--env", FAILING, "--env-args", "speed=3"], "speed"),
        (["--env", FAILING, "--env-args", "broken=true"], "BrokenError: line 3 of the questions"),
        (["--algorithm", "nope"], "unknown algorithm 'nope'; known: "),
        (["--algorithm-args", "speed=3"], "speed"),
        (["--engine", "nope"], "nope"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--max-prompt", "1"], "max_prompt 1"),
        (["--device", "mps"], "--device is 'mps', which is not supported; give auto, cpu or cuda"),
        (["--device", "gpu"], "--device is 'gpu', which torch does not know; give auto, cpu or"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_message(
    letters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    assert said in refusal(capsys, [*flags(letters, tmp_path / "run", "--steps", "1"), *more])


def test_a_refused_run_leaves_its_folder_as_it_was(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, empty, used = (tmp_path / name for name in ("new", "empty", "used"))
    empty.mkdir()
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    for output in (new, empty, used):
        words = flags(letters, output, "--steps", "1", env=FAILING)
        assert "each is 0" in refusal(capsys, [*words, "--env-args", "each=0"])
    assert not new.exists()
    assert list(empty.iterdir()) == []
    assert list(used.iterdir()) == [used / "notes.txt"]


def run_alone(words: list[str], log: str) -> None:
    sys.stdout = sys.stderr = Path(log).open("a", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    main(words)


PHASES = {
    "collection": (Player, "collect"),
    "update": (Learner, "update"),
    "hand-over of the weights": (TransformersEngine, "load_weights"),
    "saving": (checkpoint, "save"),
    "logging": (RunLogger, "record"),
}


def kill_within(phase: tuple[Any, str], calls: int, share: float) -> None:
    """Have this process killed some way into a call of a phase: a share of the call before it."""
    owner, name = phase
    original = getattr(owner, name)
    lasted: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        if len(lasted) == calls:
            moment = threading.Timer(lasted[-1] * share, os.kill, (os.getpid(), signal.SIGKILL))
            moment.start()
        try:
            return original(*args, **kwargs)
        finally:
            lasted.append(time.perf_counter() - began)

    setattr(owner, name, timed)


def run_until_killed(words: list[str], log: str, phase: str, calls: int, share: float) -> None:
    kill_within(PHASES[phase], calls, share)
    run_alone(words, log)


def start(words: list[str], log: Path) -> Any:
    process = FORKS.Process(target=run_alone, args=(words, str(log)))
    process.start()
    return process


def wait_for_step(process: Any, output: Path, step: int) -> None:
    while process.is_alive():
        done = metrics(output)
        if done and done[-1]["step"] >= step:
            return
        time.sleep(0.001)
    raise AssertionError(f"the run ended before step {step}")


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_equals_one_that_never_was(
    letters: Path, tmp_path: Path
) -> None:
    more = ["--steps", "60", "--eval-every", "7", "--env-args", "turns=2"]
    log = tmp_path / "log"
    words = flags(letters, tmp_path / "broken", *more)
    rng = random.Random(0)
    moments = [(phase, rng.randint(1, 2), rng.random()) for phase in PHASES for _ in range(4)]
    rng.shuffle(moments)
    for moment in moments:
        arguments = (words, str(log), *moment)
        process = FORKS.Process(target=run_until_killed, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert len(moments) == 20
    begun = metrics(tmp_path / "broken")[-1]["step"]
    assert begun < 50  # it was killed while there was work to do
    process = start(words, log)
    wait_for_step(process, tmp_path / "broken", begun + 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert "the same command continues it" in log.read_text()
    done = metrics(tmp_path / "broken")[-1]["step"]
    assert (tmp_path / "broken" / "checkpoints" / f"step-{done:06d}").is_dir()
    ends = [start(flags(letters, tmp_path / n, *more), log) for n in ("broken", "whole")]
    for process in ends:
        process.join()
        assert process.exitcode == 0, log.read_text()
    assert log.read_text().count("is finished: 60 steps are done") == 2
    assert final_bytes(tmp_path / "broken") == final_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("staleness", ["0", "1"])
def test_a_second_interrupt_leaves_at_once(letters: Path, tmp_path: Path, staleness: str) -> None:
    more = ["--steps", "100000", "--save-every", "100000", "--max-staleness", staleness]
    words = flags(letters, tmp_path / "run", *more)
    process = start(words, tmp_path / "log")
    wait_for_step(process, tmp_path / "run", 1)
    os.kill(process.pid, signal.SIGSTOP)  # so that both arrive within one step
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 130
    said = (tmp_path / "log").read_text()
    assert "once more to leave at once" in said
    assert "Traceback" not in said


def test_the_best_checkpoint_stays_beside_the_newest(letters: Path, tmp_path: Path) -> None:
    more = ["--steps", "12", "--eval-every", "2", "--keep", "1", "--learning-rate", "0.02"]
    main(flags(letters, tmp_path / "run", *more, "--env-args", "turns=2"))
    rewards = {r["step"]: r["eval/reward"] for r in metrics(tmp_path / "run") if "eval/reward" in r}
    best = max(range(2, 13, 2), key=rewards.__getitem__)  # the first of equals
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best").resolve().name == f"step-{best:06d}"
    assert {p.name for p in folder.iterdir()} == {"best", f"step-{best:06d}", "step-000012"}
    AutoModelForCausalLM.from_pretrained(folder / "best")


@pytest.mark.slow
def test_a_second_sigterm_changes_nothing(letters: Path, tmp_path: Path) -> None:
    words = flags(letters, tmp_path / "run", "--steps", "100000", "--save-every", "100000")
    process = start(words, tmp_path / "log")
    wait_for_step(process, tmp_path / "run", 1)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)  # as where a scheduler and torchrun both send one
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(letters: Path, tmp_path: Path) -> None:
    more = ["--env-args", "turns=2", "--eval-every", "2", "--save-every", "3"]
    more += ["--algorithm-args", "kl_coef=0.01"]  # with a reference policy
    main(flags(letters, tmp_path / "one", "--steps", "5", *more))
    # Stopped and continued, also by one process.
    for steps in ("2", "4", "5"):
        words = flags(letters, tmp_path / "two", "--steps", steps, *more)
        if steps == "4":
            main(words)
        else:
            said = in_two_processes("research_agent.cli", *words)
            assert said.count(f"is finished: {steps} steps are done") == 1
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [sorted(record) for record in two] == [sorted(record) for record in one]
    for theirs, ours in zip(two, one, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    played = [tmp_path / name / "evaluations" / "step-000004" for name in ("one", "two")]
    episodes = [[each["episode"] for each in read_predictions(folder)[1]] for folder in played]
    assert episodes[0] == episodes[1]  # each rank played its share
    folders = [tmp_path / name / "checkpoints" / "step-000005" for name in ("one", "two")]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    # A key's bias moves no attention, so its gradient is noise about 0, which Adam makes large.
    compared = [name for name in ours if not name.endswith("k_proj.bias")]
    assert all(torch.allclose(theirs[name], ours[name], rtol=0, atol=5e-6) for name in compared)
