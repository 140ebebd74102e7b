"""A trainer for language models in any Gymnasium environment that speaks text.

What ``research-agent`` does to train, evaluate, compare and report is a function or a class of this
package. A name is imported from its module at first use, so ``import research_agent`` loads neither
torch nor transformers.

Example:
    >>> from dataclasses import replace
    >>> from research_agent import PRESETS, train
    >>> preset = PRESETS["miniworld"]
    >>> summary = train(replace(preset, run=replace(preset.run, steps=2)))  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from research_agent.algorithms import make_algorithm as make_algorithm
    from research_agent.algorithms.arpo import ARPO as ARPO
    from research_agent.algorithms.base import Algorithm as Algorithm
    from research_agent.algorithms.base import Tokens as Tokens
    from research_agent.algorithms.cispo import CISPO as CISPO
    from research_agent.algorithms.dapo import DAPO as DAPO
    from research_agent.algorithms.dr_grpo import DrGRPO as DrGRPO
    from research_agent.algorithms.gigpo import GiGPO as GiGPO
    from research_agent.algorithms.grpo import GRPO as GRPO
    from research_agent.algorithms.gspo import GSPO as GSPO
    from research_agent.algorithms.mt_grpo import MTGRPO as MTGRPO
    from research_agent.algorithms.mt_ppo import MTPPO as MTPPO
    from research_agent.algorithms.ppo import PPO as PPO
    from research_agent.algorithms.reinforce_pp import ReinforcePP as ReinforcePP
    from research_agent.algorithms.rloo import RLOO as RLOO
    from research_agent.algorithms.tree_grpo import TreeGRPO as TreeGRPO
    from research_agent.batch import Batch as Batch
    from research_agent.batch import make_batch as make_batch
    from research_agent.config import AlgorithmConfig as AlgorithmConfig
    from research_agent.config import CompareConfig as CompareConfig
    from research_agent.config import EnvironmentConfig as EnvironmentConfig
    from research_agent.config import EvalConfig as EvalConfig
    from research_agent.config import LearnerConfig as LearnerConfig
    from research_agent.config import PolicyConfig as PolicyConfig
    from research_agent.config import ReportConfig as ReportConfig
    from research_agent.config import RolloutConfig as RolloutConfig
    from research_agent.config import RunConfig as RunConfig
    from research_agent.config import SamplingConfig as SamplingConfig
    from research_agent.config import TrainConfig as TrainConfig
    from research_agent.engines import make_engine as make_engine
    from research_agent.engines.base import Engine as Engine
    from research_agent.engines.openai import OpenAIEngine as OpenAIEngine
    from research_agent.engines.scripted import ScriptedEngine as ScriptedEngine
    from research_agent.engines.servers.engine import ServerEngine as ServerEngine
    from research_agent.engines.servers.engine import connect_servers as connect_servers
    from research_agent.engines.transformers import TransformersEngine as TransformersEngine
    from research_agent.engines.vllm import VllmEngine as VllmEngine
    from research_agent.environments import Environments as Environments
    from research_agent.environments import make_environments as make_environments
    from research_agent.errors import ConfigError as ConfigError
    from research_agent.errors import ResearchAgentError as ResearchAgentError
    from research_agent.evaluation.compare import Comparison as Comparison
    from research_agent.evaluation.compare import compare as compare
    from research_agent.evaluation.evaluate import evaluate as evaluate
    from research_agent.evaluation.evaluate_model import evaluate_model as evaluate_model
    from research_agent.evaluation.summary import Summary as Summary
    from research_agent.learner import Learner as Learner
    from research_agent.models.policy import load_model as load_model
    from research_agent.presets import PRESETS as PRESETS
    from research_agent.renderer import Renderer as Renderer
    from research_agent.renderer import load_renderer as load_renderer
    from research_agent.report import make_report as make_report
    from research_agent.rollout import collect as collect
    from research_agent.run_folder import TrainSummary as TrainSummary
    from research_agent.sft import SFTConfig as SFTConfig
    from research_agent.trainer import Trainer as Trainer
    from research_agent.trainer import train as train
    from research_agent.trajectory import Group as Group
    from research_agent.trajectory import Segment as Segment
    from research_agent.trajectory import Trajectory as Trajectory

_NAMES_OF_MODULES = {
    "algorithms": ("make_algorithm",),
    "algorithms.base": ("Algorithm", "Tokens"),
    "algorithms.cispo": ("CISPO",),
    "algorithms.dapo": ("DAPO",),
    "algorithms.dr_grpo": ("DrGRPO",),
    "algorithms.grpo": ("GRPO",),
    "algorithms.gspo": ("GSPO",),
    "algorithms.ppo": ("PPO",),
    "algorithms.reinforce_pp": ("ReinforcePP",),
    "algorithms.rloo": ("RLOO",),
    "algorithms.mt_grpo": ("MTGRPO",),
    "algorithms.mt_ppo": ("MTPPO",),
    "algorithms.gigpo": ("GiGPO",),
    "algorithms.tree_grpo": ("TreeGRPO",),
    "algorithms.arpo": ("ARPO",),
    "batch": ("Batch", "make_batch"),
    "config": (
        "AlgorithmConfig",
        "CompareConfig",
        "EnvironmentConfig",
        "EvalConfig",
        "LearnerConfig",
        "PolicyConfig",
        "ReportConfig",
        "RunConfig",
        "RolloutConfig",
        "SamplingConfig",
        "TrainConfig",
    ),
    "engines": ("make_engine",),
    "engines.base": ("Engine",),
    "engines.openai": ("OpenAIEngine",),
    "engines.scripted": ("ScriptedEngine",),
    "engines.servers.engine": ("ServerEngine", "connect_servers"),
    "engines.transformers": ("TransformersEngine",),
    "engines.vllm": ("VllmEngine",),
    "environments": ("Environments", "make_environments"),
    "errors": ("ConfigError", "ResearchAgentError"),
    "evaluation.compare": ("Comparison", "compare"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.evaluate_model": ("evaluate_model",),
    "evaluation.summary": ("Summary",),
    "learner": ("Learner",),
    "models.policy": ("load_model",),
    "presets": ("PRESETS",),
    "renderer": ("Renderer", "load_renderer"),
    "report": ("make_report",),
    "rollout": ("collect",),
    "run_folder": ("TrainSummary",),
    "sft": ("SFTConfig",),
    "trainer": ("Trainer", "train"),
    "trajectory": ("Group", "Segment", "Trajectory"),
}
_MODULES = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names}

__all__ = sorted(_MODULES)  # noqa: PLE0605  (computed)


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
