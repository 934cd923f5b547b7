#!/usr/bin/env bash
# Installs Debian's Chromium, creates a virtual environment with Playwright, and runs the tests marked `browser` in it.
# TRL_CRISP_BROWSER_VENV sets another path; CHROMIUM names a Chromium that is there already. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${TRL_CRISP_BROWSER_VENV:-.venv-browser}"
if [ -z "${CHROMIUM:-}" ] && ! CHROMIUM="$(command -v chromium || command -v google-chrome)"; then
  apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends chromium || {
    echo "tests/run_browser.sh: Chromium could not be installed. Install one and set CHROMIUM to its path." >&2
    exit 1
  }
  CHROMIUM="$(command -v chromium)"
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable ".[eval,report]" "pytest>=8.4" "playwright>=1.64"
export CHROMIUM HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
exec "$venv/bin/python" -m pytest -m browser --quiet "$@"
