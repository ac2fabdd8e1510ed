"""Operators as functions."""

from seqkernels.functional.recurrent import lstm

__all__ = ["lstm"]
