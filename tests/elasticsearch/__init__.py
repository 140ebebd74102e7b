"""A real Elasticsearch server for the tests, and a proxy that causes faults on the way to it."""
