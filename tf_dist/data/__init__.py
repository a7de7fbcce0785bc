"""Data pipeline: text in, token batches out. No TensorFlow, no MPI; ranks are only numbers here.

In order: `resolve_sources` (names -> files), `prepare` (files -> documents -> tokens on disk, or an existing
prepared folder), `Prepared.train` (a memory-mapped token array), `Sequences` (rows of a batch),
`Sampler` (which rows are step s).
"""

from tf_dist.data.corpus import Corpus as Corpus
from tf_dist.data.prepare import prepare as prepare
from tf_dist.data.prepared_dataset import Prepared as Prepared
from tf_dist.data.prepared_dataset import open_prepared as open_prepared
from tf_dist.data.registry import fetch as fetch
from tf_dist.data.registry import resolve_sources as resolve_sources
from tf_dist.data.sampler import Sampler as Sampler
from tf_dist.data.sampler import share as share
from tf_dist.data.tokenizer import Tokenizer as Tokenizer
from tf_dist.data.tokenizer import load_tokenizer as load_tokenizer
from tf_dist.data.tokenizer import train_tokenizer as train_tokenizer
from tf_dist.data.tokens import Sequences as Sequences
