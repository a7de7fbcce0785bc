"""Layers that several ranks compute together, in place of those of one rank in `tf_dist.models`."""
