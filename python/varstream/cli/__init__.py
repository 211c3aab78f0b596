"""Command line: ``varstream info`` and friends."""
