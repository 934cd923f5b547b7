#!/usr/bin/env bash
# CRISP on a small real model, on a CPU, in minutes: four commands of the product, then what to look at.
#
#   bash examples/quickstart.sh              SmolLM2-135M-Instruct on questions about facts
#   bash examples/quickstart.sh --seed 4     another seed
#   bash examples/quickstart.sh --quick      one minute, too short for a verdict
#
# QUICKSTART_VENV names another environment than .venv, PYTHON another interpreter. A second call uses again what is there:
# the environment, the model, and the answers that were finished.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${QUICKSTART_VENV:-.venv}"
python="${PYTHON:-python3}"
seed=3 quick="" output_dir=""
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) seed="$2"; shift 2 ;;
    --output_dir) output_dir="$2"; shift 2 ;;
    --quick) quick=1; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "quickstart.sh: unknown argument $1. It takes --seed N, --output_dir DIR and --quick." >&2; exit 2 ;;
  esac
done
output_dir="${output_dir:-outputs/quickstart${quick:+-quick}-seed$seed}"

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
# The stamp holds the pyproject.toml that was installed, so that a second call skips pip
stamp="$venv/quickstart-installed.toml"
if ! cmp --silent pyproject.toml "$stamp"; then
  echo "Installing trl-crisp with torch, transformers and TRL (the longest part the first time) ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[quickstart]" || {
    echo "quickstart.sh: the installation failed; pip says why above. Check the network and the free disk space (torch" >&2
    echo "alone takes 1 GB, with CUDA several), then start again: what is there is kept." >&2
    exit 1
  }
  cp pyproject.toml "$stamp"
fi
PATH="$PWD/$venv/bin:$PATH"
case "$venv" in /*) PATH="$venv/bin:$PATH" ;; esac
# A thread that waits spins for some microseconds: longer takes the core that the working one needs on a shared machine
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
# glibc hands large tensors back to the kernel and takes them again at each step; keeping them is faster
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864 TOKENIZERS_PARALLELISM=false

say() { printf '\n== %s\n' "$1"; }
model=models/SmolLM2-135M-Instruct
told="$(sed -n 's/^instruction: //p' examples/configs/smollm2-cpu.yaml | sed 's/ *#.*//; s/^"\(.*\)"$/\1/')"
measure=(trl-crisp eval --benchmark examples/facts/test.jsonl --samples 1 --max_new_tokens 128 --batch_size 128 --seed "$seed")
train=(trl-crisp train --config examples/configs/smollm2-cpu.yaml)
if [ -n "$quick" ]; then
  measure+=(--limit 8 --max_new_tokens 48)
  train+=(--max_steps 2 --max_completion_length 32 --teacher_sync_steps 2)
fi

say "The model"
python examples/get_smollm2.py "$model"
say "1/4  Measure the base with the plain prompt"
"${measure[@]}" --model "$model" --output "$output_dir/base"
say "2/4  Measure the base, told to be concise: \"$told\""
"${measure[@]}" --model "$model" --instruction "$told" --output "$output_dir/concise"
say "3/4  Train: the teacher is the model itself, told to be concise"
"${train[@]}" --model_name_or_path "$model" --dataset_name examples/facts/train.jsonl --seed "$seed" --output_dir "$output_dir/model"
say "4/4  Measure what came out, with the plain prompt, against the base"
"${measure[@]}" --model "$output_dir/model" --baseline "$output_dir/base" --output "$output_dir/after"
say "What changed"
python examples/quickstart.py "$output_dir" --json "$output_dir/quickstart.json"
say "The page"
trl-crisp report "$output_dir/base" "$output_dir/concise" "$output_dir/after" --run "$output_dir/model" --output "$output_dir/report.html"
echo "Open $output_dir/report.html in a browser: the verdict, the figures, and the same questions before and after."
