from __future__ import annotations

from benchmarks.architectures import ARCHITECTURES, PAGE, Verdict, examine, table


def test_the_page_has_the_table_of_today() -> None:
    verdicts = [examine(name, *each) for name, each in ARCHITECTURES.items()]
    assert table(verdicts) in PAGE.read_text(encoding="utf-8")


def test_the_table_says_what_works() -> None:
    rows = table([
        Verdict("A", "", "", "", ""),
        Verdict("B", "", "", "its attention is odd", "cannot share a row"),
        Verdict("C", "no", "wrong", "", "no"),
    ]).splitlines()  # fmt: skip
    assert rows[2:] == [
        "| A | yes | yes | yes |",
        "| B | one at a time: its attention is odd | yes | off |",
        "| C | no: use vLLM | refused | off |",
    ]
