"""Long passages in chunks of words."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_env import cli
from research_env.datasets.chunks import ChunkedCorpus, chunk_text, mean_words
from research_env.errors import ConfigurationError
from research_env.retrieval.base import Passage
from tests.research_env.fakes import ListCorpus


def test_chunks_by_hand() -> None:
    assert chunk_text("a b c d e f g", 3, 1) == ["a b c", "c d e", "e f g"]
    assert chunk_text("a b c d e f g h", 3, 1) == ["a b c", "c d e", "e f g", "g h"]
    assert chunk_text(" a\n\tb  c,\nd e ", 4, 0) == ["a\n\tb  c,\nd", "e"]
    assert chunk_text(" a b ", 2, 0) == [" a b "]
    assert chunk_text("", 2, 0) == [""]
    assert chunk_text("北京是中国 capital", 3, 1) == ["北京是", "是中国", "国 capital"]


@given(
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=60),
    st.integers(1, 20),
    st.data(),
)
def test_no_word_is_lost_and_overlaps_are_as_long_as_said(
    words: list[str], size: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    chunks = [chunk.split() for chunk in chunk_text(" ".join(words), size, overlap)]
    assert all(len(chunk) <= size for chunk in chunks)
    joined = chunks[0]
    for before, chunk in itertools.pairwise(chunks):
        assert len(before) == size
        assert before[size - overlap :] == chunk[:overlap]
        assert len(chunk) > overlap
        joined = joined + chunk[overlap:]
    assert joined == words


def test_titles_are_kept_and_short_passages_stay() -> None:
    short = Passage("s", "Short", "one two")
    long = Passage("l", "Long", " ".join(f"w{i}" for i in range(12)))
    chunked = ChunkedCorpus(ListCorpus((short, long)), 10)
    assert list(chunked) == [
        short,
        Passage("l#0", "Long", "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9"),
        Passage("l#1", "Long", "w8 w9 w10 w11"),
    ]
    other = ChunkedCorpus(ListCorpus((short, long)), 11)
    assert len({chunked.fingerprint(), other.fingerprint(), chunked.corpus.fingerprint()}) == 3
    assert mean_words(chunked.corpus) == 7
    with pytest.raises(ConfigurationError, match="1 word or more, not 0"):
        ChunkedCorpus(ListCorpus(()), 0)


def test_the_command_chunks_and_suggests_to_chunk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    text = " ".join([*["filler"] * 500, "needle", *["filler"] * 500])
    corpus.write_text(json.dumps({"id": "d", "title": "Doc", "text": text}) + "\n")
    command = ["index", "--corpus", str(corpus), "--to", str(tmp_path / "whole")]
    cli.main(command)
    out, err = capsys.readouterr()
    assert "1 passages" in out
    assert "1,001 words" in err
    assert "--chunk 100" in err
    cli.main(["index", "--corpus", str(corpus), "--to", str(tmp_path / "parts"), "--chunk", "100"])
    out, err = capsys.readouterr()
    assert "13 passages" in out  # 100 words each, one every 80 words
    assert err == ""
    assert f"embedded:{tmp_path / 'parts'}" in out
    cli.main(["search", "needle", "--retriever", f"embedded:{tmp_path / 'parts'}", "--json"])
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert [(hit["id"], hit["title"]) for hit in hits] == [("d#6", "Doc")]
    with pytest.raises(SystemExit):
        cli.main(["index", "--corpus", str(corpus), "--chunk", "100"])
    assert "--chunk needs --to" in capsys.readouterr().err
