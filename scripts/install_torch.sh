#!/usr/bin/env bash
# Builds .venv-torch with PyTorch, a peer that benchmarks compare with, and `transformers`, the other side of
# model folders and of lm_eval (tests/jobs). Called by `make torch`; nothing else needs it. It has an
# environment of its own: PyTorch and TensorFlow want different versions of shared packages.
#
# PyPI's wheel of torch for Linux on x86-64 brings some gigabytes of CUDA packages, and cannot be imported
# without them, not even on a machine without a GPU. The leanest torch is a wheel that is built for CPUs, whose
# version ends in `+cpu`: where the configured index, or a `find-links` folder, offers one, it is taken.
# TORCH='torch==2.9.1' chooses for yourself.
set -euo pipefail
PYTHON="${PYTHON:-python3}"
VENV="${VENV_TORCH:-.venv-torch}"

fail() { printf 'error: %s\n' "$1" >&2; exit 69; }

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || fail "python3 -m venv failed: apt-get install python3-venv"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
. "$(dirname "$0")/with_progress.sh"

if [ -z "${TORCH:-}" ]; then
    version="$(pip index versions torch 2>/dev/null | tr -d ' ' | sed -n 's/^Availableversions://p' |
        tr ',' '\n' | grep '+cpu$' | head -1 || true)"
    TORCH="torch${version:+==$version}"
    [ -n "$version" ] || echo "note: no wheel for CPUs is offered; on Linux x86-64 PyPI's takes some gigabytes of disk"
fi
echo "installing $TORCH into $VENV ..."
with_progress pip install "$TORCH" numpy wrapt transformers safetensors "lm_eval[hf]" || fail "pip could not install $TORCH. TORCH=... chooses another version, PIP_INDEX_URL another index"
"$VENV/bin/python" -c '
import torch, torch.distributed
assert torch.distributed.is_gloo_available(), "this torch has no gloo"
print("torch", torch.__version__, "with gloo")'
