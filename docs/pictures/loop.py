"""Draw docs/pictures/loop.svg, one episode of the loop between policy and environment.

    python docs/pictures/loop.py

The colors are CSS variables with a second set for dark mode, so the picture follows the reader's
setting. Text is text: it can be read aloud, selected and searched.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
  svg { --ink: #22262b; --quiet: #6b737d; --line: #c9ced4; --card: #ffffff; --page: #fbfbfa;
        --agent: #2b62b8; --world: #1d7a46; --reward: #8a6410; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #dfe3e8; --quiet: #929ba6; --line: #454d57; --card: #1c2025; --page: #15181c;
          --agent: #84b0f3; --world: #6bcb92; --reward: #e3bd62; }
  }
  .page { fill: var(--page); }
  .card { fill: var(--card); stroke: var(--line); }
  .arrow { fill: none; stroke-width: 1.6; marker-end: url(#head); }
  .agent { stroke: var(--agent); } .world { stroke: var(--world); }
  .reward { stroke: var(--reward); }
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }
  .title { font-weight: 600; font-size: 15px; }
  .note { fill: var(--quiet); font-size: 12.5px; }
  .code { font: 12.5px ui-monospace, Menlo, Consolas, monospace; }
  .code.agent { fill: var(--agent); stroke: none; }
  .code.world { fill: var(--world); stroke: none; }
  .code.reward { fill: var(--reward); stroke: none; }
  #head path { fill: context-stroke; }
"""
WIDTH, HEIGHT = 860, 336
LEFT, RIGHT, CARD = 24, 566, 270  # left edges of the two cards, and their width


def text(x: int, y: int, words: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def arrow(path: str, kind: str) -> str:
    """A line with an arrowhead at its end."""
    return f'<path class="arrow {kind}" d="{path}"/>'


def card(x: int, y: int, height: int, title: str, notes: list[str]) -> list[str]:
    """A box with a title and lines of notes."""
    box = f'<rect class="card" x="{x}" y="{y}" width="{CARD}" height="{height}" rx="10"/>'
    lines = [text(x + 18, y + 52 + 19 * i, note, "note") for i, note in enumerate(notes)]
    return [box, text(x + 18, y + 28, title, "title"), *lines]


def exchange(y: int, words: str, kind: str, note: str, *, back: bool = False) -> list[str]:
    """An arrow between the cards, with what is passed above it and a note below."""
    start, end = LEFT + CARD + 8, RIGHT - 8
    start, end = (end, start) if back else (start, end)
    middle = (start + end) // 2
    return [
        text(middle, y - 8, words, f"code {kind}", "middle"),
        arrow(f"M {start} {y} H {end}", kind),
        text(middle, y + 17, note, "note", "middle"),
    ]


def draw() -> str:
    """The picture as SVG."""
    policy = [
        "samples tokens up to </search>",
        "or to the end of its answer",
        "",
        "GRPO compares the episodes of one",
        "question and updates the weights.",
        "Only sampled tokens are learned from:",
        "retrieved text has no gradient.",
    ]
    world = [
        "parses the action, asks the engine:",
        "BM25, Elasticsearch, a server, the web",
        "",
        "At the end: F1, exact match, format.",
        "The reward reads what the policy",
        "wrote, never what was retrieved.",
    ]
    parts = [
        *card(LEFT, 52, 190, "Policy: research_agent", policy),
        *card(RIGHT, 52, 190, "Environment: research_env", world),
        *exchange(84, "<search>…</search>", "agent", "action: the tokens it sampled"),
        *exchange(146, "<result>…</result>", "world", "observation: passages", back=True),
        *exchange(208, "<answer>…</answer>", "agent", "and so on, until it answers"),
        arrow(f"M {RIGHT + CARD // 2} 246 V 286 H {LEFT + CARD // 2} V 250", "reward"),
        text(WIDTH // 2, 278, "reward + metrics", "code reward", "middle"),
        text(WIDTH // 2, 306, "once per episode, several episodes per question", "note", "middle"),
        text(LEFT, 32, "One episode: a policy learns when to search", "title"),
    ]
    body = "\n  ".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" \
aria-label="One episode: the policy searches, reads and answers; the reward updates it">
  <style>{STYLE}  </style>
  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" \
orient="auto-start-reverse"><path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>
  <rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="12"/>
  {body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
