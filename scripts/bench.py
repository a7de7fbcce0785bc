"""Benchmarks: ``tf-dist bench``, from a checkout.

python scripts/bench.py step gpt-0.81M           # one of them, of one model
python scripts/bench.py --help                   # what there is
"""

import sys

from tf_dist.cli.bench import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
