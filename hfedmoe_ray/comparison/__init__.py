"""Comparisons: strategies by settings by seeds, run, measured, tested and shown. What `hfedmoe compare` does."""
