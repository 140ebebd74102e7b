"""Draw docs/pictures/NAME.svg from docs/pictures/NAME.jsonl: what training changes.

    python docs/pictures/curves.py demo                            # draw it
    python docs/pictures/curves.py demo runs/demo/metrics.jsonl    # take a run's numbers first
    python docs/pictures/curves.py real runs/real/grpo/metrics.jsonl

``demo`` shows the following run, which does as many steps as ``python -m benchmarks.demo``:

    research-agent train miniworld --steps 62 --eval-every 4 --eval-limit 200 --output runs/demo

Each quantity has a small panel in the style of the report's page: a line and its last value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Picture(NamedTuple):
    """The title and the panels of a picture."""

    title: str
    panels: dict[str, tuple[str, float]]  # metric -> title, highest value of the axis


PICTURES = {
    "demo": Picture(
        "The policy learns to search, then answers correctly",
        {
            "reward": ("Reward while training", 1.0),
            "eval/em": ("Exact match, held-out questions", 1.0),
            "eval/searches": ("Searches per question", 3.0),
        },
    ),
    "real": Picture(
        "SmolLM2-135M learns to find more of the gold passages",
        {
            "eval/searches": ("Searches, held-out questions", 3.0),
            "eval/support_recall": ("Recall of gold passages", 1.0),
            "eval/em": ("Exact match", 0.5),
        },
    ),
}
STYLE = """
  svg { --ink: #22262b; --quiet: #6b737d; --line: #e3e5e8; --card: #ffffff; --page: #fbfbfa;
        --accent: #2b62b8; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #dfe3e8; --quiet: #929ba6; --line: #30363d; --card: #1c2025; --page: #15181c;
          --accent: #84b0f3; }
  }
  .page { fill: var(--page); }
  .card { fill: var(--card); stroke: var(--line); }
  .grid { stroke: var(--line); }
  .curve { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
  circle { fill: var(--accent); }
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }
  .title { font-weight: 600; font-size: 15px; }
  .name { font-weight: 600; }
  .tick { fill: var(--quiet); font-size: 11.5px; }
  .last { fill: var(--accent); font-weight: 600; }
"""
WIDTH, HEIGHT = 860, 250
CARD, GAP, TOP = 262, 13, 48  # panel width, space between panels, upper edge
PLOT = (34, 52, 190, 92)  # plot inside its panel: left, top, width, height


def panel(x: int, title: str, top: float, points: list[tuple[int, float]], steps: int) -> list[str]:
    """Draw one quantity: its title, a few grid lines, the curve and its last value."""
    left, upper, width, height = x + PLOT[0], TOP + PLOT[1], PLOT[2], PLOT[3]

    def place(step: float, value: float) -> str:
        return f"{left + width * step / steps:.1f} {upper + height * (1 - value / top):.1f}"

    lines = [
        f'<rect class="card" x="{x}" y="{TOP}" width="{CARD}" height="186" rx="8"/>',
        f'<text class="name" x="{x + 14}" y="{TOP + 26}">{title}</text>',
    ]
    for value in (0.0, top / 2, top):
        y = upper + height * (1 - value / top)
        lines += [
            f'<path class="grid" d="M {left} {y:.1f} h {width}"/>',
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    curve = " L ".join(place(*point) for point in points)
    end_x, end_y = place(*points[-1]).split()
    digits = 2 if top > 1 else 3
    lines += [
        f'<path class="curve" d="M {curve}"/>',
        f'<circle cx="{end_x}" cy="{end_y}" r="2.6"/>',
        f'<text class="last" x="{float(end_x) - 2:.1f}" y="{float(end_y) + 20:.1f}" '
        f'text-anchor="end">{points[-1][1]:.{digits}f}</text>',
    ]
    for step, anchor in ((0, "start"), (steps, "end")):
        label = "step 0" if step == 0 else str(step)
        lines.append(
            f'<text class="tick" x="{left + width * step / steps:.1f}" '
            f'y="{upper + height + 20}" text-anchor="{anchor}">{label}</text>'
        )
    return lines


def draw(picture: Picture, records: list[dict[str, float]]) -> str:
    """The picture as SVG, from the lines of its JSON Lines file."""
    steps = int(records[-1]["step"])
    parts = [f'<text class="title" x="24" y="30">{picture.title}</text>']
    for number, (metric, (title, top)) in enumerate(picture.panels.items()):
        points = [(int(r["step"]), r[metric]) for r in records if metric in r]
        parts += panel(24 + number * (CARD + GAP), title, top, points, steps)
    body = "\n  ".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" \
aria-label="{picture.title}">
  <style>{STYLE}  </style>
  <rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="12"/>
  {body}
</svg>
"""


def main(name: str, metrics: str | None = None) -> None:
    """Take the numbers of a run, if its metrics are named, and draw."""
    data, picture = HERE / f"{name}.jsonl", PICTURES[name]
    if metrics:
        lines = map(json.loads, Path(metrics).read_text(encoding="utf-8").splitlines())
        kept = [{k: v for k, v in ln.items() if k in ("step", *picture.panels)} for ln in lines]
        data.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    (HERE / f"{name}.svg").write_text(draw(picture, records), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
