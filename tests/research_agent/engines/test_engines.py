from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from research_agent.engines import make_engine
from research_agent.engines.base import Completion, Engine, Interruptible, SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.engines.transformers import TransformersEngine
from research_agent.errors import ContextError, ModelError, NonFiniteError
from research_agent.renderer import Renderer
from tests.research_agent.conftest import (
    byte_tokenizer,
    make_renderer,
    sliding_qwen2,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    wide_qwen2,
)

MODELS = [tiny_qwen2, tiny_llama, tiny_gpt2]
VLLM = pytest.param("vllm", marks=pytest.mark.vllm)
Start = Callable[..., Engine]


@pytest.fixture(params=["transformers", VLLM])
def start(request: pytest.FixtureRequest, merging_renderer: Renderer) -> Start:
    """Makes an engine of a model like ``wide_qwen2``; with vLLM it is the same one each time."""
    if request.param == "transformers":
        return lambda model, slots=9: TransformersEngine(model, merging_renderer, slots)
    engine: Engine = request.getfixturevalue("vllm_engine")

    def restart(model: Any, slots: int = 9) -> Engine:
        for slot in range(250):
            engine.release(slot)
        engine.load_weights(model.named_parameters(), version=0)
        return engine

    return restart


def finish(engine: Engine) -> list[Completion]:
    done = []
    while engine.busy:
        done += engine.step()
    return done


def full_logprobs(model: Any, tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """[tokens - 1, vocabulary] of a plain forward, as a learner makes it."""
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0, :-1].double()
    return torch.log_softmax(logits / temperature, dim=-1)


class Player:
    """Plays ragged turns in slots, and keeps what each slot has seen."""

    def __init__(self, engine: Engine, slots: int, temperature: float = 1.0) -> None:
        self.engine = engine
        self.temperature = temperature
        self.rng = np.random.default_rng(0)
        self.said: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        self.logprobs: dict[int, list[float | None]] = {slot: [] for slot in range(slots)}

    def submit(self, slot: int) -> None:
        new = self.rng.integers(0, 256, int(self.rng.integers(1, 20))).tolist()
        self.said[slot] += new
        self.logprobs[slot] += [None] * len(new)
        length = int(self.rng.integers(1, 9))
        params = SamplingParams(self.temperature, max_tokens=length, seed=slot)
        self.engine.submit(slot, new, params)

    def take(self, completion: Completion) -> None:
        self.said[completion.slot] += completion.tokens
        self.logprobs[completion.slot] += completion.logprobs

    def play(self, turns: int) -> None:
        """Each slot begins its next turn as soon as it may, in the middle of the others'."""
        left = dict.fromkeys(self.said, turns - 1)
        for slot in self.said:
            self.submit(slot)
        while self.engine.busy:
            for completion in self.engine.step():
                self.take(completion)
                if left[completion.slot]:
                    left[completion.slot] -= 1
                    self.submit(completion.slot)

    def worst(self, model: Any) -> float:
        """The largest difference to the full forward's log-probabilities."""
        differences = []
        for slot, tokens in self.said.items():
            full = full_logprobs(model, tokens, self.temperature or 1.0)
            for i, ours in enumerate(self.logprobs[slot]):
                if ours is not None:
                    differences.append(abs(full[i - 1, tokens[i]].item() - ours))
        assert len(differences) > len(self.said)
        return max(differences)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_those_of_a_full_forward(
    make: Callable[[], Any], temperature: float, renderer: Renderer
) -> None:
    model = make()
    player = Player(TransformersEngine(model, renderer, 9, 200), 9, temperature)
    player.play(turns=4)
    assert player.worst(model) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_of_any_engine_are_those_of_a_full_forward(
    temperature: float, start: Start
) -> None:
    model = wide_qwen2()
    player = Player(start(model), 9, temperature)
    player.play(turns=4)
    assert player.worst(model) < 1e-4


def test_nothing_is_prefilled_twice(renderer: Renderer) -> None:
    engine = TransformersEngine(tiny_qwen2(), renderer, 5)
    player = Player(engine, 5)
    player.play(turns=4)
    # All tokens once, but for the last of each trajectory, which nothing follows.
    assert engine.forwarded_tokens == sum(len(said) - 1 for said in player.said.values())


