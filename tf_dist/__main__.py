"""``python -m tf_dist`` is the console script ``tf-dist``, for a Python that is not on the path."""

from __future__ import annotations

import sys

from tf_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
