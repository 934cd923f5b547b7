#!/usr/bin/env bash
# Runs the tests on a fresh machine: makes a virtual environment, installs the package with what the tests need, and
# calls pytest. TRL_CRISP_VENV names another environment; arguments go to pytest, as in `bash tests/run.sh -k teacher`.
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

# One thread for each of two workers: the models are too small for more, and threads that share a core only wait
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# In the order of the files: by the number of tests, the few long ones would come last, to one worker
exec "$venv/bin/python" -m pytest --numprocesses "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
  --quiet --durations 10 "$@"
