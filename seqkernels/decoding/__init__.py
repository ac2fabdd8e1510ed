"""Greedy search, beam search and sampling for any step function, in batches and without waiting for the device.

A step function `step(tokens, state) -> (logits, state)`, or `(logits, state, attention)`, computes the next step of N
hypotheses:

    tokens: [N] int64, the last token of each hypothesis. N = B in greedy_search, B * beam_size in beam_search and
        B * num_samples in sample; the hypotheses of sentence b are the rows b * (N / B), ..., (b + 1) * (N / B) - 1.
    state: any nest of tensors; `state_dims` gives the dimension of the hypotheses in each.
    logits: [N, V], of any floating dtype. V must be the same in all steps.
    attention: [N, S] weights of the step over the S positions of a source.

Dimensions: B sentences, N hypotheses, V tokens of the vocabulary, T = max_length steps, S positions of the source.
"""

from ._loop import Decoded
from ._state import PerSentence
from .beam import beam_search
from .single import greedy_search, sample

__all__ = ["Decoded", "PerSentence", "beam_search", "greedy_search", "sample"]
