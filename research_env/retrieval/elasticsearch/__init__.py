"""Search and indexing in an Elasticsearch cluster."""
