"""The prompts of the judges, word for word as in the papers' code, and the forms of a verdict.

- ``research``: ReSearch (Chen et al. 2025), Agent-RL/ReCall, branch re-search, commit 4bdb872,
  ``scripts/evaluation/llm_judge.py``. The gold answers are written as a Python list. The verdict is
  a JSON object with a rationale and a judgement. Its code asks gpt-4o-mini at temperature 0 for
  1,024 tokens with ``response_format`` json_object; a question whose five tries fail is not in its
  mean.
- ``r1-searcher``: R1-Searcher (Song et al. 2025), RUCAIBox/R1-Searcher, commit 631167c,
  ``evaluation/metric_calc_gpt_as_judge.py``. One gold answer, the verdict True or False. Its code
  asks gpt-4o-mini for 1,024 tokens without a temperature (so the server's, often 1); ours is 0. If
  a question has several gold answers they are written as a Python list: its data have one each.

These answers are verdicts:

- ``research``: one JSON object, perhaps within white space or one Markdown code fence; no key
  twice; ``rationale`` a string; ``judgement`` exactly "correct" or "incorrect". (The paper's code
  reads every judgement other than "correct" as "incorrect".)
- ``r1-searcher``: the word True or False in any case, perhaps with a full stop.

After any other answer the judge is asked once more; after a second one the verdict is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research_env.retrieval.json_text import replace_surrogates


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """What a judge is asked, and what its answer means.

    Attributes:
        template: for ``str.format``, with the fields question, gold and prediction.
        gold: turns the gold answers into the text that the template shows.
        parse: reads the verdict in the model's text, True for correct; None if it holds none.
        repair: the message after a text without a verdict.
        formats: values of ``response_format`` that enforce the form, the strictest first; None
            sends none.
    """

    template: str
    gold: Callable[[Sequence[str]], str]
    parse: Callable[[str], bool | None]
    repair: str
    formats: tuple[Mapping[str, Any] | None, ...] = (None,)

    def text(self, question: str, answers: Sequence[str], prediction: str) -> str:
        """Return the whole prompt, the text of one user message."""
        filled = self.template.format(
            question=question, gold=self.gold(answers), prediction=prediction
        )
        return replace_surrogates(filled)


def parse_research(text: str) -> bool | None:
    """Read a verdict of the form ``research``; see the head of this module."""
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)```", text.strip(), re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_without_repeated_keys)
    except (ValueError, RecursionError):
        return None
    match value:
        case {"rationale": str(), "judgement": "correct" | "incorrect" as judgement}:
            return bool(judgement == "correct")
    return None


def parse_r1_searcher(text: str) -> bool | None:
    """Read a verdict of the form ``r1-searcher``; see the head of this module."""
    return {"true": True, "false": False}.get(text.strip().removesuffix(".").lower())


_RESEARCH = """You will be given a question and its ground truth answer list where each item can \
be a ground truth answer. Provided a pred_answer, you need to judge if the pred_answer correctly \
answers the question based on the ground truth answer list. You should first give your rationale \
for the judgement, and then give your judgement result (i.e., correct or incorrect).

Here is the criteria for the judgement:
1. The pred_answer doesn't need to be exactly the same as any of the ground truth answers, but \
should be semantically same for the question.
2. Each item in the ground truth answer list can be viewed as a ground truth answer for the \
question, and the pred_answer should be semantically same to at least one of them.

question: {question}
ground truth answers: {gold}
pred_answer: {prediction}

The output should in the following json format:
```json\x20
{{
    "rationale": "your rationale for the judgement, as a text",
    "judgement": "your judgement result, can only be 'correct' or 'incorrect'"
}}
```

Your output:"""

_R1_SEARCHER = (
    "Given a Question and its Golden Answer, verify whether the Predicted Answer is correct. The "
    "prediction is correct if it fully aligns with the meaning and key information of the Golden "
    "Answer. Respond with True if the prediction is correct and False otherwise.\n"
    "\n"
    "Question: {question}\n"
    "Golden Answer: {gold}\n"
    "Predicted Answer: {prediction}\n"
    "    "
)

_SCHEMA = {
    "type": "object",
    "properties": {
        "rationale": {"type": "string"},
        "judgement": {"type": "string", "enum": ["correct", "incorrect"]},
    },
    "required": ["rationale", "judgement"],
    "additionalProperties": False,
}

JUDGE_PROMPTS: dict[str, JudgePrompt] = {
    "research": JudgePrompt(
        _RESEARCH,
        lambda answers: str(list(answers)),
        parse_research,
        "That is not the JSON object asked for. Answer again with nothing but one JSON object: "
        'the key "rationale" with a text, and the key "judgement" with "correct" or "incorrect".',
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": _SCHEMA},
            },
            {"type": "json_object"},  # what the paper's code sends
            None,
        ),
    ),
    "r1-searcher": JudgePrompt(
        _R1_SEARCHER,
        lambda answers: answers[0] if len(answers) == 1 else str(list(answers)),
        parse_r1_searcher,
        "That is not the answer asked for. Answer again with one word only: True or False.",
    ),
}


def _without_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found
