"""Triton kernels of additive attention."""
