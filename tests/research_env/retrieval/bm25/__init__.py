"""Tests of research_env.retrieval.bm25."""
