"""Strategies, one file each: how gradients of all ranks become new weights. No TensorFlow.

`registry` has the list of names, `base` the common interface.
"""

from __future__ import annotations

from tf_dist.parallel.compress import BFloat16 as BFloat16
from tf_dist.parallel.compress import OneBit as OneBit
from tf_dist.parallel.compress import PowerSGD as PowerSGD
from tf_dist.parallel.compress import TopK as TopK
from tf_dist.strategies.allreduce import AllReduce as AllReduce
from tf_dist.strategies.base import StepRequest as StepRequest
from tf_dist.strategies.base import Strategy as Strategy
from tf_dist.strategies.base import Traits as Traits
from tf_dist.strategies.compressed import Compressed as Compressed
from tf_dist.strategies.diloco import DiLoCo as DiLoCo
from tf_dist.strategies.downpour import Downpour as Downpour
from tf_dist.strategies.easgd import EASGD as EASGD
from tf_dist.strategies.gossip import Gossip as Gossip
from tf_dist.strategies.local_sgd import LocalSGD as LocalSGD
from tf_dist.strategies.parameter_server import ParameterServer as ParameterServer
from tf_dist.strategies.registry import STRATEGIES as STRATEGIES
from tf_dist.strategies.zero import Zero as Zero
