"""What the learner's settings and guards do to whole runs, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from research_agent import checkpoint
from research_agent.cli import main
from research_agent.learner import Learner
from research_agent.trajectory import Group
from tests.research_agent.rank_worker import collapse_after_three_steps
from tests.research_agent.test_trainer import final_bytes, flags, metrics, refusal


def test_adapters_learn_in_a_run_and_survive_a_resume(letters: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    kl = ["--algorithm-args", "kl_coef=0.1", "entropy_coef=0"]
    words = ["--lora-rank", "2", "--save-every", "1", *kl]
    main(flags(letters, tmp_path / "whole", *words, "--steps", "4"))
    main(flags(letters, tmp_path / "parts", *words, "--steps", "2"))
    main(flags(letters, tmp_path / "parts", *words, "--steps", "4"))
    assert final_bytes(tmp_path / "whole") == final_bytes(tmp_path / "parts")
    found = metrics(tmp_path / "whole")
    assert found[-1]["learner/kl"] > 0 == pytest.approx(found[0]["learner/kl"], abs=1e-9)
    # The sampler has the adapters' weights too.
    assert all(record["learner/sampling_logprob_difference"] < 1e-5 for record in found)

    newest = checkpoint.latest(tmp_path / "whole" / "checkpoints")
    assert newest is not None
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (letters, newest))
    names = dict(before.named_parameters())
    assert names.keys() == dict(after.named_parameters()).keys()
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, names[n])}
    assert changed == {n for n in names if "proj.weight" in n}


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_what_it_was_learned_from(
    letters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update, updates = Learner.update, []

    def broken(self: Learner, groups: Sequence[Group]) -> dict[str, float]:
        updates.append(groups)
        if len(updates) % 3 == 0:  # the weights burst
            with torch.no_grad():
                self.model.get_output_embeddings().weight.fill_(torch.inf)  # type: ignore[operator]
        return update(self, groups)

    monkeypatch.setattr(Learner, "update", broken)
    words = flags(letters, tmp_path / "run", "--steps", "6", "--save-every", "1")
    said = refusal(capsys, words)
    assert "step 3: " in said and "is nan" in said and "failures" in said
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1].name == "step-000002" and str(saved[-1]) in said
    (failure,) = (tmp_path / "run" / "failures").iterdir()
    record = json.loads(failure.read_text())
    assert record["step"] == 3 and "is nan" in record["cause"]
    assert len(record["trajectories"]) == 32
    of_first: dict[str, Any] = record["trajectories"][0]
    shown = [token for segment in of_first["segments"] for token in segment["tokens"]]
    assert shown == updates[2][0].trajectories[0].tokens

    # The same again at the same step: another file, and the first is as it was.
    first = failure.read_bytes()
    updates.extend([updates[0], updates[0]])
    refusal(capsys, words)
    assert len(list((tmp_path / "run" / "failures").iterdir())) == 2
    assert failure.read_bytes() == first

    # Where nothing can be written the cause is told all the same.
    shutil.rmtree(failure.parent)
    failure.parent.write_text("in the way")
    updates.extend([updates[0], updates[0]])
    said = refusal(capsys, words)
    assert "step 3: " in said and "is nan" in said and "could not be written" in said


@pytest.fixture
def _collapsing(monkeypatch: pytest.MonkeyPatch) -> None:
    collapse_after_three_steps(monkeypatch.setattr)


@pytest.mark.usefixtures("_collapsing")
def test_a_collapse_stops_the_run_and_names_the_last_good_checkpoint(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "9", "--save-every", "2", "--collapse", "0.4", "--keep", "9"]
    said = refusal(capsys, flags(letters, tmp_path / "run", *words))
    assert "collapsed: at step 5" in said and "that of step 3" in said and "step-000002" in said
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004"]
    assert "collapsed: at step 5" in refusal(capsys, flags(letters, tmp_path / "run", *words))


@pytest.mark.usefixtures("_collapsing")
def test_a_run_goes_back_to_the_last_good_checkpoint_and_on(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[int, dict[str, torch.Tensor]] = {}
    update = Learner.update

    def watched(self: Learner, groups: Sequence[Group]) -> dict[str, float]:
        step = groups[0].episode // 4 + 1
        begun[step] = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return update(self, groups)

    monkeypatch.setattr(Learner, "update", watched)
    words = ["--save-every", "2", "--collapse", "0.4", "--on-collapse", "rollback", "--keep", "9"]
    main(flags(letters, tmp_path / "run", *words, "--steps", "7"))
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-000002")
    assert all(torch.equal(begun[6][n], p) for n, p in kept.named_parameters())
    assert not all(torch.equal(begun[5][n], p) for n, p in kept.named_parameters())
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 8))
    # Saved at once, so that no later set-back takes a checkpoint of the decline for a good one.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-000005")
    ours = dict(again.named_parameters())
    assert all(torch.equal(ours[n], p) for n, p in kept.named_parameters())

    main(flags(letters, tmp_path / "parts", *words, "--steps", "4"))
    main(flags(letters, tmp_path / "parts", *words, "--steps", "7"))
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "run")
