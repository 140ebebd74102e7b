"""The warm start: what is learned from demonstrations, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from research_agent.batch import make_batch
from research_agent.cli import main
from research_agent.demonstrations import as_trajectory
from research_agent.errors import CheckpointError, ConfigError, ContextError, FolderInUseError
from research_agent.models.policy import load_model
from research_agent.phrase_tokenizer import phrase_tokenizer
from research_agent.renderer import Renderer, load_renderer
from research_agent.sft import SFTConfig, run
from research_agent.system.files import folder_lock
from research_agent.trajectory import Group
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_llama
from tests.research_agent.disks import small_disk

Parts = list[tuple[str, str]]
HERE = __name__
# The action depends on the prompt, the observation on nothing that is learned.
A: Parts = [("prompt", "a="), ("action", "A!"), ("observation", "?b="), ("action", "B!")]
B: Parts = [("prompt", "b="), ("action", "B!"), ("observation", "?a="), ("action", "A!")]


def letters() -> list[str]:
    return list("abcABC=!?")


def both(count: int, seed: int, good: bool = True) -> Iterator[Parts]:
    """Demonstrations without end; more than ``count`` of them are not to be asked for."""
    for i in range(count + 1):
        if i == count:
            raise AssertionError("more demonstrations were taken than --count")
        yield A if i % 2 else B


def swapped(count: int, seed: int) -> Iterator[Parts]:
    """The other answer to each prompt."""
    pairs: list[Parts] = [
        [("prompt", "a="), ("action", "B!")],
        [("prompt", "b="), ("action", "A!")],
    ]
    return (pairs[i % 2] for i in range(count))


def half_long(count: int, seed: int) -> Iterator[Parts]:
    """Half of the answers are short, and half are long."""
    draw = random.Random(seed).random
    return (
        [("prompt", "c"), ("action", "A!" if draw() < 0.5 else "B" + "?b=" * 4)]
        for _ in range(count)
    )


def stopping(count: int, seed: int) -> Iterator[Parts]:
    """Stops who first asks for number 100 as Ctrl-C does, and kills who first asks for 150."""
    for i, parts in enumerate(both(count, seed)):
        if i in (100, 150) and not (mark := Path(os.environ["STOPPED"]) / str(i)).exists():
            mark.touch()
            if i == 150:
                raise PowerLossError
            os.kill(os.getpid(), signal.SIGINT)
        yield parts


class PowerLossError(Exception):
    """The machine lost its power."""


def nothing(count: int, seed: int) -> Parts:
    return []


def few(count: int, seed: int) -> list[Parts]:
    return [A] * 24


SMALL = SFTConfig(
    demonstrations=f"{HERE}:both",
    vocabulary=f"{HERE}:letters",
    count=1_600,
    hidden_size=16,
    layers=1,
    heads=2,
    context=32,
    batch=8,
    learning_rate=3e-2,
    warmup_steps=5,
    quiet=True,
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(replace(SMALL, output=tmp_path_factory.mktemp("sft") / "model"))


@pytest.fixture
def renderer() -> Renderer:
    return make_renderer(phrase_tokenizer(letters()))


def predictions(folder: Path, parts: Parts) -> list[tuple[str, float]]:
    """Each token of a demonstration but the first, with the model's probability for it."""
    renderer, model = load_renderer(folder), load_model(folder)
    tokens = as_trajectory(parts, renderer).tokens
    with torch.no_grad():
        probabilities = model(torch.tensor([tokens])).logits[0].softmax(-1)
    following = tokens[1:]
    told = [float(probabilities[at, token]) for at, token in enumerate(following)]
    return list(zip(renderer.tokenizer.convert_ids_to_tokens(following), told, strict=True))


# --- what is learned ------------------------------------------------------------------------------


