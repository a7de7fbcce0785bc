"""Train a Keras language model on every MPI rank: ``tf-dist train``, from a checkout.

python scripts/train.py                    # one process, built-in corpus
mpirun -np 2 python scripts/train.py       # two ranks: same result, faster
python scripts/train.py --help             # the rest, and the exit codes
"""

import sys

from tf_dist.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
