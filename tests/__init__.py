import os
from pathlib import Path

# Without a GPU Triton's interpreter runs our kernel. Triton reads this when it is imported, which TRL does
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
