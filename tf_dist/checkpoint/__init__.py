"""Checkpoints on disk: shards, manifests, checksums, asynchronous writes. Independent of the Trainer."""
