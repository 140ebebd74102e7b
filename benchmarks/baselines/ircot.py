"""IRCoT: a sentence of thought, a search for it, the next sentence.

Trivedi et al. 2023, "Interleaving Retrieval with Chain-of-Thought Reasoning for Knowledge-Intensive
Multi-Step Questions", arXiv:2212.10509. Prompt and steps are those of the ReSearch authors'
evaluation: Agent-RL/ReCall, branch re-search, ``scripts/evaluation/run_eval.py``, method ``ircot``,
by FlashRAG's ``IRCOTPipeline`` (RUC-NLPIR/FlashRAG, ``flashrag/pipeline/active_pipeline.py``), with
its one worked example, from the prompts of IRCoT's authors. As there:

- the prompt is plain text, also for a model with a chat template;
- a thought ends before the first full stop or line feed (so "St. Louis" ends one, too);
- passages stand in ascending order of their best score, the best next to the question;
- five thoughts at most; without "So the answer is:" all thoughts together are the answer.

Two things differ. Passages are 15 at most and a later one is left out, as in IRCoT's own code
(StonyBrookNLP/ircot, ``global_max_num_paras``); FlashRAG has no limit. And no search follows the
last thought, whose passages nobody would read; FlashRAG makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.baselines.driver import Moves, generate, search
from research_env.retrieval.base import Hit

Thinking = Callable[[str, Sequence[Hit], Sequence[str]], str]

THOUGHTS = 5
PASSAGES = 15
STOP = (".", "\n")
MARK = "So the answer is:"

_INSTRUCTION = (
    "You serve as an intelligent assistant, adept at facilitating users through complex, multi-hop "
    "reasoning across multiple documents. This task is illustrated through demonstrations, each "
    "consisting of a document set paired with a relevant question and its multi-hop reasoning "
    "thoughts. Your task is to generate one thought for current step, DON'T generate the whole "
    "thoughts at once! If you reach what you believe to be the final step, start with "
    '"So the answer is:".'
)
_EXAMPLE = (
    "Wikipedia Title: Kurram Garhi\n"
    "Kurram Garhi is a small village located near the city of Bannu, which is the part of Khyber "
    "Pakhtunkhwa province of Pakistan. Its population is approximately 35000. Barren hills are "
    "near this village. This village is on the border of Kurram Agency. Other nearby villages are "
    "Peppal, Surwangi and Amandi Kala.\n\n"
    "Wikipedia Title: 2001–02 UEFA Champions League second group stage\n"
    "Eight winners and eight runners- up from the first group stage were drawn into four groups of "
    "four teams, each containing two group winners and two runners- up. Teams from the same "
    "country or from the same first round group could not be drawn together. The top two teams in "
    "each group advanced to the quarter- finals.\n\n"
    "Wikipedia Title: Satellite tournament\n"
    "A satellite tournament is either a minor tournament or event on a competitive sporting tour "
    "or one of a group of such tournaments that form a series played in the same country or "
    "region.\n\n"
    "Wikipedia Title: Trojkrsti\n"
    "Trojkrsti is a village in Municipality of Prilep, Republic of Macedonia.\n\n"
    "Wikipedia Title: Telephone numbers in Ascension Island\n"
    "Country Code:+ 247< br> International Call Prefix: 00 Ascension Island does not share the "
    "same country code( +290) with the rest of St Helena.\n\n"
    "Question: Are both Kurram Garhi and Trojkrsti located in the same country?\n"
    "Thought: Kurram Garhi is located in the country of Pakistan. Trojkrsti is located in the "
    "country of Republic of Macedonia. Thus, they are not in the same country. So the answer is: "
    "no.\n\n"
)


def prompt(question: str, hits: Sequence[Hit], thoughts: Sequence[str]) -> str:
    """Instruction, example, passages, question, and the thoughts so far."""
    passages = "".join(
        f'Wikipedia Title: "{hit.passage.title}"\n{hit.passage.text}\n\n' for hit in hits
    )
    asked = f"{passages}Question: {question}\nThought:"
    return f"{_INSTRUCTION}\n\n{_EXAMPLE}\n\n{asked}{' '.join(thoughts)}"


def gather(known: Sequence[Hit], found: Sequence[Hit]) -> list[Hit]:
    """Passages known and newly found, each once with its best score, worst first.

    A new one is left out when there are ``PASSAGES`` already.
    """
    best = {hit.passage.id: hit for hit in known}
    for hit in found:
        other = best.get(hit.passage.id)
        if (other is None and len(best) < PASSAGES) or (other and hit.score > other.score):
            best[hit.passage.id] = hit
    return sorted(best.values(), key=lambda hit: hit.score)


def play(question: str, prompt: Thinking = prompt) -> Moves:
    """Think, search for the thought, and think again, until a thought says the answer."""
    hits = list((yield from search(question)))  # best first; from the second prompt on, worst first
    thoughts: list[str] = []
    while True:
        text = prompt(question, hits, thoughts)
        message = {"role": "user", "content": text}
        thoughts.append((yield from generate([message], STOP, chat=False)))
        if MARK in thoughts[-1] or len(thoughts) == THOUGHTS:
            break
        hits = gather(hits, (yield from search(thoughts[-1].strip())))
    said = " ".join(thoughts)
    return said.split(MARK)[1].strip() if MARK in said else said
