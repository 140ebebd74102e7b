"""Tests of research_env.papers."""
