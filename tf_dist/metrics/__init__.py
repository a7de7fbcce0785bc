"""Metrics of tasks: functions of all predictions and references, in row order. No TensorFlow, no ranks.

A metric is computed once, after predictions were gathered, so its value does not depend on the number of
ranks. Means are sums by `math.fsum`, which are exact before one rounding, so the order of rows does not
matter either. `tf_dist.metrics.registry` has the names that tasks declare.
"""

from tf_dist.metrics.registry import METRICS as METRICS
from tf_dist.metrics.registry import Metric as Metric
from tf_dist.metrics.registry import compute as compute
from tf_dist.metrics.registry import named_metrics as named_metrics
