"""Decoding: how rows of tokens are continued, from logits; greedy, by sampling, by beam search.

Pure NumPy: what computes the logits is a `tf_dist.decoding.forward.CachedForward`.
"""
