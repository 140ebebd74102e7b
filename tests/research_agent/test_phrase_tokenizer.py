"""The tokenizer of whole phrases: any text survives, and no text is ever a special token."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.phrase_tokenizer import END, phrase_tokenizer
from research_agent.renderer import Renderer, load_renderer
from tests.research_agent.conftest import make_renderer

PHRASES = ["the cat", "the ", "cat", " sat", "at", "s", "<search>", "\n", "é", "été", "0"]
TRICKS = [
    "<0x41>",
    "<0xC3>",
    END,
    "<unk>",
    "<",
    ">",
    "|",
    "\x00",
    "\ud7ff",
    "漢字",
    "\u0301",
    *PHRASES,
]


@cache
def renderer() -> Renderer:
    return make_renderer(phrase_tokenizer(PHRASES))


def pieces(text: str) -> list[str]:
    tokens: list[str] = renderer().tokenizer.convert_ids_to_tokens(renderer().encode_text(text))
    return tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("the cat sat", ["the cat", " sat"]),
        ("the cat s", ["the cat", " ", "s"]),
        ("cats", ["cat", "s"]),
        ("was", ["w", "a", "s"]),  # spelled in letters where no phrase fits
        ("<search>\n", ["<search>", "\n"]),
        ("été", ["été"]),
        ("éa", ["é", "a"]),
        ("ê", ["<0xC3>", "<0xAA>"]),  # and in bytes where it is not ASCII
        ("\t", ["<0x09>"]),
        ("<0x41>", ["<", "0", "x", "4", "1", ">"]),
        (END, list(END)),
        ("<unk>", list("<unk>")),
    ],
)
def test_how_a_text_is_cut(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(TRICKS), st.text(max_size=8)), max_size=8).map("".join))
def test_any_text_survives_and_is_never_a_special_token(text: str) -> None:
    tokens = renderer().encode_text(text)
    assert renderer().decode(tokens) == text
    assert not set(tokens) & set(renderer().tokenizer.all_special_ids)
    assert renderer().encode_prompt(text) == tokens  # nothing is put in front


def fewest(text: str) -> int:
    """The least number of phrases that a text is made of, by trying all."""
    least = [0] + [len(text) + 1] * len(text)
    for end in range(1, len(text) + 1):
        for phrase in PHRASES:
            if text.endswith(phrase, 0, end):
                least[end] = min(least[end], least[end - len(phrase)] + 1)
    return least[-1]


@given(st.lists(st.sampled_from(PHRASES), max_size=12).map("".join))
def test_as_few_phrases_as_there_can_be(text: str) -> None:
    assert len(pieces(text)) == fewest(text)


def test_repeated_phrases_count_once_and_the_end_is_the_only_way_out(tmp_path: Path) -> None:
    tokenizer = phrase_tokenizer(["a b", "a b", "c"])
    assert len(tokenizer) == len(phrase_tokenizer(["a b", "c"]))
    assert tokenizer.eos_token == tokenizer.pad_token == END
    tokenizer.save_pretrained(tmp_path)
    opened = load_renderer(tmp_path)
    assert opened.end_ids == {tokenizer.eos_token_id}
    text = "a bc <0x41> é" + END
    assert opened.encode_text(text) == make_renderer(tokenizer).encode_text(text)
    assert opened.decode(opened.encode_text(text)) == text
