"""The papers' experiments again: every architecture on Census-Income, AdaTT's studies, and MMoE's synthetic one.

``python -m bench.reproduce --data PATH`` trains what is not yet in the results file, a line a finished run, and writes
docs/reproduce.md and its pictures from the lines.
"""
