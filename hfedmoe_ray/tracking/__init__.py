"""Telling people what happened: files that are the truth, W&B, the terminal, the report."""