def test_a_prompt_that_a_group_shares_is_prefilled_once(renderer: Renderer) -> None:
    """Slots that begin alike, at once or later, sample what they would sample alone."""
    model = wide_qwen2()
    prompt = renderer.encode_text("who wrote the book")
    other = renderer.encode_text("who wrote the song")
    group = {0: prompt, 1: prompt, 2: other, 3: prompt}
    later = {4: prompt, 5: other}
    after = renderer.encode_text("and when?")

    def sample(engine: TransformersEngine, waves: Sequence[dict[int, list[int]]]) -> dict[Any, Any]:
        turns = {}
        for wave in waves:
            for slot, tokens in wave.items():
                engine.submit(slot, tokens, SamplingParams(max_tokens=6, seed=slot))
            for turn in finish(engine):
                engine.submit(turn.slot, after, SamplingParams(max_tokens=6, seed=turn.slot))
                turns[turn.slot, "first"] = turn
            turns |= {(turn.slot, "second"): turn for turn in finish(engine)}
        return turns

    engine = TransformersEngine(model, renderer, 6, 200)
    shared = sample(engine, [group, later])
    alone: dict[Any, Any] = {}
    for slot, tokens in (group | later).items():
        alone |= sample(TransformersEngine(model, renderer, 6, 200), [{slot: tokens}])
    assert shared.keys() == alone.keys() and len(shared) == 12
    for key, turn in shared.items():
        assert turn.tokens == alone[key].tokens
        assert turn.logprobs == pytest.approx(alone[key].logprobs, abs=1e-5)
    # Both prompts once, then the last token of a prompt for each of the four other slots. Each
    # slot forwards the tokens after it but for the last of the second turn.
    assert engine.forwarded_tokens == len(prompt) + len(other) + 4 + 6 * (6 + len(after) + 6 - 1)


def test_a_prompt_is_copied_from_no_slot_that_was_released(renderer: Renderer) -> None:
    """The slot that has the prompt goes before the ones that wait for it, or holds another."""
    engine = TransformersEngine(wide_qwen2(), renderer, 3, 200)
    prompt, other = renderer.encode_text("who wrote it"), renderer.encode_text("when was it")

    def sample() -> tuple[int, ...]:
        engine.submit(2, prompt, SamplingParams(max_tokens=6))
        (turn,) = finish(engine)
        engine.release(2)
        return turn.tokens

    expected = sample()
    engine.submit(0, prompt, SamplingParams(max_tokens=6))
    engine.submit(2, prompt, SamplingParams(max_tokens=6))
    engine.step()
    engine.release(0)
    (turn,) = finish(engine)
    assert turn.tokens == expected
    engine.release(2)
    engine.submit(0, other, SamplingParams(max_tokens=6))
    finish(engine)
    assert sample() == expected


def test_greedy_takes_the_likeliest_token(start: Start, renderer: Renderer) -> None:
    model = wide_qwen2()
    engine = start(model)
    prompt = renderer.encode_text("who")
    engine.submit(0, prompt, SamplingParams(temperature=0, max_tokens=12))
    (turn,) = finish(engine)
    assert len(turn.tokens) == 12
    likeliest = full_logprobs(model, [*prompt, *turn.tokens]).argmax(-1)[len(prompt) - 1 :]
    assert list(turn.tokens) == likeliest.tolist()


def test_draws_depend_on_seed_and_position_only(start: Start, renderer: Renderer) -> None:
    model = wide_qwen2()
    prompts = [renderer.encode_text(text) for text in ("a", "many words", "b?", "a")]

    def play(slots: Sequence[int], seeds: Sequence[int], together: bool) -> list[tuple[int, ...]]:
        engine = start(model)
        turns: dict[int, tuple[int, ...]] = {}
        for _ in range(2):  # the second turn goes on from the first
            for slot, prompt, seed in zip(slots, prompts, seeds, strict=True):
                engine.submit(slot, prompt, SamplingParams(max_tokens=7, seed=seed))
                for done in [] if together else finish(engine):
                    turns[done.slot] = turns.get(done.slot, ()) + done.tokens
            for done in finish(engine):
                turns[done.slot] = turns.get(done.slot, ()) + done.tokens
        return [turns[slot] for slot in slots]

    alone = play([0, 1, 2, 3], [5, 6, 7, 5], together=False)
    assert play([7, 2, 4, 0], [5, 6, 7, 5], together=True) == alone
    assert alone[0] == alone[3]  # same prompt, same seed
    assert play([0, 1, 2, 3], [8, 6, 7, 5], together=True)[0] != alone[0]


