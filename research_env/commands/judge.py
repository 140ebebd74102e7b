"""The command ``research-env judge``."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from research_env.errors import ConfigurationError
from research_env.system.redaction import one_line
from research_env.system.terminal import show, show_json


@dataclass(frozen=True)
class Judge:
    """Have a language model judge predictions, as ReSearch and R1-Searcher do.

    PREDICTIONS is the predictions.jsonl of an evaluation, or its folder. The judge is any model at
    an OpenAI-compatible endpoint, for example vLLM's; the key comes from OPENAI_API_KEY. The
    results are judged.jsonl (a line per verdict, with the judge's answer) and judge.json (the
    summary), beside the predictions. Needs pip install 'research-env[openai]'.

    Every episode counts, except void ones. One without a prediction is incorrect without asking the
    judge. Missing verdicts are reported, and the score is then a range: from all of them incorrect
    to all of them correct. After an interruption the same command continues; a prompt that has a
    verdict is not sent again (judge-cache.sqlite, by model and prompt).

    Exits with 1 if verdicts are missing.

    For example:
      VLLM_NO_USAGE_STATS=1 vllm serve Qwen/Qwen2.5-7B-Instruct --host 127.0.0.1
      research-env judge runs/eval/predictions.jsonl --endpoint http://localhost:8000/v1
        --model Qwen/Qwen2.5-7B-Instruct
      research-env judge predictions.jsonl --endpoint https://api.openai.com/v1
        --model gpt-4o-mini --prompt r1-searcher --rate 5
    """

    predictions: Positional[Annotated[Path, arg(metavar="PREDICTIONS")]]
    """The file to judge, or its folder."""
    endpoint: Annotated[str, arg(metavar="URL")]
    """Address of the server, with its /v1."""
    model: Annotated[str, arg(metavar="NAME")]
    """The name that the server has for the judge."""
    prompt: Literal["research", "r1-searcher"] = "research"
    """Which paper's prompt, word for word."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of judged.jsonl and judge.json. Default: the folder of the predictions."""
    concurrency: int = 8
    """Questions that are asked at the same time."""
    rate: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Requests per second, retries not counted. Default: as fast as answers come."""
    deadline: float = 120.0
    """Seconds per request with all its retries; one attempt may take half of them."""
    price_in: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price per million tokens in. Without prices only tokens are counted."""
    price_out: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price per million tokens out."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> None:
        """Carry the command out."""
        from research_env import judge  # noqa: PLC0415
        from research_env.retrieval.url import secret_of  # noqa: PLC0415

        if (self.price_in is None) != (self.price_out is None):
            raise ConfigurationError("give both --price-in and --price-out, or neither")
        settings = judge.JudgeSettings(
            self.endpoint,
            self.model,
            self.prompt,
            secret_of("OPENAI_API_KEY"),
            self.concurrency,
            self.rate,
            self.deadline,
            None if self.price_in is None else (self.price_in, self.price_out or 0.0),
        )
        try:
            summary = judge.judge_predictions(self.predictions, settings, self.output)
        except (judge.JudgeError, KeyboardInterrupt):
            show("what was judged is kept, and the same command continues", file=sys.stderr)
            raise
        for warning in summary.warnings:
            show(f"research-env: warning: {one_line(warning, 1_000)}", file=sys.stderr)
        if self.json:
            show_json(asdict(summary))
        else:
            show(judge.format_summary(summary))
        if summary.missing:
            sys.exit(1)
