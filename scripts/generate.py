"""Generate text from a trained model: ``tf-dist generate``, from a checkout.

python scripts/generate.py --prompt 'def '       # the newest run
python scripts/generate.py --help                # the rest
"""

import sys

from tf_dist.cli.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
