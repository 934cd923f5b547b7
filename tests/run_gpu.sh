#!/usr/bin/env bash
# Runs the tests marked `gpu`, in about ten minutes on one GPU. It installs nothing: PYTHON names an interpreter that has the package and
# pytest (`pip install -e ".[vllm,eval]" pytest`). Without vLLM its tests are skipped. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "tests/run_gpu.sh: $("$python" --version) at $(command -v "$python") sees no GPU. Set PYTHON to an interpreter whose torch does." >&2
  exit 1
}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1
exec "$python" -m pytest -m gpu --quiet --durations 10 "$@"
