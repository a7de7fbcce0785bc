"""What a training run is: a frozen dataclass of options for each component, and `Config`, which has them all.

An option has one home, its field: default, help, choices, bounds, and what a resumed run may do with it.
The flags of ``tf-dist train``, the keys of a YAML file, ``--print-config`` and the defaults of a
`tf_dist.Trainer` come from there. Options of strategies, of compressors and of `tf_dist.connect` stay beside
these.
Nothing here imports TensorFlow or MPI: ``--help`` answers at once.
"""

from tf_dist.config.batch import default_micro_batch as default_micro_batch
from tf_dist.config.data import BPE_DEFAULT_VOCAB as BPE_DEFAULT_VOCAB
from tf_dist.config.run import FIELDS as FIELDS
from tf_dist.config.run import Config as Config
from tf_dist.config.run import on_resume as on_resume