def test_draws_follow_the_distribution(start: Start, renderer: Renderer) -> None:
    model, slots, rounds = wide_qwen2(), 250, 8
    engine = start(model, slots)
    prompt = renderer.encode_text("x")
    counts = np.zeros(264)
    for first in range(rounds):
        for slot in range(slots):
            params = SamplingParams(0.7, max_tokens=1, seed=first * slots + slot)
            engine.submit(slot, prompt, params)
        for done in finish(engine):
            counts[done.tokens[0]] += 1
            engine.release(done.slot)
    expected = full_logprobs(model, [*prompt, 0], 0.7)[0].exp().numpy() * slots * rounds
    often = expected > 5
    chi2 = (((counts - expected) ** 2) / expected)[often].sum()
    freedom = often.sum() - 1
    assert freedom > 30
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def chain(tokenizer: Any, links: Sequence[Sequence[str]]) -> dict[int, int]:
    """Which token follows which: each sequence of pieces, one token per piece."""
    following: dict[int, int] = {}
    for pieces in links:
        ids = [tokenizer(piece)["input_ids"] for piece in pieces]
        assert all(len(i) == 1 for i in ids), pieces
        following |= {a[0]: b[0] for a, b in pairwise(ids)}
    return following


def chain_model(following: dict[int, int]) -> Qwen2ForCausalLM:
    """A model that follows a chain: each token is certain after the one before it."""
    model = wide_qwen2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(264, model.config.hidden_size))
        for token, successor in following.items():
            model.lm_head.weight[successor, token] = 10
    return model


LINKS = [
    ["q", "x", "</", "s", ">.", "z"],
    ["r", "<", "/", "t", ">", "y"],
    ["e", "f", "<|im_end|>", "g"],
    ["1", "2", "3", "4", "5", "6", "7", "8", "9", "0", "1"],
]


@pytest.fixture(params=["transformers", "scripted", VLLM])
def chained(request: pytest.FixtureRequest, merging_renderer: Renderer) -> Engine:
    """An engine whose turns are the chains of LINKS."""
    following = chain(merging_renderer.tokenizer, LINKS)
    if request.param == "transformers":
        return TransformersEngine(chain_model(following), merging_renderer, 4)
    if request.param == "vllm":
        engine: Engine = request.getfixturevalue("vllm_engine")
        for slot in range(4):
            engine.release(slot)
        engine.load_weights(chain_model(following).named_parameters(), version=0)
        return engine

    def script(context: Sequence[int], params: SamplingParams) -> list[int]:
        turn = [following[context[-1]]]
        while len(turn) < params.max_tokens and turn[-1] in following:
            turn.append(following[turn[-1]])
        return turn

    return ScriptedEngine(script, merging_renderer, 256)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "text", "finish_reason"),
    [
        ("q", 20, "x</s>.", "stop"),  # the stop string ends inside the token ">."
        ("r", 20, "</t>", "stop"),  # it spans four tokens
        ("e", 20, "f", "end"),  # the end token is no text
        ("1", 3, "234", "length"),
        ("q", 4, "x</s>.", "stop"),  # complete with the last token that may be
        ("q", 3, "x</s", "length"),
        ("e", 2, "f", "end"),
    ],
)
def test_how_a_turn_ends(
    *,
    chained: Engine,
    prompt: str,
    max_tokens: int,
    text: str,
    finish_reason: str,
    merging_renderer: Renderer,
) -> None:
    engine = chained
    stop = ("</s>", "</t>")
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop)
    engine.submit(2, merging_renderer.encode_text(prompt), params)
    assert engine.busy == 1
    (turn,) = finish(engine)
    assert engine.busy == 0
    assert (turn.slot, turn.text, turn.finish_reason) == (2, text, finish_reason)
    ends = turn.tokens[-1] in merging_renderer.end_ids
    assert ends == (finish_reason == "end")
    assert merging_renderer.decode(turn.tokens[:-1] if ends else turn.tokens) == text
    assert len(turn.logprobs) == len(turn.tokens)


