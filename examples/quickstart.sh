#!/usr/bin/env bash
# Makes a virtual environment, installs the package in it and runs examples/quickstart.py: a small real model learns to
# answer in fewer tokens, on a CPU. Arguments go to quickstart.py: bash examples/quickstart.sh --seed 1
#
# QUICKSTART_VENV names another environment than .venv, PYTHON another interpreter. A second run reuses environment,
# model and measurements of the untrained model.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
venv="${QUICKSTART_VENV:-$root/.venv}"
python="${PYTHON:-python3}"

if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "quickstart.sh: trl-crisp needs Python 3.11 or newer; $("$python" --version) is $(command -v "$python"). Set PYTHON." >&2
    exit 1
  }
  echo "Making the environment $venv"
  "$python" -m venv "$venv" || {
    echo "quickstart.sh: no environment could be made in $venv. Where Python's venv module is a package of its own" >&2
    echo "(python3-venv on Debian), install it, remove $venv and start again." >&2
    exit 1
  }
fi

# The stamp holds the pyproject.toml that was installed, so that a re-run skips pip
stamp="$venv/quickstart-installed.toml"
if ! cmp --silent "$root/pyproject.toml" "$stamp"; then
  echo "Installing trl-crisp with torch, transformers and TRL (the longest part the first time) ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[quickstart]" || {
    echo "quickstart.sh: the installation failed; pip says why above. Check the network and the free disk space (torch" >&2
    echo "alone takes 1 GB, with CUDA several), then start again: what is there is kept." >&2
    exit 1
  }
  cp "$root/pyproject.toml" "$stamp"
fi

# A waiting thread spins for some microseconds only: longer takes the core that the working one needs on a shared machine,
# and not at all makes every small step wait for a wake-up
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
# glibc hands large tensors back to the kernel and takes them again at each step; keeping them is faster
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864
exec "$venv/bin/python" "$root/examples/quickstart.py" "$@"
