"""A language model as judge of predictions, as the papers do: ``research-env judge``."""

from research_env.judge.predictions import JudgedEpisode, read_predictions
from research_env.judge.prompts import JUDGE_PROMPTS, JudgePrompt
from research_env.judge.run import (
    JudgeSettings,
    JudgeSummary,
    format_summary,
    judge_predictions,
    read_key,
)
from research_env.judge.verdicts import JudgeError, JudgeReply, Verdict, VerdictLog

__all__ = [
    "JUDGE_PROMPTS",
    "JudgeError",
    "JudgePrompt",
    "JudgeReply",
    "JudgeSettings",
    "JudgeSummary",
    "JudgedEpisode",
    "Verdict",
    "VerdictLog",
    "format_summary",
    "judge_predictions",
    "read_key",
    "read_predictions",
]