def test_a_turn_goes_on_from_the_last(chained: Engine, merging_renderer: Renderer) -> None:
    engine = chained
    params = SamplingParams(temperature=0, max_tokens=2)
    said = []
    engine.submit(0, merging_renderer.encode_text("1"), params)
    for new in ("", "7", ""):  # an observation may be empty
        said += [turn.text for turn in finish(engine)]
        engine.submit(0, merging_renderer.encode_text(new), params)
    said += [turn.text for turn in finish(engine)]
    assert said == ["23", "45", "89", "01"]
    engine.release(0)
    engine.submit(0, merging_renderer.encode_text("q"), params)
    assert [turn.text for turn in finish(engine)] == ["x</"]


def test_the_context_ends_a_turn(chained: Engine, merging_renderer: Renderer) -> None:
    engine = chained
    params = SamplingParams(temperature=0, max_tokens=50)
    engine.submit(0, merging_renderer.encode_text("x" * 252 + "1"), params)
    (turn,) = finish(engine)
    assert (turn.text, turn.finish_reason) == ("234", "length")
    with pytest.raises(ContextError):
        engine.submit(0, merging_renderer.encode_text("1"), params)
    with pytest.raises(ContextError):
        engine.submit(1, merging_renderer.encode_text("x" * 256), params)
    with pytest.raises(ContextError):
        engine.submit(3, [], params)


def test_a_busy_slot_is_refused_until_released(chained: Engine, merging_renderer: Renderer) -> None:
    engine = chained
    params = SamplingParams(temperature=0, max_tokens=3)
    for slot in range(3):
        engine.submit(slot, merging_renderer.encode_text("1"), params)
    with pytest.raises(ValueError, match="slot 1"):
        engine.submit(1, merging_renderer.encode_text("1"), params)
    engine.release(1)
    assert engine.busy == 2
    engine.submit(1, merging_renderer.encode_text("q"), params)
    assert {t.slot: t.text for t in finish(engine)} == {0: "234", 1: "x</s", 2: "234"}


def test_a_turn_that_is_cut_goes_on(chained: Engine, merging_renderer: Renderer) -> None:
    assert isinstance(chained, Interruptible)
    prompt = merging_renderer.encode_text("r")
    params = SamplingParams(temperature=0, max_tokens=20, stop=("</t>",))
    chained.submit(3, prompt, params)
    for _ in range(0 if isinstance(chained, ScriptedEngine) else 2):
        assert chained.step() == []
    (cut,) = chained.interrupt()
    assert (cut.slot, cut.finish_reason, chained.busy) == (3, "interrupted", 0)
    assert isinstance(chained, ScriptedEngine) or cut.text == "</"
    begun = len(cut.tokens)
    chained.submit(3, [*prompt, *cut.tokens], replace(params, resumed_tokens=begun))
    (turn,) = finish(chained)
    assert (cut.text + turn.text, turn.finish_reason) == ("</t>", "stop")  # it began before the cut
    assert len(turn.tokens) == len(turn.logprobs) == 4 - begun


def test_a_turn_released_midway_leaves_the_others_alone(start: Start) -> None:
    model = wide_qwen2()
    player = Player(start(model), 6)
    for slot in range(6):
        player.submit(slot)
    done = [c for _ in range(2) for c in player.engine.step()]
    player.engine.release(0)
    for completion in [*done, *finish(player.engine)]:
        player.take(completion)
    del player.said[0]
    assert player.worst(model) < 1e-4


def test_released_slots_are_as_new(start: Start) -> None:
    model = wide_qwen2()
    engine = start(model)
    Player(engine, 4).play(turns=3)
    for slot in range(4):
        engine.release(slot)
    again = Player(engine, 4)
    again.play(turns=3)
    assert again.worst(model) < 1e-4


def test_new_weights(start: Start) -> None:
    old, new = wide_qwen2(), wide_qwen2()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1).add_(0.01)
    engine = start(old)
    before = Player(engine, 4)
    before.play(turns=2)
    engine.load_weights(new.named_parameters(), version=7)
    after = Player(engine, 4)
    after.play(turns=2)
    assert after.worst(new) < 1e-4
    assert after.worst(old) > 1e-2
    engine.submit(0, [1], SamplingParams(max_tokens=1))
    assert finish(engine)[0].version == 7


