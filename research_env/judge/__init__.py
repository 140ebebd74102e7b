"""A language model as judge of predictions, as the papers do: ``research-env judge``."""

from research_env.judge.predictions import JudgedEpisode, read_predictions
from research_env.judge.run import JudgeSettings, JudgeSummary, format_summary, judge_predictions
from research_env.judge.verdicts import JudgeError, Verdict, VerdictLog

__all__ = [
    "JudgeError",
    "JudgeSettings",
    "JudgeSummary",
    "JudgedEpisode",
    "Verdict",
    "VerdictLog",
    "format_summary",
    "judge_predictions",
    "read_predictions",
]
