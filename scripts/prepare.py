"""Tokenize text on disk: ``tf-dist prepare``, from a checkout.

python scripts/prepare.py tinyshakespeare --tokenizer char
python scripts/prepare.py --help                 # the rest
"""

import sys

from tf_dist.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
