"""Metrics, a file for each kind: pure functions, and what registers them (see `registry`).

A new metric is a new file here; nothing else has to name it.
"""
