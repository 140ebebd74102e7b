"""The baselines of the papers' tables, each a file: what it asks of model and search engine."""
