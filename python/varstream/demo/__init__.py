"""The demo: train a small model on real documents, then compare four ways to run its backward.

``varstream demo`` on the command line; :func:`varstream.demo.run.run` from Python.
"""
