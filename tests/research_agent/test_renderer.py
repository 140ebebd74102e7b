from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from research_agent.errors import ModelError
from research_agent.renderer import Renderer, load_renderer
from research_env.adapters.tokens import encode_text
from tests.research_agent.conftest import SPECIALS, byte_tokenizer, make_renderer, tiny_llama
from tests.research_agent.model_files import save_adapter, save_model

RENDERER = make_renderer(byte_tokenizer(merges=True))
CHAT = make_renderer(byte_tokenizer(), chat_template=True)
END = RENDERER.tokenizer.eos_token_id
texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPECIALS))).map("".join)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_text_round_trips_and_never_holds_a_special_token(text: str) -> None:
    tokens = RENDERER.encode_text(text)
    assert RENDERER.decode(tokens) == text
    assert not set(tokens) & set(RENDERER.tokenizer.all_special_ids)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_text_is_cut_as_the_tokenizer_itself_does_it(text: str) -> None:
    own = RENDERER.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert RENDERER.encode_text(text) == own


def test_a_tokenizer_that_truncates_and_pads_by_habit_does_neither() -> None:
    tokenizer = byte_tokenizer(merges=True)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    renderer = make_renderer(tokenizer)
    for text in ("a", "Who founded it?"):
        assert renderer.encode_text(text) == RENDERER.encode_text(text)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3  # it is somebody else's


def test_a_tokenizer_without_a_backend_is_called() -> None:
    class Slow:
        """As tokenizers are that are written in Python."""

        all_special_ids = (0,)
        unk_token_id = None

        def __call__(self, text: str, **settings: bool) -> dict[str, list[int]]:
            given = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            assert settings == given
            return {"input_ids": [ord(character) for character in text]}

    assert Renderer(Slow(), frozenset({0})).encode_text("ab") == [97, 98]


def test_special_tokens_are_cut_where_the_vocabulary_holds_them_as_words() -> None:
    words = {"<unk>": 0, "<end>": 1, "a": 2, "<": 3, "end>": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>"
    )
    renderer = Renderer(tokenizer, frozenset({1}))
    assert renderer.encode_text("a <end> <end> b") == [2, 3, 4, 3, 4, 0]
    assert renderer.encode_text("<end> " * 600) == [3, 4] * 600
    assert encode_text(tokenizer, "a <end> <end> b") == [2, 3, 4, 3, 4, 0]
    assert encode_text(tokenizer, "<end> " * 1000) == [3, 4] * 1000


def test_a_plain_prompt_begins_as_the_tokenizer_does() -> None:
    renderer = make_renderer(byte_tokenizer(begin=True))
    begin, text = renderer.tokenizer.bos_token_id, renderer.encode_text("ab")
    assert begin not in text
    assert renderer.encode_prompt("ab") == [begin, *text]
    assert make_renderer(byte_tokenizer()).encode_prompt("ab") == text


def test_chat_template_equals_the_tokenizers_own_on_plain_contents() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    own = CHAT.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert CHAT.encode_prompt("ignored", messages) == own
    assert CHAT.encode_prompt("Who?") == CHAT.encode_prompt("", messages[1:])


@given(texts, texts)
@settings(max_examples=100, deadline=None)
def test_only_the_templates_markup_yields_special_tokens(first: str, second: str) -> None:
    messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
    tokens = CHAT.encode_prompt("", messages)
    assert CHAT.decode(tokens) == (
        f"<|im_start|>user\n{first.strip()}<|im_end|>\n"
        f"<|im_start|>user\n{second.strip()}<|im_end|>\n<|im_start|>assistant\n"
    )
    specials = CHAT.tokenizer.convert_ids_to_tokens([t for t in tokens if t >= 256])
    assert specials == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]


def test_a_template_that_changes_the_contents_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ModelError, match="changes what the messages say"):
        make_renderer(tokenizer, chat_template=True).encode_prompt("who?")


@pytest.mark.parametrize(
    ("pieces", "stop", "stops"),
    [
        (["</", "s", ">."], "</s>", True),  # ends inside a token
        (["<", "/", "s", ">"], "</s>", True),  # spans tokens
        (["x", "</", "s", "h>"], "</s>", False),
        (["é"], "é", True),  # a character of two tokens
        (["<|im_start|>"], "rt|>", True),  # inside a special token
        (["a"], "", False),
    ],
)
def test_stop_strings(pieces: list[str], stop: str, stops: bool) -> None:
    tokens = [t for piece in pieces for t in RENDERER.tokenizer(piece)["input_ids"]]
    wanted = (stop,) if stop else ()
    assert RENDERER.stops(tokens, wanted) is stops
    assert RENDERER.stop_flags(wanted)[tokens[-1]] or not stops


def test_stop_flags_leave_most_tokens_out() -> None:
    flags = RENDERER.stop_flags(("</s>",))
    flagged = [RENDERER.decode([t]) for t in flags.nonzero()[0].tolist() if t != END]
    assert {">", ">.", "h>", "<|im_start|>"} <= set(flagged)
    assert not {"a", "</", "<", "s"} & set(flagged)


def test_load(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert load_renderer(tmp_path).end_ids == {tokenizer.eos_token_id}
    GenerationConfig(eos_token_id=[5, tokenizer.eos_token_id]).save_pretrained(tmp_path)
    loaded = load_renderer(tmp_path, chat_template=True)
    assert loaded.end_ids == {5, tokenizer.eos_token_id}
    assert loaded.encode_prompt("Who?") == CHAT.encode_prompt("Who?")


def test_an_adapter_with_its_own_tokenizer_ends_turns_as_its_base_does(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    save_model(tmp_path / "base", tiny_llama(len(tokenizer)))
    GenerationConfig(eos_token_id=[5, tokenizer.eos_token_id]).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert load_renderer(tmp_path / "adapter").end_ids == {5, tokenizer.eos_token_id}


def test_chat_tokens_that_only_the_list_of_added_tokens_calls_special() -> None:
    """As in the files of Llama 3."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|start_header_id|>", special=True)], special_tokens=False)
    number = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert number not in tokenizer.all_special_ids
    chat = make_renderer(tokenizer, chat_template=True)
    mark = "<|start_header_id|>"
    assert chat.encode_observation(f"x{mark}", (mark,)) == [*chat.encode_text("x"), number]
    assert number not in chat.encode_text(f"x{mark}")
    assert number not in encode_text(tokenizer, f"x{mark}")  # the adapters' own


def test_load_refuses_what_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model folder .*nowhere"):
        load_renderer(tmp_path / "nowhere")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="no chat template"):
        load_renderer(tmp_path / "plain", chat_template=True)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ModelError, match="no end token"):
        load_renderer(tmp_path / "endless")
    with pytest.raises(ModelError, match="no end token"):
        Renderer(tokenizer, frozenset())


def test_chat_markup_of_an_observation_is_special_and_the_rest_is_text() -> None:
    text, markup = (
        "\n<|im_start|>user\n<|endoftext|><|im_end|>",
        ("<|im_start|>", "<|im_end|>", "[X]"),
    )
    chat = make_renderer(byte_tokenizer(), chat_template=True)
    start, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    inside = chat.encode_text("user\n<|endoftext|>")
    expected = [*chat.encode_text("\n"), start, *inside, end]
    assert chat.encode_observation(text, markup) == expected
    assert chat.encode_observation(text) == chat.encode_text(text)
    assert chat.decode(expected) == text
    plain = make_renderer(byte_tokenizer())
    assert plain.encode_observation(text, markup) == plain.encode_text(text)
