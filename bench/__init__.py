"""Benchmarks: every case checks its results before it is timed; ``python -m bench`` runs them."""
