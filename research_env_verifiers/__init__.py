"""The environment's plug-in of verifiers, which names plug-ins by top-level modules.

See :mod:`research_env.adapters.verifiers`.
"""

from research_env.adapters.verifiers import ResearchEnv, ResearchHarness, ResearchTaskset

__all__ = ["ResearchEnv", "ResearchHarness", "ResearchTaskset"]
