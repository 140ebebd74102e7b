"""A whole run on real data: MuSiQue's training questions, an index of its passages, GRPO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research_agent.cli import main
from research_agent.run_logger import read_lines
from tests.research_agent.conftest import byte_tokenizer, tiny_qwen2


@pytest.mark.slow
def test_three_steps_on_musique(
    research_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RESEARCH_DATA", str(research_data))
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "random"
    tokenizer = byte_tokenizer()
    tiny_qwen2(len(tokenizer), hidden=32, context=2048).save_pretrained(model)
    tokenizer.save_pretrained(model)
    output = tmp_path / "run"
    words = (
        f"train research-7b --model {model} --env-args retriever=none --output {output} --steps 3"
        " --prompts-per-step 2 --group-size 2 --max-prompt 1536 --max-response 64 --log-episodes 8"
        " --device cpu --quiet --json"
    )
    main(words.split())
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 3
    records = read_lines(output / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["void_fraction"] == 0 for record in records)
    assert all(0 <= record["reward"] < 0.2 for record in records)  # the policy is random
    assert records[-1]["learner/kl"] >= 0
    episodes = read_lines(output / "trajectories.jsonl")
    asked = {e["segments"][0]["text"].rsplit("User: ", 1)[1] for e in episodes}
    assert len(asked) == 6  # two tasks a step, none twice
    assert list((tmp_path / "cache" / "indexes").glob("*/meta.json"))
