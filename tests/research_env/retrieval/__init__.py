"""Tests of research_env.retrieval."""
