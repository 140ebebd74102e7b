"""A model is proved before it is trained: engine and learner compute what transformers computes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES, tiny
from research_agent.algorithms import make_algorithm
from research_agent.config import LearnerConfig
from research_agent.engines import make_engine
from research_agent.engines.base import Engine, SamplingParams
from research_agent.engines.transformers import TransformersEngine
from research_agent.errors import ContextError, ModelError
from research_agent.learner import Learner
from research_agent.models.prepare import prepare, require_learnable
from research_agent.models.probe import logit_difference
from research_agent.renderer import Renderer
from research_agent.trajectory import Group, Segment
from research_agent.trees import Forking
from tests.research_agent.conftest import byte_tokenizer, make_renderer, tiny_llama
from tests.research_agent.learners import make_learner
from tests.research_agent.rollouts import action, trajectory

HYBRIDS = ["Qwen3.5", "LFM2", "Falcon-H1", "Granite 4 hybrid", "Falcon", "Bloom", "Mamba"]
PROMPTS = [list(range(20, 60)), list(range(100, 125))]
OBSERVATION = [7, 8, 9, 10, 11]


def renderer_without_ends() -> Renderer:
    """Its end token is one that nothing samples: every turn has its whole length."""
    return Renderer(byte_tokenizer(), frozenset({263}))


def make(name: str) -> Any:
    return tiny(*ARCHITECTURES[name])


def make_longrope() -> Any:
    """It reads sequences of more than 64 tokens with other frequencies; it has 256 positions."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return tiny("Phi3Config", {"original_max_position_embeddings": 64, "rope_parameters": rope})


def engine_of(model: Any, slots: int, share: bool = False, max_context: int | None = 120) -> Engine:
    return make_engine(
        "transformers",
        model,
        renderer_without_ends(),
        max_slots=slots,
        max_context=max_context,
        share=share,
    )


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """Forwards of the whole sequence, no cache: the slow oracle."""
    said = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            said.append(int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    return said[len(tokens) :]


def take(engine: Engine) -> dict[int, list[int]]:
    said: dict[int, list[int]] = {}
    while engine.busy:
        said |= {turn.slot: list(turn.tokens) for turn in engine.step()}
    return said


@pytest.mark.filterwarnings("ignore:.*one sequence at a time")
@pytest.mark.parametrize(
    ("name", "share"),
    [
        *((name, False) for name in (*HYBRIDS, "StableLM", "Nemotron", "DeepSeek-V3", "Qwen3")),
        *((name, True) for name in ("Qwen3.5", "Bloom", "Qwen3")),
    ],
)
def test_greedy_tokens_are_the_models_own(name: str, share: bool) -> None:
    model, oracle = make(name), make(name)
    engine = engine_of(model, 2, share)
    params = SamplingParams(temperature=0, max_tokens=8)
    for slot, prompt in enumerate(PROMPTS):
        engine.submit(slot, prompt, params)
    first = take(engine)
    assert [first[slot] for slot in (0, 1)] == [greedy(oracle, p, 8) for p in PROMPTS]
    engine.submit(1, OBSERVATION, params)  # a second turn, after an observation
    told = [*PROMPTS[1], *first[1], *OBSERVATION]
    assert take(engine)[1] == greedy(oracle, told, 8)
    engine.release(0)
    engine.submit(0, PROMPTS[1], params)  # a slot that is used again has forgotten
    assert take(engine)[0] == greedy(oracle, PROMPTS[1], 8)


def test_a_model_that_is_sampled_one_at_a_time_says_so() -> None:
    with pytest.warns(UserWarning, match=r"sampled one sequence at a time.*--engine vllm"):
        engine_of(make("Bloom"), 2)


@pytest.mark.filterwarnings("ignore:.*one sequence at a time")
@pytest.mark.parametrize("name", ["Qwen3.5", "Bloom"])
def test_new_weights_are_sampled_from(name: str) -> None:
    model = make(name)
    engine = engine_of(model, 2)
    engine.submit(0, PROMPTS[0], SamplingParams(temperature=0, max_tokens=6))
    take(engine)  # keys, values and states of the old weights
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.7)
    engine.load_weights(model.named_parameters(), version=1)
    engine.submit(0, PROMPTS[0], SamplingParams(temperature=0, max_tokens=6))
    assert take(engine)[0] == greedy(model, PROMPTS[0], 6)


@pytest.mark.parametrize("name", ["Qwen3.5", "LFM2", "Falcon-H1", "Granite 4 hybrid", "Mamba"])
def test_every_slot_keeps_its_own_state(name: str) -> None:
    """Turns begin and end at different times, and slots are used again."""
    model = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that it is sampled one sequence at a time
        engine = engine_of(model, 4)
    lengths = [5, 1, 9, 3]
    said = {slot: list(range(10 * slot + 10, 10 * slot + 18 + slot)) for slot in range(4)}
    new = {slot: list(tokens) for slot, tokens in said.items()}
    for turn in range(3):
        for slot, tokens in new.items():
            count = lengths[(slot + turn) % 4]
            engine.submit(slot, tokens, SamplingParams(max_tokens=count, temperature=0.0))
        for slot, tokens in take(engine).items():
            assert tokens == greedy(model, said[slot], len(tokens))
            said[slot] += tokens
        engine.release(turn)
        said[turn] = [30 + turn, 31, 32]  # another trajectory
        new = {slot: [40 + slot, 41][: 1 + slot % 2] for slot in range(4)}
        new[turn] = list(said[turn])
        for slot in set(range(4)) - {turn}:
            said[slot] += new[slot]
    assert not isinstance(engine, Forking)  # a state cannot be taken back


