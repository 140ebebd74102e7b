"""The baselines' exact calls: which query, which passages, how many, and when they stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from benchmarks.baselines import (
    driver,
    ircot,
    iter_retgen,
    miniature,
    naive_generation,
    naive_rag,
)
from research_agent.config import SamplingConfig
from research_agent.engines.base import SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.errors import ContextError
from research_agent.evaluation.predictions import as_record
from research_agent.trajectory import Trajectory
from research_env import Dataset, Hit, Passage, Question
from research_env.datasets import miniworld
from research_env.errors import ConfigurationError, RetrievalError, UnknownNameError
from research_env.vector_env import SearchQAVectorEnv
from tests.research_agent.conftest import byte_tokenizer, make_renderer

SAMPLING = SamplingConfig(temperature=0.0, max_prompt=6_000, max_response=200, max_turn_tokens=None)
RENDERER = make_renderer(byte_tokenizer())
CHAT = make_renderer(byte_tokenizer(), chat_template=True)
(END,) = RENDERER.end_ids

WHO = Question("q", "Who leads Apt?", ("Ann",), supporting=("Apt-0",), hops=1, type="bridge")
RAG = (
    "Answer the question based on the given document."
    "Only give me the answer and do not output any other words.\n"
    "The following are given documents.\n\n"
)


@dataclass
class Shelf:
    """Finds as many passages as asked for, whose names and scores the query gives."""

    queries: list[str] = field(default_factory=list)
    scores: dict[str, Sequence[float]] = field(default_factory=dict)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        self.queries += queries
        return [self._found(query, top_k) for query in queries]

    def _found(self, query: str, top_k: int) -> list[Hit] | RetrievalError:
        if "trouble" in query:
            return RetrievalError("down")
        name = query.rsplit(maxsplit=1)[-1].rstrip("?")
        scores = self.scores.get(name, [9.0 - i for i in range(top_k)])
        return [
            Hit(Passage(f"{name}-{i}", name, f"Text {i}."), score) for i, score in enumerate(scores)
        ]

    def close(self) -> None:
        pass


@dataclass
class Model:
    """Says its lines in turn, and remembers what it was asked."""

    lines: Sequence[str]
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)

    def __call__(self, tokens: Sequence[int], params: SamplingParams) -> Sequence[int]:
        self.prompts.append(RENDERER.decode(tokens))
        self.params.append(params)
        return [*RENDERER.encode_text(self.lines[len(self.prompts) - 1]), END]


def play(
    baseline: driver.Baseline,
    lines: Sequence[str],
    shelf: Shelf | None = None,
    **settings: Any,
) -> tuple[Model, Shelf, Trajectory]:
    """One question, with top-5."""
    model, shelf = Model(lines), shelf or Shelf()
    renderer = settings.pop("renderer", RENDERER)
    sampling = settings.pop("sampling", SAMPLING)
    context = settings.pop("context", 8_000)
    question = settings.pop("question", WHO)
    data = Dataset("one", (question,), None)
    environments = SearchQAVectorEnv(1, dataset=data, retriever=shelf, **settings)
    engine = ScriptedEngine(model, renderer, context)
    with closing(environments):
        (trajectory,) = driver.run(
            engine, environments, renderer, [(0, 0)], sampling, baseline=baseline
        )
    assert engine.busy == 0
    return model, shelf, trajectory


def documents(name: str, count: int = 5) -> str:
    return "".join(f'Doc {i + 1}(Title: "{name}") Text {i}.\n' for i in range(count))


# --- the four baselines ---------------------------------------------------------------------------


def test_naive_generation_asks_once_and_never_searches() -> None:
    model, shelf, trajectory = play(naive_generation.play, ["Ann"])
    assert model.prompts == [
        "Answer the question based on your own knowledge. Only give me the answer and do not "
        "output any other words.\n\nQuestion: Who leads Apt?"
    ]
    assert shelf.queries == []
    assert trajectory.info["prediction"] == "Ann"
    assert trajectory.metrics["em"] == 1.0
    assert trajectory.metrics["searches"] == 0.0
    assert trajectory.stop_reason == "answer"


def test_naive_rag_reads_the_passages_of_one_search_for_the_question() -> None:
    model, shelf, trajectory = play(naive_rag.play, ["Bob"])
    assert shelf.queries == ["Who leads Apt?"]
    assert model.prompts == [RAG + documents("Apt") + "\n\nQuestion: Who leads Apt?"]
    assert trajectory.info["prediction"] == "Bob"
    assert trajectory.metrics["em"] == 0.0
    assert trajectory.metrics["searches"] == 1.0
    assert trajectory.metrics["support_recall"] == 1.0


def test_iter_retgen_searches_three_times_each_for_question_and_last_answer() -> None:
    model, shelf, trajectory = play(iter_retgen.play, ["Bob", "Cid", "Ann"])
    assert shelf.queries == ["Who leads Apt?", "Who leads Apt? Bob", "Who leads Apt? Cid"]
    asked = "\n\nQuestion: Who leads Apt?"
    assert model.prompts == [RAG + documents(name) + asked for name in ("Apt", "Bob", "Cid")]
    assert trajectory.info["prediction"] == "Ann"
    assert trajectory.metrics["searches"] == 3.0


def thinking(model: Model) -> list[str]:
    """What stands in each prompt behind the worked example."""
    for prompt in model.prompts:
        assert prompt.startswith("You serve as an intelligent assistant, adept at")
        assert prompt.count("So the answer is: no.\n\n\n\n") == 1
    return [prompt.split("So the answer is: no.\n\n\n\n")[1] for prompt in model.prompts]


def shown(text: str) -> list[tuple[str, str]]:
    """Titles and texts of the passages in a prompt of IRCoT."""
    passages = text.partition("Question: ")[0].split("\n\n")[:-1]
    pairs = [tuple(passage.removeprefix("Wikipedia Title: ").split("\n")) for passage in passages]
    return [(title.strip('"'), said) for title, said in pairs]


def test_ircot_searches_for_each_thought_and_stops_at_the_answer() -> None:
    shelf = Shelf(scores={"Apt": (5, 4), "Bob": (7, 1)})
    lines = [" It is led by Bob. And more", " He is a friend of Cid.\n", " So the answer is: Ann."]
    model, _, trajectory = play(ircot.play, lines, shelf)
    assert shelf.queries == ["Who leads Apt?", "It is led by Bob", "He is a friend of Cid"]
    first, second, third = thinking(model)
    assert first == (
        'Wikipedia Title: "Apt"\nText 0.\n\nWikipedia Title: "Apt"\nText 1.\n\n'
        "Question: Who leads Apt?\nThought:"
    )
    # From now on by score, the best next to the question.
    assert shown(second) == [("Bob", "Text 1."), ("Apt", "Text 1."), ("Apt", "Text 0."),
                             ("Bob", "Text 0.")]  # fmt: skip
    assert second.endswith("Question: Who leads Apt?\nThought: It is led by Bob")
    assert len(shown(third)) == 9
    assert third.endswith("Thought: It is led by Bob  He is a friend of Cid")
    assert trajectory.info["prediction"] == "Ann"
    assert trajectory.metrics["em"] == 1.0
    assert trajectory.metrics["searches"] == 3.0
    assert [params.stop for params in model.params] == [(".", "\n")] * 3


def test_ircot_thinks_five_times_at_most_and_then_all_thoughts_are_its_answer() -> None:
    lines = [f" It is {name}." for name in ("Bob", "Cid", "Dan", "Eve", "Fay")]
    model, shelf, trajectory = play(ircot.play, lines)
    assert len(model.prompts) == 5
    assert shelf.queries == ["Who leads Apt?", "It is Bob", "It is Cid", "It is Dan", "It is Eve"]
    assert [len(shown(text)) for text in thinking(model)] == [5, 10, 15, 15, 15]
    assert trajectory.info["prediction"] == "It is Bob  It is Cid  It is Dan  It is Eve  It is Fay"


def test_ircot_keeps_a_passage_once_with_its_best_score() -> None:
    def hit(name: str, score: float) -> Hit:
        return Hit(Passage(name, name, ""), score)

    known = [hit("a", 3), hit("b", 2)]
    assert ircot.gather(known, [hit("b", 9), hit("c", 1), hit("a", 1)]) == [
        hit("c", 1), hit("a", 3), hit("b", 9)
    ]  # fmt: skip
    full = [hit(str(i), i) for i in range(15)]
    late = ircot.gather(full, [hit("late", 99), hit("0", 50)])
    assert [each.passage.id for each in late] == [*(str(i) for i in range(1, 15)), "0"]


def test_ircot_answers_with_what_follows_the_mark() -> None:
    lines = [" Apt has a head, so we ask who. It", " So the answer is: Ann Lee\n"]
    _, shelf, trajectory = play(ircot.play, lines)
    assert shelf.queries[1:] == ["Apt has a head, so we ask who"]
    assert trajectory.info["prediction"] == "Ann Lee"


# --- the driver -----------------------------------------------------------------------------------


def test_a_chat_model_gets_messages_and_ircot_plain_text() -> None:
    model, _, _ = play(naive_rag.play, ["Ann"], renderer=CHAT)
    assert model.prompts == [
        f"<|im_start|>system\n{RAG}{documents('Apt').strip()}<|im_end|>\n"
        "<|im_start|>user\nQuestion: Who leads Apt?<|im_end|>\n<|im_start|>assistant\n"
    ]
    model, _, _ = play(ircot.play, [" So the answer is: Ann."], renderer=CHAT)
    assert "<|im_start|>" not in model.prompts[0]


def test_what_a_model_says_cannot_break_out_of_an_action() -> None:
    said = r"</answer> \boxed{Bob} <answer> {A}n<n"
    _, _, trajectory = play(naive_generation.play, [said])
    assert trajectory.info["prediction"] == "/answer> boxedBob answer> Ann"
    _, shelf, trajectory = play(iter_retgen.play, ["</search> Bob", "<answer>Cid</answer>", "Ann"])
    assert shelf.queries[1:] == [
        "Who leads Apt?  /search> Bob",
        "Who leads Apt?  answer>Cid /answer>",
    ]
    assert trajectory.metrics["em"] == 1.0


def test_an_empty_thought_finds_nothing_and_thinking_goes_on() -> None:
    model, shelf, trajectory = play(ircot.play, ["\n", " So the answer is: Ann"])
    assert shelf.queries == ["Who leads Apt?"]  # the environment asks nobody for nothing
    assert [len(shown(text)) for text in thinking(model)] == [5, 5]
    assert trajectory.metrics["em"] == 1.0


def test_a_record_tells_every_prompt_reply_and_search() -> None:
    _, _, trajectory = play(iter_retgen.play, ["Bob", "Cid", "Ann"], top_k=1)
    record = as_record(trajectory)
    kinds = [segment["provenance"] for segment in record["segments"]]
    assert kinds == ["prompt", *["observation", "prompt", "action"] * 3]
    assert record["segments"][0] == {"provenance": "prompt", "text": WHO.question, "tokens": 0}
    assert [s["text"] for s in record["segments"] if s["provenance"] == "action"] == [
        "Bob", "Cid", "Ann"
    ]  # fmt: skip
    seen = [s for s in record["segments"] if s["provenance"] == "observation"]
    assert [s["info"]["query"] for s in seen] == [
        "Who leads Apt?", "Who leads Apt? Bob", "Who leads Apt? Cid"
    ]  # fmt: skip
    assert seen[1]["info"]["passage_ids"] == ["Bob-0"]
    assert [s["tokens"] for s in seen] == [0, 0, 0]
    assert record["info"]["prediction"] == "Ann"
    assert record["info"]["question_id"] == "q"
    assert record["info"]["strata"] == {"hops": "1", "type": "bridge"}
    tokens = [len(segment.tokens) for segment in trajectory.segments]
    assert tokens[3] == len("Bob") + 1  # the end token was sampled, too


def test_a_failed_search_makes_the_episode_void() -> None:
    _, _, trajectory = play(iter_retgen.play, ["Bob", "trouble"])
    assert trajectory.void
    assert trajectory.stop_reason == "backend_error"
    assert set(trajectory.metrics.values()) == {0.0}


def test_the_budget_of_searches_is_the_environments() -> None:
    model, _, trajectory = play(iter_retgen.play, ["Bob", "Cid"], max_searches=2)
    assert len(model.prompts) == 2
    assert trajectory.truncated
    assert trajectory.stop_reason == "max_searches"
    assert trajectory.metrics["searches"] == 2.0


def test_a_first_prompt_that_is_too_long_is_refused_and_a_later_one_ends_the_episode() -> None:
    with pytest.raises(ContextError, match=r"question 'q' has 309 tokens.*the 99 that.*top_k"):
        play(naive_rag.play, [], context=100)
    with pytest.raises(ContextError, match="the 60 that max_prompt"):
        play(naive_generation.play, [], sampling=replace(SAMPLING, max_prompt=60))
    model, _, _ = play(ircot.play, [" So the answer is: Ann."])
    just_enough = len(RENDERER.encode_text(model.prompts[0])) + 20
    model, _, trajectory = play(ircot.play, [" It is Bob."] * 2, context=just_enough)
    assert len(model.prompts) == 1
    assert trajectory.stop_reason == "context"
    assert trajectory.truncated
    assert as_record(trajectory)["info"]["strata"]["hops"] == "1"


def test_replies_are_limited_and_seeds_depend_on_episode_and_step() -> None:
    sampling = replace(SAMPLING, temperature=1.0, max_turn_tokens=2)
    model, _, trajectory = play(iter_retgen.play, ["Bobby", "Cid", "Ann"], sampling=sampling)
    assert [params.max_tokens for params in model.params] == [2, 2, 2]
    assert trajectory.info["prediction"] == "An"
    seeds = [params.seed for params in model.params]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]


def test_another_protocol_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'research'.*'search-r1'"):
        play(naive_rag.play, [], protocol="search-r1")


MANY = tuple(Question(f"q{i}", f"Who leads Apt{i}?", (f"Ann{i}",)) for i in range(9))


@pytest.mark.parametrize(("slots", "overlap"), [(1, False), (4, True), (16, False)])
def test_many_questions_are_played_at_once_each_with_its_own_calls(
    slots: int, overlap: bool
) -> None:
    def script(tokens: Sequence[int], params: SamplingParams) -> Sequence[int]:
        text = RENDERER.decode(tokens)
        (number,) = {each.split("?")[0] for each in text.split("Who leads Apt")[1:]}
        said = f" It is Bob{number}." if f"Bob{number}" not in text else (
            f" So the answer is: Ann{number}."
        )  # fmt: skip
        return [*RENDERER.encode_text(said), END]

    shelf, finished = Shelf(), list[Trajectory]()
    environments = SearchQAVectorEnv(slots, dataset=Dataset("m", MANY, None), retriever=shelf)
    delays = iter(range(10_000))
    engine = ScriptedEngine(script, RENDERER, 8_000, delay=lambda: next(delays) * 7 % 5)
    episodes = [(i, sample) for i in range(9) for sample in range(2)]
    trajectories = driver.run(
        engine, environments, RENDERER, episodes, replace(SAMPLING, overlap=overlap),
        baseline=ircot.play, seed=3, on_finish=finished.append,
    )  # fmt: skip
    environments.close()
    assert [(t.episode, t.sample) for t in trajectories] == episodes
    assert sorted(map(id, finished)) == sorted(map(id, trajectories))
    assert {t.info["question_id"] for t in trajectories} == {f"q{i}" for i in range(9)}
    assert all(t.metrics["em"] == 1.0 and t.metrics["searches"] == 2.0 for t in trajectories)


# --- the miniature's formats ----------------------------------------------------------------------


def question_of(kind: str) -> tuple[miniworld.World, Question]:
    import random

    world = miniworld.world(5, miniature.TRAINED)
    drawn = miniworld.questions(world, random.Random(1), 80)
    return world, next(q for q in drawn if q.type == kind and q.hops in (2, 3))


class Oracle:
    """Knows the thoughts of one question, and where it stands by the number of those made."""

    def __init__(self, question: Question) -> None:
        self.thoughts = miniature.chain_of_thought(question)

    def __call__(self, tokens: Sequence[int], params: SamplingParams) -> Sequence[int]:
        made = RENDERER.decode(tokens).count(" next:")
        return [*RENDERER.encode_text(f"{self.thoughts[made]}. never read"), END]


@pytest.mark.parametrize("kind", ["chain", "comparison"])
def test_the_miniatures_thoughts_find_all_gold_passages_and_the_answer(
    kind: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path_factory.getbasetemp() / "research-cache"))
    world, question = question_of(kind)
    data = Dataset("mini", (question,), world)
    environments = SearchQAVectorEnv(1, dataset=data, top_k=2)
    baseline = partial(ircot.play, prompt=miniature.think)
    engine = ScriptedEngine(Oracle(question), RENDERER, 8_000)
    (trajectory,) = driver.run(
        engine, environments, RENDERER, [(0, 0)], SAMPLING, baseline=baseline
    )
    environments.close()
    assert trajectory.metrics["em"] == 1.0
    assert trajectory.metrics["support_recall"] == 1.0
    assert trajectory.metrics["searches"] == len(question.decomposition)


def test_demonstrations_have_the_prompts_that_the_baselines_ask() -> None:
    made = list(miniature.demonstrations(120, top_k=2, seed=4))
    assert len(made) == 120
    starts: list[Callable[[str], bool]] = [
        lambda prompt: prompt.endswith(" guess:") and "<result>" not in prompt,
        lambda prompt: prompt.endswith(" guess:") and "<result>" in prompt,
        lambda prompt: "?\n next:" in prompt or ".\n next:" in prompt,
        lambda prompt: prompt.startswith(" <result>"),
        lambda prompt: "<result>" not in prompt and not prompt.endswith(":"),
    ]
    for start in starts:
        assert any(start(demonstration[0][1]) for demonstration in made)
    own = {name for seed, kept in miniature.WORLDS.values() for name in
           miniworld.world(seed, kept).entities}  # fmt: skip
    text = "".join(part for demonstration in made for _, part in demonstration)
    assert not any(name in text for name in own)


def test_what_passages_tell_is_how_far_the_chain_is_in_sight() -> None:
    world, question = question_of("chain")
    passages = {passage.id: Hit(passage, 1.0) for passage in world}
    gold = [passages[i] for i in question.supporting]
    answers = [hop.answer for hop in question.decomposition]
    assert miniature.known(question, gold) == question.answers[0] == answers[-1]
    assert miniature.known(question, gold[:1]) == answers[0]
    assert miniature.known(question, gold[1:]) == gold[0].passage.title
    world, question = question_of("comparison")
    passages = {passage.id: Hit(passage, 1.0) for passage in world}
    gold = [passages[i] for i in question.supporting]
    assert miniature.known(question, gold) == question.answers[0]
    assert miniature.known(question, gold[1:]) == gold[0].passage.title


def test_the_two_worlds_share_no_name_and_no_relation() -> None:
    assert not miniature.TRAINED & miniature.OTHER
    one, other = (miniworld.world(seed, kept) for seed, kept in miniature.WORLDS.values())
    assert not one.entities.keys() & other.entities.keys()
    facts = [{r for e in world.entities.values() for r in e.facts} for world in (one, other)]
    assert facts == [miniature.TRAINED, miniature.OTHER]


def test_a_world_tells_only_of_its_relations() -> None:
    world = miniworld.world(3, miniature.TRAINED)
    assert world.fingerprint() != miniworld.world(3).fingerprint()
    phrases = [
        phrase
        for possible in miniworld.RELATIONS.values()
        for relation in possible
        if relation.name in miniature.OTHER
        for phrase in relation.statements
    ]
    told = " ".join(passage.text for passage in world if "The gazette" not in passage.text)
    assert not any(f", {phrase} " in told for phrase in phrases)
    with pytest.raises(UnknownNameError, match="boss"):
        miniworld.world(3, {"boss"})
    with pytest.raises(ConfigurationError, match="none for a country; give some of ruler, poet"):
        miniworld.world(3, miniature.TRAINED - {"ruler", "capital", "ally"})
