"""The configuration of an experiment: what may be written, checked, and how it is read."""