def test_the_given_model_is_left_alone(start: Start) -> None:
    model = wide_qwen2()
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens).logits
    engine = start(model)
    engine.load_weights([(n, torch.zeros_like(p)) for n, p in model.named_parameters()], 1)
    engine.submit(0, [1, 2], SamplingParams(max_tokens=2))
    finish(engine)
    assert torch.equal(model(tokens).logits, before)


def test_weights_that_do_not_fit_are_refused(start: Start) -> None:
    model = wide_qwen2()
    engine = start(model)
    good = list(model.named_parameters())
    with pytest.raises(ModelError, match=r"'nowhere' \[1\]: the model has none"):
        engine.load_weights([("nowhere", torch.zeros(1))], 1)
    with pytest.raises(ModelError, match=r"'model.norm.weight' \[3\]: the model has \[288\]"):
        engine.load_weights([("model.norm.weight", torch.zeros(3))], 1)
    with pytest.raises(ModelError, match=r"1 weights were left out, such as 'model.norm.weight'"):
        engine.load_weights([(n, p) for n, p in good if n != "model.norm.weight"], 1)
    engine.submit(0, [1], SamplingParams(max_tokens=5))
    with pytest.raises(ValueError, match="1 turns are under way"):
        engine.load_weights(good, 1)


def test_logits_that_are_not_finite_are_an_error(start: Start) -> None:
    model = wide_qwen2()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    engine = start(model)
    for slot in range(2):
        engine.submit(slot, [1, 2, 3], SamplingParams())
    with pytest.raises(NonFiniteError, match="not finite"):
        engine.step()
    for slot in range(2):
        engine.release(slot)
    engine.load_weights(wide_qwen2().named_parameters(), 1)  # and nothing of it stays
    again = Player(engine, 2)
    again.play(turns=2)
    assert again.worst(wide_qwen2()) < 1e-4


def test_models_that_it_cannot_run_are_refused(renderer: Renderer) -> None:
    with pytest.raises(ContextError, match="max_context is 300, but the model has 256"):
        TransformersEngine(tiny_qwen2(), renderer, 1, 300)
    sliding = sliding_qwen2(264, window=8)
    engine = TransformersEngine(sliding, renderer, 1, 64)
    engine.submit(0, [1], SamplingParams())
    with pytest.raises(ModelError, match="sliding window of 8"):
        engine.step()


def test_long_submissions_are_split_over_steps(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("research_agent.engines.transformers._MAX_STEP_TOKENS", 24)
    model = tiny_qwen2()
    player = Player(TransformersEngine(model, renderer, 8), 8)
    player.play(turns=2)
    assert player.worst(model) < 1e-4


def test_tokens_of_many_bytes() -> None:
    renderer = make_renderer(byte_tokenizer())
    engine = ScriptedEngine(lambda *_: renderer.encode_text("é»x"), renderer)
    engine.submit(0, renderer.encode_text("a"), SamplingParams(stop=("»",)))
    assert [turn.text for turn in finish(engine)] == ["é»"]


def test_it_samples_in_the_number_format_that_is_asked_for(renderer: Renderer) -> None:
    """The weights of the copy are bfloat16, and the log-probabilities are near the model's own."""
    model = tiny_llama()
    engine: Any = make_engine(
        "transformers", model, renderer, max_slots=2, max_context=64, dtype="bfloat16"
    )
    prompt = [40, 50, 60, 70]
    for version in (0, 1):
        engine.load_weights(model.named_parameters(), version)
        engine.submit(0, prompt, SamplingParams(max_tokens=8, seed=version))
        (completion,) = finish(engine)
        expected = full_logprobs(model, [*prompt, *completion.tokens])
        places = range(len(prompt) - 1, len(expected))
        theirs = [expected[at, token] for at, token in zip(places, completion.tokens, strict=True)]
        difference = torch.tensor(completion.logprobs) - torch.stack(theirs)
        assert 0 < difference.abs().max() < 0.1
        engine.release(0)
    assert next(model.parameters()).dtype == torch.float32
