"""`make install` is not silent while pip works, and says all that pip said where it fails."""

import subprocess
from pathlib import Path

import pytest

WITH_PROGRESS = Path(__file__).parents[1] / "scripts" / "with_progress.sh"


def run(command):
    words = ["bash", "-c", f"set -euo pipefail\n. '{WITH_PROGRESS}'\nwith_progress {command}\necho after"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_a_line_every_few_seconds():
    done = run('bash -c \'echo "Collecting numpy"; echo "  Downloading tensorflow (230 MB)"; sleep 7\'')
    assert done.returncode == 0, done.stderr
    said, after = done.stdout.splitlines()
    assert said.startswith("... ") and said.endswith("s: Downloading tensorflow (230 MB)")
    assert after == "after" and done.stderr == ""


@pytest.mark.parametrize("code", [1, 7])
def test_what_fails_is_said_in_full(code):
    done = run(f"bash -c 'echo \"Collecting numpy\"; echo ERROR: no such thing >&2; exit {code}'")
    assert done.returncode == code
    assert "Collecting numpy\nERROR: no such thing" in done.stderr and "after" not in done.stdout
