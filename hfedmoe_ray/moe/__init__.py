"""The model side: one view of every Mixture-of-Experts family, and the part of such a model that one client holds.

Nothing is imported here: planning reads `moe.shape` without loading torch.
"""
