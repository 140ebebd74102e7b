"""Both packages redact secrets, in every form in which a server may repeat them."""

from __future__ import annotations

import json
from html import escape
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import research_agent.system.redaction
import research_env.system.redaction

PACKAGES = [research_agent.system.redaction, research_env.system.redaction]
SECRET = 'sk-"a/b&c\\d%41+0123456789'
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda each: each.__package__)
keys = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\%&"),
    min_size=8,
    max_size=60,
)


@each_package
def test_a_secret_behind_a_percent_sign_is_replaced(package: Any) -> None:
    assert package.redact("%0123456789", "sk-0123456789") == "%[redacted]"


@each_package
@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        json.dumps(SECRET)[1:-1],
        json.dumps(json.dumps(SECRET))[3:-3],
        "".join(f"\\u{ord(c):04X}" for c in SECRET),
        quote(SECRET, safe=""),
        quote(quote(SECRET, safe=""), safe=""),
        "".join(f"%{ord(c):02x}" for c in SECRET),
        escape(SECRET),
        "".join(f"&#{ord(c)};" for c in SECRET),
    ],
)
def test_a_secret_is_found_in_every_form(form: str, package: Any) -> None:
    assert package.redact(f"wrong key {form} of 3", SECRET) == "wrong key [redacted] of 3"


@each_package
def test_a_cut_secret_is_found_if_eight_characters_are_left(package: Any) -> None:
    assert package.redact("sk-01234...", "sk-0123456789") == "[redacted]..."
    assert package.redact("*3456789.", "sk-0123456789") == "*3456789."
    assert package.redact("*23456789.", "sk-0123456789") == "*[redacted]."


@each_package
def test_placeholders_and_other_text_stay(package: Any) -> None:
    assert package.redact("EMPTY is EMPTY", "EMPTY", "") == "EMPTY is EMPTY"
    assert package.redact("100% of \\n & &amp; %zz", SECRET) == "100% of \\n & &amp; %zz"


@given(st.sampled_from(PACKAGES), keys, st.text(max_size=20), st.text(max_size=20))
def test_no_secret_is_left(package: Any, secret: str, before: str, after: str) -> None:
    assume(secret not in "[redacted]")
    for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""), escape(secret)):
        assert form not in package.redact(f"{before} {form} {after}", secret)


def test_one_line_shows_no_control_characters() -> None:
    assert research_agent.system.redaction.one_line("a\x1b[31m\n b\u202e\x07c", 9) == "a?[31m b?"
