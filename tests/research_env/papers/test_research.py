r"""ReSearch's two rewards and the plain metrics, case by case; each case says why.

``T`` is a thought, ``S`` a thought and a search, ``box("X")`` the paper's way to answer X. The
columns are: research (the paper's formula), research-strict (the authors' code), f1, em, cem.
"""

# ruff: noqa: E501  (a case a line)

from __future__ import annotations

import pytest

from research_env.rewards import resolve_reward
from tests.research_env.playing import play

T = "<think>hm</think>"
S = "<think>hm</think> <search>capital of France</search>"
NAMES = ("research", "research-strict", "f1", "em", "cem")
NOTHING = (0, 0, 0, 0, 0)
RIGHT = (1, 1, 1, 1, 1)
RIGHT_BUT_BROKEN = (1, 0, 1, 1, 1)
WRONG = (0.1, 0.1, 0, 0, 0)


def box(answer: str) -> str:
    return f"<answer> The final answer is \\[ \\boxed{{{answer}}} \\] </answer>"


def answer(text: str) -> str:
    return f"{T}<answer>{text}</answer>"


PARIS = ("Paris",)
Case = tuple[str, tuple[str, ...], list[str], tuple[float, ...]]
# fmt: off
CASES: list[Case] = [
    # --- clean trajectories
    ("no search, right", PARIS, [T + box("Paris")], RIGHT),
    ("no search, wrong: 0.1 for the format", PARIS, [T + box("Rome")], WRONG),
    ("one search, right", PARIS, [S, T + box("Paris")], RIGHT),
    ("one search, wrong", PARIS, [S, T + box("Rome")], WRONG),
    ("three searches", PARIS, [S, S, S, T + box("Paris")], RIGHT),
    ("twelve searches: there is no cap", PARIS, [S] * 12 + [T + box("Paris")], RIGHT),
    ("partly right: P 1/2, R 1", ("Obama",), [S, T + box("Barack Obama")], (2 / 3, 2 / 3, 2 / 3, 0, 1)),
    ("partly right: P 1, R 1/2", ("Barack Obama",), [T + box("Obama")], (2 / 3, 2 / 3, 2 / 3, 0, 0)),
    ("partly right: P 2/3, R 2/3", ("New York State",), [T + box("New York City")], (2 / 3, 2 / 3, 2 / 3, 0, 0)),
    ("the best alias counts", ("NYC", "New York"), [T + box("New York")], RIGHT),
    ("case, article and punctuation are normalized away", PARIS, [T + box("The PARIS.")], RIGHT),
    ("yes", ("yes",), [T + box("Yes")], RIGHT),
    ("no for yes", ("yes",), [T + box("no")], WRONG),
    ("'yes it is' for 'yes' shares a word, but HotpotQA's rule says 0", ("yes",), [T + box("yes it is")], (0.1, 0.1, 0, 0, 1)),
    ("white space between the parts is free", PARIS, [f"\n{T}\n\n{S}\n", f"\n {T}\n{box('Paris')}\n"], RIGHT),
    ("two thoughts before the answer", PARIS, [T + T + box("Paris")], RIGHT),
    ("a thought after the answer", PARIS, [T + box("Paris") + T], RIGHT),
    ("text outside the tags is free", PARIS, [f"Well. {T} So: {box('Paris')}"], RIGHT),
    ("text after the answer is free", PARIS, [T + box("Paris") + " That is all."], RIGHT),
    ("an empty thought is a thought", PARIS, ["<think></think>" + box("Paris")], RIGHT),
    ("a search without a thought of its own", PARIS, [S, "<search>q</search>", box("Paris")], RIGHT),
    ("a search inside the thought", PARIS, ["<think>hm <search>q</search>", "</think>" + box("Paris")], RIGHT),
    ("an empty query still gets its result", PARIS, [f"{T}<search></search>", T + box("Paris")], RIGHT),
    ("the word Assistant is no tag", PARIS, ["<think>as an assistant</think>" + box("Paris")], RIGHT),
    ("Chinese is allowed", PARIS, ["<think>巴黎</think>" + box("Paris")], RIGHT),
    ("an answer of twelve words is allowed: P 1/12, R 1", PARIS, [T + box("Paris b c d e f g h i j k l")], (2 / 13, 2 / 13, 2 / 13, 0, 1)),
    # --- the box
    ("no box", PARIS, [answer("Paris")], NOTHING),
    ("an empty box: format holds, nothing shared", PARIS, [answer("\\boxed{}")], WRONG),
    ("two boxes: the last counts", PARIS, [answer("\\boxed{Rome} \\boxed{Paris}")], RIGHT),
    ("two boxes: the first does not", PARIS, [answer("\\boxed{Paris} \\boxed{Rome}")], WRONG),
    ("a box within a box: the inner one", PARIS, [answer("\\boxed{Rome \\boxed{Paris}}")], RIGHT),
    ("braces inside the box: 'New {York}' is 'new york'", ("New York",), [answer("\\boxed{New {York}}")], RIGHT),
    ("a LaTeX command in the box is a word: textparis", PARIS, [answer("\\boxed{\\text{Paris}}")], WRONG),
    ("text after the box", PARIS, [answer("\\boxed{Paris} it is")], RIGHT),
    ("a box never closed", PARIS, [answer("\\boxed{Paris")], NOTHING),
    ("never closed, with a brace before it", PARIS, [answer("} \\boxed{Paris")], NOTHING),
    ("one brace too few: the box cannot be read", PARIS, [answer("\\boxed{{Paris}")], NOTHING),
    ("\\boxed with a space alone: the code wants '\\boxed{'", PARIS, [answer("\\boxed Paris")], RIGHT_BUT_BROKEN),
    ("the same with a brace: 'paris' after normalization", PARIS, [answer("\\boxed {Paris}")], RIGHT_BUT_BROKEN),
    ("a spaced box beats a braced one, up to the dollar", PARIS, [answer("\\boxed{Rome} $\\boxed Paris$ x")], RIGHT),
    ("and without a dollar up to the end: P 1/4, R 1", PARIS, [answer("\\boxed{Rome} \\boxed Paris b c d")], (2 / 5, 2 / 5, 2 / 5, 0, 1)),
    ("the spaced one wins even when it comes first", PARIS, [answer("\\boxed Rome$ \\boxed{Paris}")], WRONG),
    ("spaced box, but no brace is ever closed", PARIS, [answer("\\boxed{Rome \\boxed Paris")], RIGHT_BUT_BROKEN),
    ("\\fbox alone never counts", PARIS, [answer("\\fbox{Paris}")], NOTHING),
    ("\\fbox after a box changes nothing", PARIS, [answer("\\boxed{Paris} \\fbox{Rome}")], RIGHT),
    ("another command that starts with boxed is the last box, and unreadable", PARIS, [answer("\\boxed{Paris} \\boxedx{Paris}")], NOTHING),
    ("a bare \\boxed at the end is the last box, and unreadable", PARIS, [answer("\\boxed{Paris} \\boxed")], NOTHING),
    ("a box outside the answer does not count", PARIS, [f"{T}\\boxed{{Paris}}<answer>Paris</answer>"], NOTHING),
    ("a box in the thought neither", PARIS, ["<think>\\boxed{Paris}</think>" + box("Rome")], WRONG),
    ("a LaTeX escape: 'boxed' without a backslash", PARIS, [answer("boxed{Paris}")], NOTHING),
    ("white space inside the box", PARIS, [answer("\\boxed{  Paris\n}")], RIGHT),
    # --- the tags
    ("no thought", PARIS, [box("Paris")], RIGHT_BUT_BROKEN),
    ("no thought, and wrong", PARIS, [box("Rome")], NOTHING),
    ("a thought never closed", PARIS, ["<think>hm" + box("Paris")], RIGHT_BUT_BROKEN),
    ("a thought never opened", PARIS, ["hm</think>" + box("Paris")], RIGHT_BUT_BROKEN),
    ("a thought never opened, and wrong", PARIS, ["hm</think>" + box("Rome")], NOTHING),
    ("tags of a thought reversed: only their number counts", PARIS, ["</think><think>" + box("Paris")], RIGHT),
    ("no answer", PARIS, [T + "Paris"], NOTHING),
    ("a box, but no answer", PARIS, [T + "\\boxed{Paris}"], NOTHING),
    ("an answer never closed", PARIS, [T + "<answer>\\boxed{Paris}"], NOTHING),
    ("an answer never opened", PARIS, [T + "\\boxed{Paris}</answer>"], NOTHING),
    ("tags of the answer reversed", PARIS, [T + "</answer>\\boxed{Paris}<answer>"], NOTHING),
    ("two answers: F1 is the first one's", PARIS, [T + box("Paris") + box("Rome")], RIGHT_BUT_BROKEN),
    ("two answers, the first wrong", PARIS, [T + box("Rome") + box("Paris")], NOTHING),
    ("an answer within an answer", PARIS, [T + "<answer>" + box("Paris") + "</answer>"], RIGHT_BUT_BROKEN),
    ("answer mentioned in a thought, closed there", PARIS, [f"<think>then <answer></answer></think>{box('Paris')}"], NOTHING),
    ("a result of the policy's own, without a search", PARIS, [f"{T}<result>x</result>{box('Paris')}"], RIGHT),
    ("a search opened in the last action", PARIS, [f"{T}<search>q{box('Paris')}"], RIGHT_BUT_BROKEN),
    ("a search opened twice: both share one result, and the first is in order", PARIS, [f"{T}<search><search>q</search>", T + box("Paris")], RIGHT),
    ("a search closed, never opened: searches for nothing", PARIS, [f"{T}q</search>", T + box("Paris")], RIGHT),
    ("a search opened after the answer", PARIS, [T + box("Paris") + "<search>"], RIGHT_BUT_BROKEN),
    ("a result opened by the policy before the search closes", PARIS, [f"{T}<search><result>q</search>", T + box("Paris")], RIGHT_BUT_BROKEN),
    ("an answer, then a search: the answer comes first in order", PARIS, [T + box("Paris") + S, "done"], RIGHT),
    ("upper-case tags are no tags", PARIS, [T + "<ANSWER>\\boxed{Paris}</ANSWER>"], NOTHING),
    ("a tag with a space is no tag", PARIS, [T + "< answer>\\boxed{Paris}</answer>"], NOTHING),
    # --- the end
    ("nothing at all", PARIS, [""], NOTHING),
    ("gave up after a search", PARIS, [S, ""], NOTHING),
    ("not over yet", PARIS, [S], NOTHING),
    ("NUL and a lone surrogate in a thought", PARIS, ["<think>\x00\ud800</think>" + box("Paris")], RIGHT),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_reward_of_a_case(case: Case) -> None:
    _why, golds, actions, expected = case
    episode = play("research", actions, golds)
    scores = tuple(resolve_reward(name)(episode) for name in NAMES)
    assert scores == pytest.approx(expected, abs=1e-9)
