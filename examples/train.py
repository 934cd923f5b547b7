"""Train with CRISP: `accelerate launch examples/train.py --config examples/configs/qwen3-8b-v2.yaml`.

Without arguments it trains SmolLM2-135M on a CPU, with examples/configs/smollm2-cpu.yaml.
"""

import sys
from pathlib import Path

from trl_crisp.train import run

QUICKSTART = Path(__file__).parent / "configs" / "smollm2-cpu.yaml"

if __name__ == "__main__":
    run(sys.argv[1:] or ["--config", str(QUICKSTART)])
