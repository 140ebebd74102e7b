"""Prompt templates of one's own, wherever an environment is made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import research_env  # noqa: F401  (registers the ids)
from research_env.env import SearchQAEnv
from research_env.errors import ConfigurationError, DataError, ResearchEnvError, UnknownNameError
from research_env.papers import PROTOCOLS
from research_env.sessions import Sessions
from research_env.templates import own_template
from tests.research_env.fakes import DATASET, Engine, answer

TEXT = "Be brief. Q: {question} {not a place}\n<think>"
JSONL = (
    '{"role": "system", "content": "Be brief."}\n\n{"role": "user", "content": "Q: {question}"}\n'
)
YAML = "- role: system\n  content: Be brief.\n- {role: user, content: 'Q: {question}'}\n"
CHAT = (("system", "Be brief."), ("user", "Q: {question}"))


def make(**settings: Any) -> SearchQAEnv:
    return SearchQAEnv(dataset=DATASET, retriever=Engine(), **settings)


def test_a_text_a_file_and_messages_are_taken(tmp_path: Path) -> None:
    files = {"t.txt": TEXT, "t.md": TEXT, "named": TEXT, "c.jsonl": JSONL, "c.yaml": YAML}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        expected = CHAT if name.startswith("c") else (("user", TEXT),)
        assert own_template(str(tmp_path / name)) == expected
    assert own_template(TEXT) == (("user", TEXT),)
    assert own_template("Answer {question}") == (("user", "Answer {question}"),)
    assert own_template([{"role": role, "content": text} for role, text in CHAT]) == CHAT
    for name in ("base", "instruct", "question", "no-such-name"):
        assert own_template(name) is None


def test_a_file_of_another_editor_is_read_as_the_same_text(tmp_path: Path) -> None:
    """As Notepad saves it: with a byte order mark, and with CR before LF."""
    for name, text in {"t.txt": TEXT, "c.jsonl": JSONL, "c.yaml": YAML}.items():
        (tmp_path / name).write_text(text.replace("\n", "\r\n"), "utf-8-sig", newline="")
        expected = CHAT if name.startswith("c") else (("user", TEXT),)
        assert own_template(str(tmp_path / name)) == expected


def test_only_line_feeds_end_a_line_of_messages(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(
        '{"role": "user", "content": "A\u2028B\x85C {question}"}\n', encoding="utf-8"
    )
    assert own_template(str(tmp_path / "c.jsonl")) == (("user", "A\u2028B\x85C {question}"),)


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_every_protocol_takes_it(protocol: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(YAML, encoding="utf-8")
    for template, prompt in (
        (TEXT, TEXT),
        (str(tmp_path / "c.yaml"), "Be brief.\n\nQ: {question}"),
    ):
        env = make(protocol=protocol, template=template)
        observation, info = env.reset(seed=0)
        question = info["question"]
        assert observation == prompt.replace("{question}", question)
        assert info["messages"][-1]["role"] == "user"
        assert len(info["messages"]) == (1 if template == TEXT else 2)
        env.step("x")


def test_a_question_is_put_in_as_it_is() -> None:
    env = make(template="{question} and {question}")
    odd = DATASET.questions[0].question
    assert env.reset(options={"question_id": "q0"})[0] == f"{odd} and {odd}"


def test_gymnasium_sessions_and_vector_environments_take_it(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(TEXT, encoding="utf-8")
    for template in (TEXT, str(file)):
        env = gym.make("ReSearch-MiniWorld-v0", template=template)
        prompt, info = env.reset(seed=0)
        assert prompt == TEXT.replace("{question}", info["question"])
        again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))  # type: ignore[union-attr]
        assert again.reset(seed=0)[0] == prompt
        vector = gym.make_vec("ReSearch-MiniWorld-v0", num_envs=2, template=template)
        assert vector.reset(seed=0)[0][0] == prompt
        with Sessions(dataset="miniworld", template=template) as sessions:
            assert sessions.tasks()[0]["prompt"] == prompt
        for each in (env, again, vector):
            each.close()


def test_provenance_tells_templates_apart_and_not_their_places(tmp_path: Path) -> None:
    named = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
        named.append(make(template=str(tmp_path / name)).fingerprints()["template"])
    assert named[0] == named[1] == make(template=TEXT).fingerprints()["template"]
    assert named[0].startswith("own, sha256 ")
    assert make(template=TEXT + "!").fingerprints()["template"] != named[0]
    assert make().fingerprints()["template"] != named[0]


def test_a_chat_of_ones_own_may_open_a_thought() -> None:
    """As after `instruct`: the chat template may have opened it, and the format holds."""
    template = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{question}"},
    ]
    env = make(template=template)
    env.reset(seed=0, options={"question_id": "q1"})
    assert env.step(answer("Founder 1").removeprefix("<think>")).info["metrics"]["format"] == 1.0


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("Answer the question, please.", ConfigurationError, "write {question} there"),
        ("no-such-name", UnknownNameError, "unknown template 'no-such-name'; known: base, inst"),
        ("missing.txt", DataError, "the template missing.txt cannot be read"),
        ("missing.yaml", DataError, "the template missing.yaml cannot be read"),
        (3, UnknownNameError, "unknown template 3"),
        ([], ConfigurationError, "a chat is a list of messages with role and content"),
        (["x"], ConfigurationError, "message 1 has a role and a content"),
        ([{"role": "user"}], ConfigurationError, "message 1 has a role and a content"),
        ([{"role": "user", "content": "x"}], ConfigurationError, "write {question} there"),
        ([{"role": "tool", "content": "{question}"}], ConfigurationError, "the role 'tool'; it is"),
    ],
)
def test_an_invalid_template_is_refused_at_once(
    template: Any, error: type[ResearchEnvError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(template=template)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "no place", r"t.txt: the template does not say where the question goes"),
        ("t.txt", b"\xff", r"t.txt cannot be read"),
        ("t.jsonl", '{"role": "user"\n', r"t.jsonl:1: not a line of JSON"),
        ("t.jsonl", "[" * 100_000, r"t.jsonl:1: not a line of JSON"),
        ("t.jsonl", "", r"t.jsonl: a chat is a list of messages"),
        ("t.yaml", "- [", r"t.yaml is not YAML"),
        ("t.yaml", "- !!python/object/apply:os.system ['true']", r"t.yaml is not YAML"),
        ("t.yaml", "role: user", r"t.yaml: a chat is a list of messages"),
        ("t.yaml", "- {role: user, content: 3}", r"t.yaml: message 1 has a role and a content"),
    ],
)
def test_an_invalid_template_file_is_refused_by_name(
    name: str, text: str | bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ResearchEnvError, match=message):
        make(template=str(file))


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.yaml"])
def test_pipes_and_huge_files_are_not_read(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is no regular file"):
        make(template=str(tmp_path / name))
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 3 << 30)
    with pytest.raises(DataError, match=f"{name} has more than 16 MiB"):
        make(template=str(tmp_path / name))
