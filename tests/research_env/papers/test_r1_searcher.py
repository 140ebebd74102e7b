"""R1-Searcher's rewards, case by case; each case says why.

The prompt ends in ``<think>``, so a good response has none. ``S`` is a search, ``end("X")`` the
paper's way to answer X. The columns are: stage 1 (1 or -1 for covering the gold, 0.5 for having
searched, 0.5 for the format), then stage 2 with F1, with cover exact match, with exact match (each
less 2 when the format is broken).
"""

# ruff: noqa: E501  (a case a line)

from __future__ import annotations

import pytest

from research_env.env import SearchQAEnv
from research_env.rewards import resolve_reward
from tests.research_env.fakes import DATASET, Engine
from tests.research_env.playing import play

S = "hm <|begin_of_query|> capital France<|end_of_query|>"
NAMES = (
    "r1-searcher-stage1",
    "r1-searcher-stage2",
    "r1-searcher-stage2-cem",
    "r1-searcher-stage2-em",
)


def end(answer: str) -> str:
    return f"So.</think>\n\n<answer> {answer} </answer>"


PARIS = ("Paris",)
Case = tuple[str, tuple[str, ...], list[str], tuple[float, ...]]
# fmt: off
CASES: list[Case] = [
    # --- clean trajectories
    ("one search, right: 1 + .5 + .5", PARIS, [S, end("Paris")], (2, 1, 1, 1)),
    ("one search, wrong: -1 + .5 + .5", PARIS, [S, end("Rome")], (0, 0, 0, 0)),
    ("no search, right: no .5 for retrieval", PARIS, [end("Paris")], (1.5, 1, 1, 1)),
    ("no search, wrong: stage 2 asks for no search", PARIS, [end("Rome")], (-0.5, 0, 0, 0)),
    ("three searches", PARIS, [S, S, S, end("Paris")], (2, 1, 1, 1)),
    ("eight searches, the most allowed", PARIS, [S] * 8 + [end("Paris")], (2, 1, 1, 1)),
    ("partly right, all of the gold: P 1/2, R 1", ("Obama",), [S, end("Barack Obama")], (2, 2 / 3, 1, 0)),
    ("partly right, part of the gold: P 1, R 1/2", ("Barack Obama",), [S, end("Obama")], (0, 2 / 3, 0, 0)),
    ("partly right: P 2/3, R 2/3", ("New York State",), [S, end("New York City")], (0, 2 / 3, 0, 0)),
    ("the words of the gold in another order are covered", ("Barack Obama",), [S, end("Obama, Barack")], (2, 1, 1, 0)),
    ("only the first gold counts", ("Lutetia", "Paris"), [S, end("Paris")], (0, 0, 0, 0)),
    ("text after the answer is free", PARIS, [S, end("Paris") + " Done."], (2, 1, 1, 1)),
    ("white space round the response is free", PARIS, ["\n " + S, end("Paris") + "\n"], (2, 1, 1, 1)),
    ("text before the thought ends is free", PARIS, [S, "Long. Text. " + end("Paris")], (2, 1, 1, 1)),
    ("an empty answer", PARIS, [S, end("")], (0, 0, 0, 0)),
    ("a box is no format here: 'boxed paris' has P 1/2", PARIS, [S, end("\\boxed{Paris}")], (2, 2 / 3, 1, 0)),
    # --- its normalization
    ("a hyphen is a space: 'well known'", ("well known",), [S, end("well-known")], (2, 1, 1, 1)),
    ("which SQuAD would delete: 'wellknown' is two words off", ("wellknown",), [S, end("well-known")], (0, 0, 0, 0)),
    ("full stops are spaces: 'u s' is not 'us'", ("US",), [S, end("U.S.")], (0, 0, 0, 0)),
    ("an underscore is a space", ("New York",), [S, end("New_York")], (2, 1, 1, 1)),
    ("a curly apostrophe is a space: 'rock n roll'", ("rock n roll",), [S, end("rock’n’roll")], (2, 1, 1, 1)),
    ("opening curly quote, acute and grave accents, too", ("x y z",), [S, end("‘x´y`z")], (2, 1, 1, 1)),
    ("curly double quotes are not in the list", PARIS, [S, end("“Paris”")], (0, 0, 0, 0)),
    ("article and case", ("the Beatles",), [S, end("THE BEATLES")], (2, 1, 1, 1)),
    ("an article set free by punctuation: 'a.m.' becomes 'm'", ("m",), [S, end("a.m.")], (2, 1, 1, 1)),
    ("True is yes", ("yes",), [S, end("True")], (2, 1, 1, 1)),
    ("False is no", ("no",), [S, end("False")], (2, 1, 1, 1)),
    ("a gold of True is yes", ("True",), [S, end("yes")], (2, 1, 1, 1)),
    ("true, written small, is not", ("yes",), [S, end("true")], (0, 0, 0, 0)),
    ("'True.' is not True", ("yes",), [S, end("True.")], (0, 0, 0, 0)),
    ("yes for no", ("no",), [S, end("yes")], (0, 0, 0, 0)),
    ("'yes it is' covers yes, but its F1 is 0 by HotpotQA's rule", ("yes",), [S, end("yes it is")], (2, 0, 1, 0)),
    ("both empty after normalization: covered and equal, F1 0", ("the",), [S, end("a")], (2, 0, 1, 1)),
    # --- the answer
    ("ten words are allowed: P 1/10, R 1", PARIS, [S, end("Paris b c d e f g h i j")], (2, 2 / 11, 1, 0)),
    ("eleven are not: P 1/11, R 1", PARIS, [S, end("Paris b c d e f g h i j k")], (2, 2 / 12 - 2, -1, -2)),
    ("words are counted before normalization: ten marks and a word", PARIS, [S, end("Paris . . . . . . . . . .")], (2, -1, -1, -1)),
    ("no answer", PARIS, [S, "So.</think> Paris"], (-0.5, -2, -2, -2)),
    ("an answer never closed", PARIS, [S, "So.</think><answer>Paris"], (-0.5, -2, -2, -2)),
    ("an answer never opened", PARIS, [S, "So.</think>Paris</answer>"], (-0.5, -2, -2, -2)),
    ("reversed tags are one each, and what follows the opening one counts", PARIS, [S, "</think></answer><answer>Paris"], (2, 1, 1, 1)),
    ("two answers: the last counts, and the format is broken", PARIS, [S, "</think><answer>Rome</answer><answer>Paris</answer>"], (1.5, -1, -1, -1)),
    ("two answers, the last wrong", PARIS, [S, "</think><answer>Paris</answer><answer>Rome</answer>"], (-0.5, -2, -2, -2)),
    ("an answer within an answer", PARIS, [S, "</think><answer>x <answer>Paris</answer></answer>"], (1.5, -1, -1, -1)),
    ("an answer inside the thought is allowed", PARIS, [S, "<answer>Paris</answer></think>"], (2, 1, 1, 1)),
    ("the name of the query mark in the answer: P 1/5, R 1", PARIS, [S, end("Paris begin_of_query")], (2, 2 / 5 - 2, -1, -2)),
    ("the name of the documents mark in the answer", PARIS, [S, end("Paris begin_of_documents")], (2, 2 / 5 - 2, -1, -2)),
    ("the same names in the thought are fine", PARIS, [S, "begin_of_query? " + end("Paris")], (2, 1, 1, 1)),
    ("markdown in the answer is punctuation", PARIS, [S, end("**Paris**")], (2, 1, 1, 1)),
    ("upper-case tags are no tags", PARIS, [S, "</think><ANSWER>Paris</ANSWER>"], (-0.5, -2, -2, -2)),
    # --- the thought
    ("a think tag of its own, where the prompt has one", PARIS, ["<think>" + S, end("Paris")], (1.5, -1, -1, -1)),
    ("no end of the thought", PARIS, [S, "<answer>Paris</answer>"], (1.5, -1, -1, -1)),
    ("no end of the thought, and wrong", PARIS, [S, "<answer>Rome</answer>"], (-0.5, -2, -2, -2)),
    ("two ends", PARIS, ["a</think>" + S, end("Paris")], (1.5, -1, -1, -1)),
    ("the thought ends before the search: only the number counts", PARIS, ["a</think>" + S, "<answer>Paris</answer>"], (2, 1, 1, 1)),
    # --- queries and documents
    ("a query never closed", PARIS, ["<|begin_of_query|> q" + end("Paris")], (1.5, -1, -1, -1)),
    ("a query closed, never opened, ends the episode", PARIS, ["q<|end_of_query|>"], (-1, -2, -2, -2)),
    ("an empty query ends the episode", PARIS, ["<|begin_of_query|> <|end_of_query|>"], (-1, -2, -2, -2)),
    ("a query of double quotes is empty", PARIS, ['<|begin_of_query|>""<|end_of_query|>'], (-1, -2, -2, -2)),
    ("an empty query after the answer: broken, and the answer stands", PARIS, [S, end("Paris") + "<|begin_of_query|><|end_of_query|>"], (1.5, -1, -1, -1)),
    ("a query opened twice", PARIS, ["<|begin_of_query|>" + S, end("Paris")], (1.5, -1, -1, -1)),
    ("a query opened after the answer", PARIS, [S, end("Paris") + "<|begin_of_query|>"], (1.5, -1, -1, -1)),
    ("documents of its own invention", PARIS, [S, "<|begin_of_documents|>\n(1)x\n<|end_of_documents|>\n\n" + end("Paris")], (1.5, -1, -1, -1)),
    ("an opening mark of documents alone", PARIS, [S, "<|begin_of_documents|>" + end("Paris")], (1.5, -1, -1, -1)),
    ("a closing mark of documents alone", PARIS, [S, "<|end_of_documents|>" + end("Paris")], (1.5, -1, -1, -1)),
    ("an invented query's documents in balance: nothing is out of count", PARIS, [S, "<|begin_of_documents|>\n(1)x<|end_of_documents|>\n\n" + end("Paris") + "<|begin_of_query|><|end_of_query|>"], (2, 1, 1, 1)),
    ("a ninth search is refused: no answer, and a query without documents", PARIS, [S] * 9, (-1, -2, -2, -2)),
    ("a ninth search after an answer: the answer stands", PARIS, [S] * 8 + [end("Paris") + S], (1.5, -1, -1, -1)),
    ("Search-R1's tags are plain text here", PARIS, ["<search>q</search>" + end("Paris")], (1.5, 1, 1, 1)),
    # --- words and scripts that stage 2 forbids
    ("the word assistant", PARIS, ["As an assistant, " + S, end("Paris")], (2, -1, -1, -1)),
    ("the word Assistant", PARIS, ["Assistant: " + S, end("Paris")], (2, -1, -1, -1)),
    ("it counts inside another word", PARIS, [S, end("assistants")], (0, -2, -2, -2)),
    ("in the query, too", PARIS, ["<|begin_of_query|> assistant coach<|end_of_query|>", end("Paris")], (2, -1, -1, -1)),
    ("ASSISTANT is not looked for", PARIS, ["ASSISTANT " + S, end("Paris")], (2, 1, 1, 1)),
    ("a Chinese character in the thought", PARIS, ["巴" + S, end("Paris")], (2, -1, -1, -1)),
    ("in the answer, though it is right", ("巴黎",), [S, end("巴黎")], (2, -1, -1, -1)),
    ("in the query", PARIS, ["<|begin_of_query|> 巴黎<|end_of_query|>", end("Paris")], (2, -1, -1, -1)),
    ("after the answer", PARIS, [S, end("Paris") + "完"], (2, -1, -1, -1)),
    ("Japanese kana and Korean are not looked for", PARIS, ["ひらがな 한국 " + S, end("Paris")], (2, 1, 1, 1)),
    ("nor full-width punctuation", PARIS, ["。，！" + S, end("Paris")], (2, 1, 1, 1)),
    ("Chinese between invented marks of documents is overlooked", PARIS, [S, "<|begin_of_documents|>\n(1)巴<|end_of_documents|>\n\n" + end("Paris") + "<|begin_of_query|><|end_of_query|>"], (2, 1, 1, 1)),
    # --- the end
    ("nothing at all", PARIS, [""], (-1, -2, -2, -2)),
    ("not over yet", PARIS, [S], (-0.5, -2, -2, -2)),
    ("NUL and a lone surrogate in the thought", PARIS, ["\x00\ud800" + S, end("Paris")], (2, 1, 1, 1)),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_reward_of_a_case(case: Case) -> None:
    _why, golds, actions, expected = case
    episode = play("r1-searcher", actions, golds)
    scores = tuple(resolve_reward(name)(episode) for name in NAMES)
    assert scores == pytest.approx(expected, abs=1e-9)


def test_llama_loses_one_and_for_fewer_things() -> None:
    score = resolve_reward("r1-searcher-stage2-llama")
    assert score(play("r1-searcher", [S, end("Paris")], PARIS)) == 1.0
    assert score(play("r1-searcher", ["As an assistant, " + S, end("Paris")], PARIS)) == 1.0
    assert score(play("r1-searcher", [S, "So. <answer>Paris</answer>"], PARIS)) == 0.0
    assert score(play("r1-searcher", [S, "So.</think> Paris"], PARIS)) == -1.0
    assert score(play("r1-searcher", ["巴" + S, end("Rome")], PARIS)) == -1.0


def test_a_search_that_finds_nothing_costs_nothing() -> None:
    """The authors' dense engine always finds something; an empty result would cost 2 there."""
    episode = play("r1-searcher", [S, end("Paris")], hits=())
    assert "None" in episode.turns[0].observation
    scores = tuple(resolve_reward(name)(episode) for name in NAMES)
    assert scores == (2.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("I know it. </think> <answer> Founder 1 </answer>", 1.0),  # the chat template opened it
        ("<think> I know it. </think> <answer> Founder 1 </answer>", 1.0),
        ("<think> I know. </think> <think> it. </think> <answer> Founder 1 </answer>", -1.0),
        ("<answer> Founder 1 </answer>", -1.0),
    ],
)
def test_a_chat_of_ones_own_needs_one_thought(response: str, reward: float) -> None:
    chat = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "{question}"}]
    env = SearchQAEnv(dataset=DATASET, retriever=Engine(), protocol="r1-searcher", template=chat)
    env.reset(options={"question_id": "q1"})
    assert env.step(response).reward == reward
