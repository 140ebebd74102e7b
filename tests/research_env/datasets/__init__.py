"""Tests of research_env.datasets."""
