"""Checkpoints on disk: whole or torn, and which of them are kept.

A checkpoint of ours holds, beside what transformers writes, these files:

- `teacher_state.json`, `teacher.safetensors`: the teacher ([`~trl_crisp.teacher.Teacher.save`]);
- `crisp_run.json`: which run it is of, what that run is made of ([`~trl_crisp.run.identity`]), and where its logs stand;
- `checkpoint_files.json`: the name and size of each file, written when all of them are on disk. transformers writes
  `trainer_state.json` after it. If one of the two is missing, or a file differs, the checkpoint is torn.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp.run.files import write_json

FILES_FILE = "checkpoint_files.json"
RUN_FILE = "crisp_run.json"
TRAINER_STATE_FILE = "trainer_state.json"


def seal(checkpoint: str | Path) -> None:
    """Write down which files the checkpoint has, all of which are on disk now."""
    checkpoint = Path(checkpoint)
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != FILES_FILE
    }
    write_json(checkpoint / FILES_FILE, files)


def find_fault(checkpoint: str | Path) -> str | None:
    """Return why a run cannot go on from a checkpoint, or `None` where it is whole."""
    checkpoint = Path(checkpoint)
    try:
        files = json.loads((checkpoint / FILES_FILE).read_text(encoding="utf-8"))
        json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        name = Path(error.filename).name if isinstance(error, FileNotFoundError) else TRAINER_STATE_FILE
        return f"its {name} is missing or torn (saving was cut off, or it was saved with save_only_model, or not by CRISP)"
    for name, size_bytes in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size_bytes:
            return f"its {name} has {path.stat().st_size} bytes instead of {size_bytes}"
    return None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, the latest step first."""
    steps = {
        path: int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()
    }
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def remove_torn(checkpoint: str | Path) -> None:
    """Remove what an earlier save to the same place left, if it was cut off."""
    if Path(checkpoint).is_dir() and find_fault(checkpoint) is not None:
        shutil.rmtree(checkpoint)


def keep_at_most(checkpoints: Sequence[Path], limit: int | None, best: str | Path | None) -> None:
    """
    Remove the oldest checkpoints of a run, as transformers' `save_total_limit` does.

    Args:
        checkpoints: The run's own, the latest first. Those of other runs in the same directory are not counted.
        limit: How many to keep; `None` or 0 keeps all. The latest and the best are always kept.
        best: The best checkpoint, if one is known.
    """
    if not limit or limit < 0 or not checkpoints:
        return
    protected = {checkpoints[0]} | ({Path(best)} if best is not None else set())
    removable = [path for path in checkpoints if path not in protected]
    kept = max(limit - (len(checkpoints) - len(removable)), 0)
    for path in removable[kept:]:
        shutil.rmtree(path, ignore_errors=True)
