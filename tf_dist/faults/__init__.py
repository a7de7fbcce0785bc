"""Fault injection, by the environment variable TF_DIST_FAULT.

    export TF_DIST_FAULT="kill:rank=2,step=17,phase=allreduce;slow:rank=1,ms=200"
    mpirun -np 3 python scripts/train.py

`tf_dist.comm.runtime.launch` arms the faults, once. Without faults, an injection point
costs a call that finds None. ``docs/reliability.md`` lists kinds, phases and keys.
"""

from tf_dist.faults.injector import InjectedFault, arm, at, begin, inject_nan, said, writes_below
from tf_dist.faults.spec import VARIABLE

__all__ = ["VARIABLE", "InjectedFault", "arm", "at", "begin", "inject_nan", "said", "writes_below"]
