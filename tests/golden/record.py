"""Write `hashes.json` anew, with this checkout on this machine: ``python tests/golden/record.py``.

To be called where weights are meant to change, or on another machine; it prints which runs have changed.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "jobs"))

from conftest import launcher_here
from runs import HASHES, environment, hashes, recorded

# Four ranks with a dozen models, on cores that others use as well.
LONG_S = 1800


def main() -> None:
    launcher = launcher_here()
    before = recorded() if HASHES.exists() else {"environment": {}, "weights": {}}
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = hashes(
                lambda ranks, flags, cwd: launcher.several(ranks, "train.py", flags, cwd=cwd).wait(LONG_S),
                Path(folder),
            )
    finally:
        launcher.end_all()
    content = {"environment": environment(), "weights": dict(sorted(found.items()))}
    HASHES.write_text(json.dumps(content, indent=1) + "\n")
    changed = [key for key, sha in found.items() if before["weights"].get(key) != sha]
    print(f"{len(found)} runs, of which {len(changed)} are new or have changed:")
    print("\n".join(f"  {key}" for key in changed))


if __name__ == "__main__":
    main()
