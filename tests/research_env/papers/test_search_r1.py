"""Search-R1's two rewards, case by case; each case says why.

``S`` is a thought and a search, ``end("X")`` a thought and the answer X. The columns are: search-r1
(exact match), then search-r1-format (1 right; 0.8 right, but broken; 0.2 wrong in the format; 0.1
wrong and broken; 0 no answer).
"""

# ruff: noqa: E501  (a case a line)

from __future__ import annotations

import pytest

from research_env import SEARCH_R1
from research_env.rewards import resolve_reward
from tests.research_env.playing import play

T = "<think>hm</think>"
S = "<think>hm</think>\n<search>capital France</search>"
NAMES = ("search-r1", "search-r1-format")
RIGHT = (1, 1)
RIGHT_BUT_BROKEN = (1, 0.8)
WRONG = (0, 0.2)
WRONG_AND_BROKEN = (0, 0.1)
NO_ANSWER = (0, 0)


def end(answer: str) -> str:
    return f"<think>So.</think>\n<answer> {answer} </answer>"


PARIS = ("Paris",)
Case = tuple[str, tuple[str, ...], list[str], tuple[float, float]]
# fmt: off
CASES: list[Case] = [
    # --- clean trajectories
    ("no search, right", PARIS, [end("Paris")], RIGHT),
    ("no search, wrong", PARIS, [end("Rome")], WRONG),
    ("one search, right", PARIS, [S, end("Paris")], RIGHT),
    ("one search, wrong", PARIS, [S, end("Rome")], WRONG),
    ("four searches, the most allowed", PARIS, [S] * 4 + [end("Paris")], RIGHT),
    ("no white space between the tags", PARIS, [f"{T}<search>q</search>", f"{T}<answer>Paris</answer>"], RIGHT),
    ("much white space between the tags", PARIS, [f"\n {T}\n\n\t<search>q</search>", f"\n{T} \n<answer>Paris</answer>"], RIGHT),
    ("what follows the answer is never read", PARIS, [end("Paris") + "x <think> <answer>Rome</answer>"], RIGHT),
    ("what follows the search is never read", PARIS, [S + "<information>x</information> Paris", end("Paris")], RIGHT),
    ("an empty thought", PARIS, ["<think></think><answer>Paris</answer>"], RIGHT),
    ("a thought of many lines with angle brackets", PARIS, ["<think>a < b\n> c\n</think><answer>Paris</answer>"], RIGHT),
    ("an empty query finds nothing, and is in the format", PARIS, [f"{T}<search></search>", end("Paris")], RIGHT),
    ("the word assistant", PARIS, ["<think>an assistant</think><answer>Paris</answer>"], RIGHT),
    ("Chinese", ("巴黎",), [end("巴黎")], RIGHT),
    # --- the comparison
    ("any gold counts", ("Lutetia", "Paris"), [end("Paris")], RIGHT),
    ("case, article, punctuation", PARIS, [end("the PARIS.")], RIGHT),
    ("punctuation is deleted: 'U.S.' is 'us'", ("US",), [end("U.S.")], RIGHT),
    ("curly quotes stay", PARIS, [end("“Paris”")], WRONG),
    ("more words than the gold", PARIS, [end("Paris, France")], WRONG),
    ("fewer words than the gold", ("New York",), [end("York")], WRONG),
    ("words in another order", ("Barack Obama",), [end("Obama Barack")], WRONG),
    ("True is not yes", ("yes",), [end("True")], WRONG),
    ("yes for no", ("no",), [end("yes")], WRONG),
    ("an answer over ten words", ("a b c d e f g h i j k l",), [end("b c d e f g h i j k l")], RIGHT),
    ("a box is no format here: 'boxedparis'", PARIS, [end("\\boxed{Paris}")], WRONG),
    ("an empty answer", PARIS, ["<think>x</think><answer></answer>"], WRONG),
    ("both empty after normalization are equal", ("the",), [end("a")], RIGHT),
    ("the prompt's example is no answer of the policy's", ("Beijing",), [end("Paris")], WRONG),
    ("not even where it gives none", ("Beijing",), [T, T, T, T, T], NO_ANSWER),
    ("nor the 'and' of the hint", ("and",), [T, T, T, T, T], NO_ANSWER),
    # --- thoughts
    ("no thought before the answer", PARIS, ["<answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("no thought before the answer, wrong", PARIS, ["<answer>Rome</answer>"], WRONG_AND_BROKEN),
    ("no thought before the search", PARIS, ["<search>q</search>", end("Paris")], RIGHT_BUT_BROKEN),
    ("no thought after the search", PARIS, [S, "<answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("no thought after the search, wrong", PARIS, [S, "<answer>Rome</answer>"], WRONG_AND_BROKEN),
    ("two thoughts in a row", PARIS, [T + end("Paris")], RIGHT_BUT_BROKEN),
    ("a thought never closed", PARIS, ["<think>x<answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("a thought never opened", PARIS, ["x</think><answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("reversed tags of a thought", PARIS, ["</think>x<think><answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("a thought within a thought", PARIS, ["<think><think>x</think></think><answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("the search inside the thought", PARIS, ["<think>x<search>q</search>", "</think>" + end("Paris")], RIGHT_BUT_BROKEN),
    # --- text outside the tags
    ("text before the thought", PARIS, ["Well. " + end("Paris")], RIGHT_BUT_BROKEN),
    ("text before the thought, wrong", PARIS, ["Well. " + end("Rome")], WRONG_AND_BROKEN),
    ("text between thought and answer", PARIS, [f"{T} so <answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("text between thought and search", PARIS, [f"{T} so <search>q</search>", end("Paris")], RIGHT_BUT_BROKEN),
    ("text after the results", PARIS, [S, "I see. " + end("Paris")], RIGHT_BUT_BROKEN),
    ("a full stop is text", PARIS, [f"{T}.<answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    # --- odd tags
    ("an information block of the policy's own", PARIS, ["<information>x</information>" + end("Paris")], RIGHT_BUT_BROKEN),
    ("one in place of a search", PARIS, [f"{T}<information>x</information>" + end("Paris")], RIGHT_BUT_BROKEN),
    ("a closing tag too many", PARIS, ["</information>" + end("Paris")], RIGHT_BUT_BROKEN),
    ("a search opened twice: the query holds a tag", PARIS, [f"{T}<search><search>q</search>", end("Paris")], RIGHT_BUT_BROKEN),
    ("a search opened and not closed before the answer", PARIS, [f"{T}<search>q<answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("an answer opened twice: the tag is in the answer", PARIS, [f"{T}<answer><answer>Paris</answer>"], WRONG_AND_BROKEN),
    ("an answer opened before a search runs on to its end", PARIS, [f"{T}<answer><search>q</search>", end("Paris")], WRONG_AND_BROKEN),
    ("a tag of ReSearch's is text inside a thought", PARIS, ["<think><result></think><answer>Paris</answer>"], RIGHT),
    ("and outside it breaks the format", PARIS, [f"{T}<result></result><answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("upper-case tags are text", PARIS, ["<THINK>x</THINK><answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("a tag with a space is text", PARIS, ["<think >x</think ><answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    # --- invalid actions, and the hint
    ("an invalid action gets a hint, which breaks the format", PARIS, [T, end("Paris")], RIGHT_BUT_BROKEN),
    ("an invalid action, then wrong", PARIS, [T, end("Rome")], WRONG_AND_BROKEN),
    ("nothing at all, then right", PARIS, ["", end("Paris")], RIGHT_BUT_BROKEN),
    ("a thought left open over the hint", PARIS, ["<think>x", "y</think><answer>Paris</answer>"], RIGHT_BUT_BROKEN),
    ("a search closed, never opened, is invalid", PARIS, [f"{T}q</search>", end("Paris")], RIGHT_BUT_BROKEN),
    ("an answer closed, never opened, is invalid", PARIS, [f"{T}Rome</answer>", end("Paris")], RIGHT_BUT_BROKEN),
    ("an answer never closed, then a good one: runs from the first mark", PARIS, [f"{T}<answer>x", end("Paris")], WRONG_AND_BROKEN),
    ("reversed answer tags", PARIS, [f"{T}</answer>", "Paris<answer>", end("Paris")], WRONG_AND_BROKEN),
    # --- no answer
    ("nothing but thoughts to the last turn", PARIS, [T] * 5, NO_ANSWER),
    ("a fifth search is refused", PARIS, [S] * 5, NO_ANSWER),
    ("an answer never closed to the last turn", PARIS, [S, S, S, S, T + "<answer>Paris"], NO_ANSWER),
    ("not over yet", PARIS, [S], NO_ANSWER),
    ("not begun", PARIS, [], NO_ANSWER),
    ("NUL and a lone surrogate in the thought", PARIS, ["<think>\x00\ud800</think><answer>Paris</answer>"], RIGHT),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_reward_of_a_case(case: Case) -> None:
    _why, golds, actions, expected = case
    episode = play("search-r1", actions, golds)
    scores = tuple(resolve_reward(name)(episode) for name in NAMES)
    assert scores == pytest.approx(expected, abs=1e-9)


def test_the_hint_holds_an_answer_span_which_the_cases_above_must_not_count() -> None:
    assert "<answer> and </answer>" in (SEARCH_R1.hint or "")
