#!/usr/bin/env bash
# Runs the tests on a fresh machine: creates a virtual environment, installs the package and the tests' requirements, and calls
# pytest. TRL_CRISP_VENV sets another environment. Arguments are passed to pytest, as in `bash tests/run.sh -k teacher`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${TRL_CRISP_VENV:-.venv-test}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "tests/run.sh: trl-crisp needs Python 3.11 or newer; $("$python" --version) is $(command -v "$python"). Set PYTHON." >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable ".[test]"

# One thread per worker: the models are too small to use more, and threads that share a core slow each other down
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# Files are started in their own order: ordered by their number of tests, files with few but long tests would all come last
exec "$venv/bin/python" -m pytest --numprocesses "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
  --quiet --durations 10 "$@"
