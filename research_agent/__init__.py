"""A trainer for language models in any Gymnasium environment that speaks text."""
