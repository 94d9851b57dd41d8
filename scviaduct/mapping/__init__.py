"""Preflight, gene alignment, encoding and labels."""
