"""Benchmarks: each checks its results before it times them and stores a JSON under ``results/``."""
