"""Check the fields of an index that the user made, and decide how they are searched.

A field that would fail only later (because it is not indexed) or silently find nothing (a nested or
a keyword field) is refused here by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from research_env.errors import ConfigurationError
from research_env.retrieval.elasticsearch.client import Body, IndexAddress
from research_env.retrieval.elasticsearch.responses import SourceFields, field_prefixes

TEXT_TYPES = ("text", "match_only_text", "search_as_you_type")
"""Types whose values are analyzed into words."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field that a mapping defines.

    Attributes:
        source: Its path in ``_source``. A multi-field (``body.english``) indexes the values of its
            parent once more, so its source is ``body``.
        mapping: Its parameters: type, analyzer, ...
        nested: Name of the nested object around it; None if it is in none.
    """

    source: str
    mapping: Body
    nested: str | None = None

    @property
    def type(self) -> str:
        """The field's type, as Elasticsearch names it."""
        return str(self.mapping.get("type", "object"))

    @property
    def searchable(self) -> bool:
        """Whether a query of words can find its words."""
        indexed = self.mapping.get("index", True) in (True, "true")
        return self.type in TEXT_TYPES and indexed and self.nested is None


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """How the user's fields are searched.

    Attributes:
        fields: Where texts and titles are read from.
        query: ``match`` (the text alone), ``combined_fields`` (BM25F over title and text), or
            ``multi_match`` (both, where ``combined_fields`` does not work).
    """

    fields: SourceFields
    query: str


def plan_search(address: IndexAddress, mapping: Body, text: str, title: str | None) -> SearchPlan:
    """Decide how the fields that a URL names are searched.

    A title that is not analyzed (a ``keyword``, say) is shown and not searched. Titles and texts
    with different analyzers, norms or similarities cannot be one field to Elasticsearch, so they
    are searched by ``multi_match``.

    Args:
        address: The index, for messages.
        mapping: Mapping of the index.
        text: Name of the field of the texts.
        title: Name of the field of the titles; None if there are none.

    Returns:
        Where texts and titles are, and which query searches them.

    Raises:
        ConfigurationError: A field does not exist, or cannot be searched or shown.
    """
    source = mapping.get("_source", {})
    if source.get("enabled") in (False, "false"):
        raise ConfigurationError(
            f"the index {address} keeps no _source, from which texts are read; index its documents "
            "again with _source enabled"
        )
    text_field = _required(address, mapping, text)
    _check_searchable(address, mapping, text, text_field)
    if title is None:
        return SearchPlan(SourceFields(text, text_field.source, None), "match")
    title_field = _required(address, mapping, title)
    if title_field.nested is not None:
        _check_searchable(address, mapping, title, title_field)
    fields = SourceFields(text, text_field.source, title_field.source)
    if not title_field.searchable:
        return SearchPlan(fields, "match")
    alike = _scoring(title_field) == _scoring(text_field) and text_field.type == "text"
    combined = alike and text_field.mapping.get("similarity", "BM25") == "BM25"
    return SearchPlan(fields, "combined_fields" if combined else "multi_match")


def find_field(mapping: Body, path: str) -> Field | None:
    """Find a field of a mapping by its path.

    Args:
        mapping: A mapping, or that of an object within it.
        path: Names with dots between them; a multi-field or an alias, too.

    Returns:
        The field; None if the mapping has none, or an object, at that path.
    """
    return _find(mapping, mapping, path, depth=0)


def _find(root: Body, mapping: Body, path: str, depth: int) -> Field | None:
    for name, rest, each in field_prefixes(mapping.get("properties", {}), path):
        if not rest:
            if each.get("type") == "alias" and depth == 0:  # an alias of an alias does not exist
                return _find(root, root, str(each.get("path")), depth=1)
            return None if "properties" in each else Field(name, each)
        if rest in each.get("fields", {}):
            return Field(name, each["fields"][rest])
        found = _find(root, each, rest, depth)
        if found is not None:
            copied = each.get("include_in_root") or each.get("include_in_parent")
            nested = each.get("type") == "nested" and not copied
            return Field(f"{name}.{found.source}", found.mapping, name if nested else found.nested)
    return None


def _required(address: IndexAddress, mapping: Body, path: str) -> Field:
    field = find_field(mapping, path)
    if field is None:
        raise ConfigurationError(
            f"the index {address} has no field {path!r} of texts; fields that can be searched: "
            f"{_list_searchable(mapping)}"
        )
    return field


def _check_searchable(address: IndexAddress, mapping: Body, path: str, field: Field) -> None:
    """Refuse a field that a search of words cannot find anything in.

    Raises:
        ConfigurationError: It names the field, says why, and what to do.
    """
    if field.searchable:
        return
    start = f"the field {path!r} of the index {address} cannot be searched"
    if field.nested is not None:
        raise ConfigurationError(
            f"{start}: it is inside the nested field {field.nested!r}, whose parts are documents "
            "of their own. Map that field with include_in_root: true, or index each part as a "
            "document"
        )
    if field.type in TEXT_TYPES:
        raise ConfigurationError(f"{start}: it is not indexed (index: false in its mapping)")
    raise ConfigurationError(
        f"{start} by words: its type is {field.type}, not text. Fields that can be: "
        f"{_list_searchable(mapping)}"
    )


def _scoring(field: Field) -> tuple[Any, ...]:
    """What must be equal in two fields that ``combined_fields`` searches as one."""
    analyzer = field.mapping.get("analyzer")
    return (
        field.type,
        field.mapping.get("search_analyzer", analyzer),
        field.mapping.get("norms", True),
        field.mapping.get("similarity", "BM25"),
    )


def _list_searchable(mapping: Body) -> str:
    """The first few names of fields that can be searched, for a message."""
    return ", ".join(sorted(_searchable_names(mapping, ""))[:10]) or "none"


def _searchable_names(mapping: Body, prefix: str) -> list[str]:
    names: list[str] = []
    for name, each in mapping.get("properties", {}).items():
        path = f"{prefix}{name}"
        if Field(path, each).searchable:
            names.append(path)
        parts = each.get("fields", {}).items()
        names += [f"{path}.{part}" for part, it in parts if Field(part, it).searchable]
        if each.get("type") != "nested":
            names += _searchable_names(each, f"{path}.")
    return names
