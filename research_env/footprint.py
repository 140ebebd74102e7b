"""What the search engine of an environment needs: disk, memory, and time to index."""

from __future__ import annotations

from typing import Any

PASSAGES = {"wiki18": 21_015_324, "musique": 8_335, "hotpotqa": 11_357, "2wiki": 9_616}
"""Number of passages of known corpora; wiki18 is FlashRAG's and Search-R1's Wikipedia."""

# Bytes per passage on disk, texts included, and passages indexed per second on two cores: measured
# on a million passages of a hundred words (benchmarks/RESULTS.md).
_ENGINES = {"elasticsearch": (672, 4_276), "embedded": (1_047, 1_610)}


def footprint(**settings: Any) -> dict[str, str]:
    """What an environment needs for its searches, in words, for ``research-agent train --plan``.

    Args:
        **settings: the keyword arguments of the environment.

    Returns:
        A text for each need; empty if the size of the corpus is not known.
    """
    place = str(settings.get("retriever") or "embedded")
    scheme, _, rest = place.partition(":")
    engine = scheme.partition("+")[0]
    corpus = rest.partition("?")[0].rpartition("/")[2] or str(settings.get("dataset", ""))
    if engine not in _ENGINES or corpus not in PASSAGES:
        return {}
    count, (size, speed) = PASSAGES[corpus], _ENGINES[engine]
    disk = f"{count * size / 1e9:.1f} GB"
    return {
        "passages": f"{count:,} ({corpus})",
        "disk of the index": disk,
        "memory": f"{disk} as file cache if every search is to be quick"
        + (", and a heap of 4 GB" if engine == "elasticsearch" else ""),
        "time to index": f"{count / speed / 3600:.1f} h at {speed:,} passages/s",
    }
