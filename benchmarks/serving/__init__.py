"""Serving: time to the first token, between tokens and tokens per second of a server process, by load and adapters."""
