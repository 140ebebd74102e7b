"""The contract of retrievers, for the embedded engine and for engines by their URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_env.errors import UnknownNameError
from research_env.retrieval import SCHEMES, open_retriever
from research_env.retrieval.embedded import EmbeddedRetriever
from tests.research_env.retriever_contract import (
    CLAUSES,
    Clause,
    ContractCorpus,
    contract_index,
    environments_travel,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contract_index(tmp_path_factory.mktemp("retrieval"))


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_contract_of_the_embedded_engine(clause: Clause, index: Path) -> None:
    clause(lambda: EmbeddedRetriever(index, ContractCorpus()))


def test_environments_with_an_embedded_engine_travel(index: Path) -> None:
    environments_travel(f"embedded:{index}?corpus=any")


def test_every_scheme_is_named_where_one_is_unknown() -> None:
    with pytest.raises(UnknownNameError) as caught:
        open_retriever("solr:x", None)
    assert all(f"{scheme}:..." in str(caught.value) for scheme in SCHEMES)
