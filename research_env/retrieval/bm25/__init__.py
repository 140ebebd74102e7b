"""The embedded BM25 engine, with Elasticsearch's scores."""