@pytest.mark.parametrize("name", ["Falcon", "Bloom", "StableLM", "Nemotron", "Gemma 2"])
def test_packing_that_would_be_wrong_is_refused(name: str) -> None:
    model = make(name)
    tokens = torch.tensor([PROMPTS[1]])
    before = model(input_ids=tokens).logits
    with pytest.raises(ModelError, match=r"cannot share a row: .*; use --packing off"):
        prepare(model, packing="on")
    assert torch.equal(model(input_ids=tokens).logits, before)  # the model is as it was


def test_required_packing_stops_a_learner_before_it_learns() -> None:
    rule = make_algorithm("grpo", kl_coef=0.0, entropy_coef=0.0)
    with pytest.raises(ModelError, match="use --packing off"):
        Learner(make("Falcon"), rule, LearnerConfig(packing="on"))
    Learner(make("Falcon"), rule, LearnerConfig(packing="auto"))
    Learner(make("Qwen3.5"), rule, LearnerConfig(packing="on"))


@pytest.mark.parametrize("name", ["Gemma 2", "Granite"])
def test_logits_are_scaled_and_capped_as_the_configuration_says(name: str) -> None:
    require_learnable(make(name), name)


def test_logits_changed_after_the_head_are_refused() -> None:
    model = tiny_llama()

    def double(_: Any, __: Any, out: Any) -> None:
        out.logits.mul_(2)

    model.register_forward_hook(double)
    with pytest.raises(ModelError, match="changes its logits after its head"):
        require_learnable(model, "doubled")


def test_a_model_that_sees_its_neighbors_is_refused() -> None:
    """Architectures that nobody has heard of are compared too."""
    model = tiny_llama()
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _, __, out: out + out.mean(dim=(0, 1), keepdim=True))
    numbers = "differ by .* where they spread by .*Use --engine vllm"
    with pytest.raises(ModelError, match=f"does not compute what LlamaForCausalLM does.*{numbers}"):
        engine_of(model, 2)
    with pytest.raises(ModelError, match="cannot share a row"):
        prepare(model, packing="on")


def test_a_longrope_model_samples_in_its_original_context_only() -> None:
    for max_context, length in ((None, 256), (65, 65)):
        message = f"up to {length} tokens.*lower --max-prompt and --max-response.*at most 64 tokens"
        with pytest.raises(ContextError, match=message):
            engine_of(make_longrope(), 2, max_context=max_context)
    engine = engine_of(make_longrope(), 2, max_context=64)
    for slot, tokens in enumerate(PROMPTS):
        engine.submit(slot, tokens, SamplingParams(temperature=0))
    said = take(engine)
    assert [len(said[slot]) for slot in (0, 1)] == [64 - len(tokens) for tokens in PROMPTS]
    for slot, tokens in enumerate(PROMPTS):
        assert said[slot] == greedy(make_longrope(), tokens, len(said[slot]))


@pytest.mark.parametrize("packing", ["off", "on", "tree"])
def test_a_longrope_model_learns_in_its_original_context_only(packing: Any) -> None:
    """The last token of a trajectory is not read."""
    learner = make_learner(make_longrope(), make_algorithm("grpo", kl_coef=0.0), packing=packing)
    prompt = Segment("prompt", (1, 2))
    short = trajectory(prompt, action([3, 4]), reward=0.0)
    fits, beyond = (
        trajectory(prompt, action(range(length - 2)), reward=1.0, sample=1) for length in (65, 66)
    )
    assert learner.update([Group(0, [short, fits])])["max_length"] == 65
    with pytest.raises(ContextError, match=r"up to 65 tokens.*more than 64 tokens would change"):
        learner.update([Group(0, [short, beyond])])


def test_a_difference_is_measured_against_the_spread() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    assert logit_difference(logits, logits) == ""
    assert logit_difference(logits + 3, logits) == ""  # the same distribution
    assert logit_difference(logits + 1e-5 * torch.randn(6, 50), logits) == ""
    small = 1e-3 * logits  # nearly uniform: rounding is as much smaller
    assert logit_difference(small + 1e-4 * torch.randn(6, 50), small)
    assert logit_difference(logits + 0.05 * torch.randn(6, 50), logits)
    half = logits.bfloat16()
    assert logit_difference((half + 0.02 * torch.randn(6, 50)).bfloat16(), half) == ""
    assert logit_difference(torch.full((6, 50), torch.nan), logits)


@pytest.mark.parametrize("context", [4, 12, 17, 40])
def test_short_contexts_and_single_slots_are_proved_as_well(context: int) -> None:
    for slots in (1, 3):
        engine = make_engine(
            "transformers",
            tiny_llama(),
            make_renderer(byte_tokenizer()),
            max_slots=slots,
            max_context=context,
        )
        assert not engine.busy


def test_too_little_memory_is_no_wrong_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")

    monkeypatch.setattr(TransformersEngine, "difference_to_plain", full)
    renderer = make_renderer(byte_tokenizer())
    with pytest.raises(torch.OutOfMemoryError):
        make_engine("transformers", tiny_llama(), renderer, max_slots=2, max_context=100)
