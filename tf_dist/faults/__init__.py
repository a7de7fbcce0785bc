"""Faults on purpose, by the environment variable TF_DIST_FAULT: what ranks do where something breaks.

    export TF_DIST_FAULT="kill:rank=2,step=17,phase=allreduce;slow:rank=1,ms=200"
    mpirun -np 3 python scripts/train.py

`tf_dist.comm.launch` arms what is asked for, once. Where nothing is, a place where a rank may be hit costs a
call that finds None. ``docs/reliability.md`` lists kinds, phases and keys.
"""

from tf_dist.faults.injector import InjectedFault, arm, at, begin, said, spoil, writes_below
from tf_dist.faults.spec import VARIABLE

__all__ = ["VARIABLE", "InjectedFault", "arm", "at", "begin", "said", "spoil", "writes_below"]
