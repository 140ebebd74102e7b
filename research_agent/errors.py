"""The errors of the trainer: each says what was wrong, with which value, and what to do."""

from __future__ import annotations


class ResearchAgentError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ResearchAgentError, ValueError):
    """A setting whose value cannot be used."""


class ModelError(ResearchAgentError, ValueError):
    """A model folder or tokenizer that cannot be used (no weights, no end token, ...)."""


class ContextError(ResearchAgentError, ValueError):
    """A prompt that does not fit the model's context."""


class OverlongPromptError(ContextError):
    """A prompt with more tokens than ``max_prompt`` or the model's context allows."""


class CheckpointError(ResearchAgentError):
    """A checkpoint that is missing, broken, or from another configuration."""


class RankError(ResearchAgentError, RuntimeError):
    """Another process of a run under torchrun stopped or hangs."""


class LogError(ResearchAgentError):
    """A run's log that is broken."""


class FolderInUseError(ResearchAgentError):
    """Another process writes to the same folder."""


class PredictionsError(ResearchAgentError):
    """A file of predictions that is missing, broken, or from another evaluation."""


class EnvironmentContractError(ResearchAgentError, TypeError):
    """An environment that does not speak text as the contract asks."""


class TooManyVoidError(ResearchAgentError, RuntimeError):
    """More episodes were void (failed infrastructure) than the run allows."""


class CollapseError(ResearchAgentError, RuntimeError):
    """A policy lost what it had learned."""


class NonFiniteError(ResearchAgentError, ArithmeticError):
    """A loss, gradient or log-probability that is not finite."""


class EngineError(ResearchAgentError, RuntimeError):
    """An engine that does not start, died, hangs, or cannot do its work."""


class StoppedError(ResearchAgentError, RuntimeError):
    """This rank stops because of an error that rank 0 raises and shows."""
