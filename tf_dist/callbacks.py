"""Keras callbacks for training on many ranks: see ``docs/callbacks.md``. Imports Keras: `connect` first."""

from __future__ import annotations

from tf_dist.keras_callbacks.callbacks import AverageMetrics as AverageMetrics
from tf_dist.keras_callbacks.callbacks import BroadcastWeights as BroadcastWeights
from tf_dist.keras_callbacks.callbacks import LearningRateWarmup as LearningRateWarmup
from tf_dist.keras_callbacks.callbacks import SyncCheck as SyncCheck
from tf_dist.keras_callbacks.callbacks import Throughput as Throughput

__all__ = ["AverageMetrics", "BroadcastWeights", "LearningRateWarmup", "SyncCheck", "Throughput"]
