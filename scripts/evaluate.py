"""Measure a trained model on held-out text: ``tf-dist evaluate``, from a checkout.

mpirun -np 2 python scripts/evaluate.py          # the newest run, its held-out text
python scripts/evaluate.py --help                # the rest
"""

import sys

from tf_dist.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