def test_only_actions_are_in_the_loss_and_the_end_stands_at_the_end_only(
    renderer: Renderer,
) -> None:
    trajectory = as_trajectory(A, renderer)
    batch = make_batch([Group(0, [trajectory])])
    assert renderer.decode(batch.targets.tolist()) == "A!B!<|end|>"
    assert renderer.decode(trajectory.tokens) == "a=A!?b=B!<|end|>"
    assert [s.provenance for s in trajectory.segments] == [p for p, _ in A]
    cut = as_trajectory(A[:3], renderer)  # the environment has the last word: nothing ends there
    assert renderer.decode(cut.tokens) == "a=A!?b="


def test_the_model_that_comes_out_opens_and_has_learned_the_actions_alone(learned: Path) -> None:
    for parts in (A, B):
        told = predictions(learned, parts)
        actions = [told[i] for i in (1, 2, 6, 7, 8)]
        assert [token for token, _ in actions][-1] == "<|end|>"
        assert all(probability > 0.9 for _, probability in actions)
        others = [told[i] for i in (0, 3, 4, 5)]
        assert [token for token, _ in others][1] == "?"
        assert all(probability < 0.1 for _, probability in others)  # though "?" always follows
    tokenizer = load_renderer(learned).tokenizer
    after_first = dict(predictions(learned, [*A[:2], ("observation", "?")]))
    assert after_first["!"] > 0.9
    assert tokenizer.eos_token == "<|end|>"


def test_demonstrations_are_put_where_the_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []

    def record(groups: Any, device: Any = None) -> Any:
        put.append(device)
        return make_batch(groups, device)

    monkeypatch.setattr("research_agent.batch.make_batch", record)
    run(replace(SMALL, count=8, output=tmp_path / "model"))
    assert put == [torch.device("cpu")]


def test_short_answers_are_learned_more_often_where_batches_are_of_one_length(
    tmp_path: Path,
) -> None:
    def short(by_length: bool) -> float:
        config = replace(
            SMALL,
            demonstrations=f"{HERE}:half_long",
            batch=32,
            count=6_400,
            batch_by_length=by_length,
            decay_share=1.0,
            output=tmp_path / str(by_length),
        )
        return predictions(run(config), [("prompt", "c"), ("action", "A")])[0][1]

    assert 0.4 < short(by_length=False) < 0.6
    assert short(by_length=True) > 0.7


def test_the_same_command_gives_the_same_bits(tmp_path: Path) -> None:
    def made(name: str, seed: int) -> tuple[bytes, bytes]:
        small = ["--count", "24", "--hidden-size", "16", "--layers", "1", "--heads", "2", "--quiet"]
        main(["sft", "miniworld", *small, "--seed", str(seed), "--output", str(tmp_path / name)])
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        return weights, (tmp_path / name / "tokenizer.json").read_bytes()

    first = made("one", 1)
    assert made("two", 1) == first
    assert made("three", 2)[0] != first[0]


