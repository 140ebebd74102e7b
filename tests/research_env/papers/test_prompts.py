"""The papers' prompts: exact texts, by digest and by what a reader can check."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_env import SEARCH_R1
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.papers import PROTOCOLS, resolve_protocol
from research_env.protocol import Protocol

QUESTION = "Who was president when Citibank was founded?"

# First 16 hex digits of the SHA-256 of the prompt for "Q?", taken from the authors' own functions.
DIGESTS = {
    ("research", "base"): "52ef604b14f413b3",
    ("research", "instruct"): "2fa246a67fd47ab7",
    ("r1-searcher", "base"): "c1b5afb8e05f3511",
    ("r1-searcher", "instruct"): "89df1f71c10526ff",
    ("search-r1", "base"): "5477ed3a877077e6",
    ("search-r1", "instruct"): "5477ed3a877077e6",
    ("recall", "base"): "e945aa80ca3c8caa",
    ("recall", "instruct"): "75168c36cd9ee24c",
}


@pytest.mark.parametrize(("protocol", "template"), DIGESTS)
def test_the_prompts_are_the_authors_to_the_letter(protocol: str, template: str) -> None:
    text = PROTOCOLS[protocol].prompt(template, "Q?")
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[protocol, template]


def test_instruct_messages_have_the_roles_of_the_authors_code() -> None:
    def roles(protocol: str) -> list[str]:
        return [message["role"] for message in PROTOCOLS[protocol].messages("instruct", QUESTION)]

    assert roles("research") == ["system", "user"]
    assert roles("r1-searcher") == ["system", "user", "assistant"]
    assert roles("search-r1") == ["user"]
    assert PROTOCOLS["research"].messages("instruct", QUESTION)[1]["content"] == QUESTION
    assert PROTOCOLS["r1-searcher"].messages("instruct", QUESTION)[2]["content"] == "<think>"


@pytest.mark.parametrize("rules", [*PROTOCOLS.values(), replace(SEARCH_R1, prompts={})])
def test_every_protocol_has_the_bare_question(rules: Protocol) -> None:
    assert rules.prompt("question", QUESTION) == f"{QUESTION}\n"
    assert rules.messages("question", "q") == [{"role": "user", "content": "q\n"}]


@pytest.mark.parametrize(
    ("question", "shown"),
    [("who is it", "who is it?"), ("  who is it?  ", "who is it?"), ("", "?"), ("why??", "why??")],
)
def test_search_r1_completes_the_question(question: str, shown: str) -> None:
    assert (
        PROTOCOLS["search-r1"].prompt("base", question).endswith(f"</answer>. Question: {shown}\n")
    )


@pytest.mark.parametrize("template", ["base", "instruct"])
@pytest.mark.parametrize("protocol", ["research", "r1-searcher"])  # search-r1 adds a mark
@given(question=st.text(max_size=30) | st.sampled_from(["{question}", "{0}", "{", "%s", "\\1"]))
def test_nothing_in_a_question_is_syntax(protocol: str, template: str, question: str) -> None:
    marked = PROTOCOLS[protocol].prompt(template, "\N{SNOWMAN}")
    assert PROTOCOLS[protocol].prompt(template, question) == marked.replace("\N{SNOWMAN}", question)


def test_a_protocol_of_ones_own_may_bring_its_prompt() -> None:
    mine = replace(
        SEARCH_R1, name="mine", prompts={"base": (("user", "Find {question}!"),)}, asker=str
    )
    assert mine.prompt("base", "it") == "Find it!"


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown template 'bse'.*instruct.*'base'"):
        PROTOCOLS["research"].prompt("bse", "q")
    with pytest.raises(UnknownNameError, match=r"unknown protocol 'reserch'.*r1-searcher"):
        resolve_protocol("reserch")
    for name, message in (
        ("no.module:X", "cannot import the protocol 'no.module:X'"),
        (f"{__name__}:PROTOCOLS", "which is no Protocol"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            resolve_protocol(name)
    with pytest.raises(UnknownNameError, match=r"template of the protocol 'mine'.*question"):
        replace(SEARCH_R1, name="mine", prompts={}).messages("base", "q")


MINE = replace(PROTOCOLS["research"], name="mine", max_searches=1)


def test_a_protocol_of_ones_own_is_named_by_its_module() -> None:
    assert resolve_protocol(f"{__name__}:MINE") is MINE
    env = gym.make("ReSearch-MiniWorld-v0", protocol=f"{__name__}:MINE")
    env.reset(seed=0)
    *_, truncated, info = env.step("<search>a company</search>")
    assert not truncated and info["query"] == "a company"
    *_, truncated, info = env.step("<search>a company</search>")
    assert truncated and info["stop_reason"] == "max_searches"
    env.close()
