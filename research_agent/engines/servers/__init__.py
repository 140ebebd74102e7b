"""Sampling on vLLM servers: the engine, the pool of servers, and the transfer of weights."""