def test_a_file_is_read_again_until_the_count_and_not_beyond_it(
    tmp_path: Path, learned: Path
) -> None:
    """The same demonstrations from a file, be it short or long, make the same model."""
    for name, lines in (("short", 2), ("long", 1_000)):
        path = tmp_path / f"{name}.jsonl"
        rows = [json.dumps({"segments": A if i % 2 else B, "id": i}) for i in range(lines)]
        path.write_text("\n".join(rows) + "\n")
        made = run(replace(SMALL, demonstrations=str(path), output=tmp_path / name))
        weights = [folder / "model.safetensors" for folder in (made, learned)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_model_can_be_gone_on_with(learned: Path, tmp_path: Path) -> None:
    lesson = tmp_path / "lesson.jsonl"
    lesson.write_text(json.dumps({"segments": [["prompt", "c="], ["action", "C!"]]}) + "\n")
    more = replace(SMALL, model=str(learned), demonstrations=str(lesson), output=tmp_path / "more")
    taught: Parts = [("prompt", "c="), ("action", "C!")]
    before, after = (predictions(folder, taught)[1] for folder in (learned, run(more)))
    assert before[0] == after[0] == "C"
    assert before[1] < 0.5
    assert after[1] > 0.9


def test_adapters_learn_and_are_merged_into_the_linear_layers(
    learned: Path, tmp_path: Path
) -> None:
    start = replace(SMALL, model=str(learned), vocabulary=None, count=800, lora_rank=4)
    out = run(replace(start, demonstrations=f"{HERE}:swapped", output=tmp_path / "swapped"))
    asked = predictions(out, [("prompt", "a="), ("action", "B!")])
    assert [token for token, _ in asked[1:]] == ["B", "!", "<|end|>"]
    assert min(probability for _, probability in asked[1:]) > 0.9
    before, after = (load_model(folder).state_dict() for folder in (learned, out))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {n for n in after if n.endswith("proj.weight")}


# --- runs that are stopped ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "by length", "adapters"])
def test_a_run_that_is_stopped_and_one_that_dies_continue_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: Path, kind: str
) -> None:
    monkeypatch.setenv("STOPPED", str(tmp_path))
    by_length = kind == "by length"
    small = replace(SMALL, count=240, save_every=3, batch_by_length=by_length)
    if kind == "adapters":
        small = replace(small, model=str(learned), vocabulary=None, lora_rank=2)
    whole = run(replace(small, demonstrations=f"{HERE}:both", output=tmp_path / "whole"))
    parts = replace(small, demonstrations=f"{HERE}:stopping", output=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    (saved,) = (parts.output / "checkpoints").glob("step-*")
    assert saved.name == ("step-000000" if by_length else "step-000012")  # 16 batches at a time
    with pytest.raises(PowerLossError):
        run(parts)
    run(replace(parts, save_every=50))  # may change
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (parts.output / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in parts.output.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_that_continues_on_another_day_shows_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat template writes the date: prompts begin with b before midnight, and c after."""
    monkeypatch.setenv("STOPPED", str(tmp_path))
    tokenizer = byte_tokenizer()
    day = "{{ 'b' if strftime_now('%Y') == '2025' else 'c' }}"
    tokenizer.chat_template = day + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")
    dated = replace(
        SMALL, model=str(tmp_path / "model"), vocabulary=None, chat_template=True, count=240
    )

    def on(day: date) -> None:
        monkeypatch.setattr("research_agent.renderer.date", SimpleNamespace(today=lambda: day))

    on(date(2025, 12, 31))
    whole = run(replace(dated, output=tmp_path / "whole"))
    parts = replace(dated, demonstrations=f"{HERE}:stopping", output=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    on(date(2026, 1, 1))
    with pytest.raises(PowerLossError):
        run(parts)
    run(parts)
    weights = "model.safetensors"
    assert (parts.output / weights).read_bytes() == (whole / weights).read_bytes()


def test_ctrl_c_says_that_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STOPPED", str(tmp_path))
    words = ["--demonstrations", f"{HERE}:stopping", "--vocabulary", f"{HERE}:letters"]
    words += ["--model", "None", "--count", "120", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(["sft", "own", *words])
    assert ended.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    main(["sft", "own", *words])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_unfinished_run_of_other_settings_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOPPED", str(tmp_path))
    first = replace(SMALL, demonstrations=f"{HERE}:stopping", output=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(first)
    said = r"out holds an unfinished run .*\n  seed: 0 in the folder, 1 now\nGive the same .*delete"
    with pytest.raises(CheckpointError, match=said):
        run(replace(first, seed=1, quiet=False))
    (weights,) = (tmp_path / "out" / "checkpoints").glob("step-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*SHA-256.*start anew"):
        run(first)


def test_a_finished_model_is_not_made_again_nor_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, count=16, output=tmp_path / "out", quiet=False)
    weights = run(config) / "model.safetensors"
    made = weights.stat().st_mtime_ns, weights.read_bytes()
    capsys.readouterr()
    assert run(replace(config, save_every=7)) == config.output
    assert capsys.readouterr().out == f"{config.output} is finished\n"
    run(replace(config, quiet=True))
    assert capsys.readouterr().out == ""
    other = replace(config, seed=1)
    said = r"out holds a finished model .*:\n  seed: 0 in the folder, 1 now\nGive another --output"
    with pytest.raises(CheckpointError, match=said):
        run(other)
    inside = replace(SMALL, count=16, model=str(config.output), output=config.output)
    with pytest.raises(CheckpointError, match=r"model: None in the folder, '.*out' now"):
        run(inside)
    (config.output / "sft.json").unlink()
    with pytest.raises(CheckpointError, match=r"out holds a model without sft\.json.*--output"):
        run(config)
    assert (weights.stat().st_mtime_ns, weights.read_bytes()) == made
    (config.output / ".model.tmp").mkdir()  # the files of a model that were not yet moved
    run(other)
    assert weights.read_bytes() != made[1]
    assert not (config.output / ".model.tmp").exists()


def test_a_file_of_demonstrations_that_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    file, good = tmp_path / "d.jsonl", json.dumps({"segments": A}) + "\n"
    other, bad = json.dumps({"segments": B}) + "\n", "{}\n"
    config = replace(SMALL, demonstrations=str(file), count=24, save_every=1, output=tmp_path / "m")
    file.write_text(good * 20 + bad + good * 3)
    for _ in range(2):  # it continues to the same line
        with pytest.raises(ConfigError, match=r"d\.jsonl:21: .*mend the line"):
            run(config)
        assert (config.output / "checkpoints" / "step-000002").is_dir()
    file.write_text(other * 24)
    said = (
        "unfinished run .*\n  demonstrations_sha256: '[0-9a-f]{64}' in the folder, '.*' now\nGive"
    )
    with pytest.raises(CheckpointError, match=said):
        run(config)

    config = replace(config, output=tmp_path / "n")
    weights = run(config) / "model.safetensors"
    made = weights.read_bytes()
    assert run(config) == config.output
    file.write_text(good * 24)
    with pytest.raises(CheckpointError, match=r"finished model .*\n  demonstrations_sha256: '"):
        run(config)
    file.unlink()
    assert run(config) == config.output  # nothing says that it is another model
    assert weights.read_bytes() == made


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "out" / "checkpoints"),
        pytest.raises(FolderInUseError, match=r"writes to .*out.*another --output"),
    ):
        run(replace(SMALL, output=tmp_path / "out"))


def holding_the_lock(count: int, seed: int) -> Iterator[Parts]:
    """Ends the test in an error if a training run could begin in the folder now."""
    with pytest.raises(FolderInUseError), folder_lock(Path(os.environ["OUTPUT"])):
        pass
    return both(count, seed)


def test_neither_of_train_and_sft_writes_while_the_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with folder_lock(output), pytest.raises(FolderInUseError, match=r"writes to .*out;"):
        run(replace(SMALL, output=output))
    assert [path.name for path in output.iterdir()] == [".lock"]
    monkeypatch.setenv("OUTPUT", str(output))
    run(replace(SMALL, count=8, demonstrations=f"{HERE}:holding_the_lock", output=output))
    assert not (output / ".lock").exists()


def test_what_the_user_keeps_in_the_folder_of_checkpoints_stays(tmp_path: Path) -> None:
    own = [tmp_path / "out" / "checkpoints" / name for name in ("epoch1.pt", "step-7", ".hidden")]
    own[0].parent.mkdir(parents=True)
    for path in own:
        path.write_text("mine")
    with pytest.raises(ConfigError, match="no demonstrations"):
        run(replace(SMALL, demonstrations="nowhere.jsonl", output=tmp_path / "out"))
    assert sorted((tmp_path / "out").rglob("*")) == sorted([own[0].parent, *own])
    run(replace(SMALL, count=8, output=tmp_path / "out"))
    assert sorted(own[0].parent.iterdir()) == sorted(own)


# --- what is refused ------------------------------------------------------------------------------


GOOD = json.dumps({"segments": A})
BAD_LINES = [
    ("", "Expecting value"),
    ("{", "Expecting"),
    ("[]", "indices"),
    ("3", "not subscriptable"),
    ('{"parts": []}', "'segments'"),
    ('{"segments": 3}', "int"),
    ('{"segments": [["action"]]}', "unpack"),
    ('{"segments": [["prompt", "a", "b"]]}', "unpack"),
    ('{"segments": [["actoin", "a"]]}', "unknown provenance 'actoin'; known: prompt, action"),
    ('{"segments": [["action", null]]}', "NoneType"),
    ('{"segments": [["action", 7]]}', "int"),
    ('{"segments": [["action", "\\ud800"]]}', "surrogates"),
    ('{"segments": [["action", {"text": "a", "end": "\\ud800"}]]}', "surrogates"),
    ('{"segments": [["action", {"text": "a", "end": 3}]]}', r"Expected `str`, got `int` - .*end"),
    ('{"segments": [["action", {"end": "a"}]]}', "'text'"),
    ('{"segments": [["prompt", {"text": "a"}], ["action", "b"]]}', "'messages'"),
    ('{"segments": [["prompt", "a"]]}', "no action to learn"),
    ('{"segments": []}', "no action to learn"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ConfigError, match=rf"d\.jsonl:3: not .*{reason}.*; mend the line"):
        run(replace(SMALL, demonstrations=str(path), output=tmp_path / "out"))
    assert not any((tmp_path / "out").iterdir())


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"segments": [["action", "\xff"]]}\n')
    with pytest.raises(ConfigError, match=r"d\.jsonl:2: not .*utf-8.*; mend the line"):
        run(replace(SMALL, demonstrations=str(path), output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([("prompt", "a")], "no action"),
        ([], "no action"),
        ([("prompt", "a"), ("action", ""), ("observation", "b")], "no action"),
        ([("prompt", "a"), ("answer", "b"), ("action", "c")], "unknown provenance 'answer'"),
    ],
)
def test_a_demonstration_that_teaches_nothing_is_refused(
    renderer: Renderer, parts: Parts, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        as_trajectory(parts, renderer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"demonstrations": "nowhere.jsonl"}, r"no demonstrations at nowhere\.jsonl; give"),
        ({"demonstrations": "nowhere:f"}, "'nowhere:f' cannot be imported"),
        ({"demonstrations": f"{HERE}:nobody"}, "cannot be imported"),
        ({"demonstrations": "./a:b.jsonl"}, r"'\./a:b\.jsonl' cannot be imported: '\./a' is no na"),
        ({"demonstrations": ":f"}, "':f' cannot be imported: '' is no name of a module"),
        ({"demonstration_args": {"speed": 3}}, "both: .*'speed'.*; see --demonstration-args"),
        ({"vocabulary": None}, "needs --vocabulary .* or start from a --model"),
        ({"vocabulary": "nowhere:f"}, "'nowhere:f' cannot be imported"),
        ({"count": 7}, "--count 7 must be at least --batch 8"),
        ({"batch": 0}, "--batch is 0; it must be at least 1"),
        ({"layers": 0}, "--layers is 0; it must be at least 1"),
        ({"lora_rank": 4}, "--lora-rank is 4; give 0, or a rank beside a --model"),
        ({"model": "m", "lora_rank": -1}, "--lora-rank is -1; give 0"),
        ({"hidden_size": 18}, "--hidden-size 18 must be a multiple of twice --heads 2"),
        ({"heads": 5, "hidden_size": 20}, "--heads 5 must be 1 or an even number"),
        ({"learning_rate": 0.0}, r"--learning-rate 0\.0 .* must be above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"warmup_steps": -1}, "--warmup-steps is -1; it must not be negative"),
        ({"decay_share": -0.1}, r"--decay-share is -0\.1; it is a share, from 0 to 1"),
        ({"final_share": 1.5}, r"--final-share is 1\.5; it is a share, from 0 to 1"),
        ({"final_share": float("nan")}, "--final-share is nan; it is a share"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(replace(SMALL, output=tmp_path, **change))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(ConfigError, match=r"d\.jsonl is empty; give at least one demonstration"):
        run(replace(SMALL, demonstrations=str(tmp_path / "d.jsonl"), output=tmp_path))


def test_a_function_that_demonstrates_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing gives fewer demonstrations than --batch 8"):
        run(replace(SMALL, demonstrations=f"{HERE}:nothing", output=tmp_path / "out"))
    assert not any((tmp_path / "out").iterdir())


def test_a_function_that_gives_fewer_demonstrations_is_told_and_not_counted_as_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(SMALL, demonstrations=f"{HERE}:few")
    with pytest.warns(UserWarning, match=r"few gives .* 3 of 200 steps, .*; give --count 24"):
        run(replace(short, output=tmp_path / "1600"))
    run(replace(short, count=24, quiet=False, output=tmp_path / "24"))
    assert " after 3 steps, " in capsys.readouterr().out
    with pytest.warns(UserWarning, match="3 of 4 steps"):
        run(replace(short, count=39, quiet=False, output=tmp_path / "39"))
    assert " after 3 steps, " in capsys.readouterr().out


def test_a_demonstration_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match=r"of 10 tokens does not fit the context of 9; .*--con"):
        run(replace(SMALL, context=9, output=tmp_path))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_learned(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    taken = replace(SMALL, output=tmp_path / "file" / "model", demonstrations="nowhere.jsonl")
    with pytest.raises(NotADirectoryError, match="file/model"):
        run(taken)


def test_a_model_that_has_no_room_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    never = tmp_path / "never.jsonl"  # would be missed if it were opened
    with small_disk(tmp_path / "disk", 8) as disk:
        with pytest.raises(CheckpointError, match=r"No space left.*free some space"):
            run(replace(SMALL, output=disk / "model", demonstrations=str(never)))
        assert list((disk / "model").iterdir()) == []


# --- chat templates -------------------------------------------------------------------------------

CHAT_LINE = {
    "segments": [
        [
            "prompt",
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
        ],
        ["action", "Ann"],
    ]
}


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    tiny_llama().save_pretrained(tmp_path / "instruct")
    byte_tokenizer().save_pretrained(tmp_path / "instruct")
    return tmp_path / "instruct"


def fit(instruct: Path, line: object, **settings: Any) -> Path:
    path = instruct.parent / "demonstrations.jsonl"
    path.write_text(json.dumps(line) + "\n")
    config = SFTConfig(str(path), model=str(instruct), count=2, batch=2, quiet=True)
    return run(replace(config, output=instruct.parent / "learned", **settings))


def test_a_model_with_a_chat_template_is_not_learned_as_bare_text_unasked(instruct: Path) -> None:
    line = {"segments": [["prompt", "Who?"], ["action", "Ann"]]}
    with pytest.raises(ConfigError, match=r"has a chat template.*--chat-template.*--bare-text"):
        fit(instruct, line)
    assert fit(instruct, line, bare_text=True).is_dir()


def test_messages_are_learned_through_the_chat_template(instruct: Path) -> None:
    with pytest.raises(ConfigError, match="prompt is chat messages"):
        fit(instruct, CHAT_LINE, bare_text=True)
    assert fit(instruct, CHAT_LINE, chat_template=True).is_dir()
    renderer = make_renderer(byte_tokenizer(), chat_template=True)
    prompt, action = as_trajectory(CHAT_LINE["segments"], renderer).segments  # type: ignore[arg-type]
    assert renderer.decode(prompt.tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert renderer.decode(action.tokens) == "Ann<|im_end|>"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chat_template": True, "bare_text": True}, "exclude each other"),
        ({"chat_template_args": {"enable_thinking": False}}, "without --chat-template"),
        ({"chat_template": True, "model": None, "vocabulary": "x:y"}, "needs a --model"),
        ({"chat_template": True, "chat_template_date": "9 March"}, "write YYYY-MM-DD"),
    ],
)
def test_settings_of_chat_templates_that_contradict_are_refused(
    instruct: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        fit(instruct, CHAT_LINE, **settings)
