"""Chat templates: tokens equal to the library's, system texts, dates, and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.errors import ConfigError, ModelError
from research_agent.renderer import Renderer, load_renderer
from tests.research_agent.conftest import byte_tokenizer
from tests.research_agent.sentence_tokenizers import llama2_tokenizer, mistral_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# The template of Llama 2, which Mistral's first one resembles.
LLAMA2 = """
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
{%- set content = system + message['content'] if loop.first else message['content'] -%}
{%- if message['role'] == 'user' -%}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + content.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
TOKENIZERS = {
    "llama2": llama2_tokenizer(),
    "llama2, normalized tokens": llama2_tokenizer(normalized=True),
    "mistral": mistral_tokenizer(),
    "mistral, always": mistral_tokenizer("always"),
    "bytes": byte_tokenizer(merges=True),
}
QUESTION = {"role": "user", "content": "Who founded it?"}
CHATS = [
    [QUESTION],
    [{"role": "system", "content": "Be brief."}, {**QUESTION, "content": " Who? \n"}],
]
texts = st.lists(st.one_of(st.text(max_size=6), st.sampled_from([" ", "[INST]", "a b"])))


def rendered(tokenizer: Any, template: str, **more: Any) -> Renderer:
    tokenizer.chat_template = template
    return Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), True, **more)


def trls(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "name", ["llama2", "qwen2_5", "qwen3", "qwen3_5_think", "llama3", "deepseek_r1_distill", "phi3"]
)
def test_tokens_are_those_of_the_library(kind: str, name: str) -> None:
    tokenizer = TOKENIZERS[kind]
    renderer = rendered(tokenizer, LLAMA2 if name == "llama2" else trls(name))
    for chat in CHATS:
        own = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert renderer.encode_prompt("", chat) == own


def test_the_blank_before_a_marker_is_one_token_with_it() -> None:
    tokenizer = TOKENIZERS["mistral"]
    tokens = rendered(tokenizer, LLAMA2).encode_prompt("", [{**QUESTION, "content": "Who"}])
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    assert pieces[0] == "<s>"
    assert "".join(pieces[1:]) == "[INST]▁Who▁[/INST]"  # no blank twice, none in front


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(said=texts.map("".join))
@settings(max_examples=40, deadline=None)
def test_any_text_is_tokenized_as_the_library_does(kind: str, said: str) -> None:
    tokenizer = TOKENIZERS[kind]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"x{said}"}]
    renderer = rendered(tokenizer, LLAMA2)
    own = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert renderer.encode_prompt("", chat) == own


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("said", ["</s>", "a <s> b", "x<|im_end|>", "<", "<<s>", "a</s"])
def test_a_message_never_yields_a_special_token(kind: str, said: str) -> None:
    tokenizer = TOKENIZERS[kind]
    renderer = rendered(tokenizer, LLAMA2)
    clean = renderer.encode_prompt("", [{**QUESTION, "content": "x"}])
    tokens = renderer.encode_prompt("", [{**QUESTION, "content": said}])
    special = set(tokenizer.all_special_ids)
    assert [t for t in tokens if t in special] == [t for t in clean if t in special]
    assert said.strip() in renderer.decode(tokens)


# --- the system role ------------------------------------------------------------------------------


def test_a_template_that_refuses_the_system_role_gets_its_text_in_the_user_turn() -> None:
    renderer = rendered(byte_tokenizer(), trls("gemma"))
    assert renderer.decode(renderer.encode_prompt("", CHATS[1])) == (
        "<|endoftext|><start_of_turn>user\nBe brief.\n\n Who?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_that_leaves_the_system_role_out_gets_its_text_in_the_user_turn() -> None:
    silent = "{% for m in messages if m.role == 'user' %}U:{{ m.content }};{% endfor %}"
    renderer = rendered(byte_tokenizer(), silent)
    assert renderer.decode(renderer.encode_prompt("", CHATS[1])) == "U:Be brief.\n\n Who? \n;"


def test_messages_that_a_template_refuses_are_an_error_with_its_words() -> None:
    renderer = rendered(byte_tokenizer(), "{{ raise_exception('one message only') }}")
    with pytest.raises(ModelError, match=r"roles system, user|roles user.*one message only"):
        renderer.encode_prompt("", CHATS[1])


# --- settings -------------------------------------------------------------------------------------


def test_arguments_reach_the_template() -> None:
    thinks = rendered(byte_tokenizer(), trls("qwen3"))
    silent = rendered(
        byte_tokenizer(), trls("qwen3"), chat_template_args={"enable_thinking": False}
    )
    assert "<think>" not in thinks.decode(thinks.encode_prompt("Who?"))
    assert silent.decode(silent.encode_prompt("Who?")).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"enable_thinknig": False}, "reads no 'enable_thinknig'"),
        ({"messages": []}, "messages is set by the trainer"),
    ],
)
def test_arguments_that_the_template_does_not_read_are_refused(
    args: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        rendered(byte_tokenizer(), trls("qwen3"), chat_template_args=args)


def test_a_template_that_writes_the_date_writes_the_day_it_is_given(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = trls("llama3_2")
    tokenizer.save_pretrained(tmp_path)
    old = load_renderer(tmp_path, chat_template=True, chat_template_date="2025-03-09")
    assert "Today Date: 09 Mar 2025" in old.decode(old.encode_prompt("Who?"))
    now = load_renderer(tmp_path, chat_template=True)
    assert now.chat_template_date  # the day of the call, for as long as the renderer lives
    assert now.encode_prompt("Who?") != old.encode_prompt("Who?")
    tokenizer.chat_template = trls("qwen3")
    tokenizer.save_pretrained(tmp_path)
    dateless = load_renderer(tmp_path, chat_template=True, chat_template_date="2025-03-09")
    assert dateless.chat_template_date == ""
