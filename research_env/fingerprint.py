"""What the results of an environment depend on besides the policy."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from research_env.core import MAX_PASSAGE_CHARS, EnvCore
from research_env.retrieval.url import WITHOUT_EFFECT, split_options
from research_env.system.redaction import redact_url


def environment_fingerprints(core: EnvCore) -> dict[str, str]:
    """What results depend on besides the policy, each in words or by its SHA-256.

    Returns:
        ``questions`` (ids, texts, answers and extra fields), ``retriever`` (its kind and options),
        ``index`` (the fingerprint of the corpus in it; "" if unknown), ``protocol``, ``template``
        (its text), ``limits``, ``reward``, and the version of ``research_env``. ``place:
        retriever`` is its URL without user and password: results do not depend on it. Where the
        fingerprint is not known, the URL stands for the corpus, and ``retriever`` is the URL.
    """
    limits = f"top_k {core.top_k}, max_searches {core.max_searches}, max_turns {core.max_turns}"
    if core.max_passage_chars != MAX_PASSAGE_CHARS:
        limits += f", max_passage_chars {core.max_passage_chars}"
    if core.metric_language:
        limits += f", metric_language {core.metric_language}"
    questions = [
        [q.id, q.question, q.answers, *([dict(q.extra)] if q.extra else [])] for q in core.questions
    ]
    retriever = core.settings.get("retriever") or "the corpus of the data set"
    place = redact_url(retriever) if isinstance(retriever, str) else repr(type(retriever))
    index = str(getattr(core.retriever, "fingerprint", None) or "")
    is_url = isinstance(retriever, str) and ":" in retriever
    template = json.dumps(core.protocol.messages(core.template, "{question}"))
    reward = str(getattr(core.reward, "__name__", type(core.reward).__name__))
    if core.turn_reward:
        reward += f", per turn {core.turn_reward.__name__}"
    return {
        "questions": f"{len(questions)}, sha256 {_sha256(json.dumps(questions, default=str))}",
        "retriever": _kind_and_options(place) if index and is_url else place,
        "place: retriever": place,
        "index": index,
        "protocol": core.protocol.name + _chosen_tools(core),
        "template": f"{core.template}, sha256 {_sha256(template)}",
        "limits": limits,
        "reward": reward,
        "research_env": version("research-env"),
    }


def _chosen_tools(core: EnvCore) -> str:
    """Text format and schemas of the tools; "" if they are the protocol's own."""
    if core.settings.get("tools") is None and core.settings.get("tool_format") is None:
        return ""
    assert core.protocol.tool_format is not None
    schemas = json.dumps([tool.schema for tool in core.protocol.tools])
    names = "+".join(tool.name for tool in core.protocol.tools)
    return f", {core.protocol.tool_format.name}, {names}, sha256 {_sha256(schemas)}"


def _kind_and_options(url: str) -> str:
    """The parts of a retriever's URL that change results: not the address, nor the deadline."""
    base, options = split_options(url)
    kept = [f"{key}={value}" for key, value in sorted(options.items()) if key not in WITHOUT_EFFECT]
    kind = base.partition(":")[0]
    return f"{kind}?{'&'.join(kept)}" if kept else kind


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
