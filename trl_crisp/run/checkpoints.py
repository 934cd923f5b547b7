"""Checkpoints on disk: which are whole or torn, and which are kept.

In addition to transformers' files, a CRISP checkpoint contains these:

- `teacher_state.json`, `teacher.safetensors`: the teacher ([`~trl_crisp.teacher.Teacher.save`]);
- `crisp_run.json`: the id and the description of its run ([`~trl_crisp.run.identity`]), and what was not logged yet;
- `checkpoint_files.json`: the name and size of each file, written when all of them are on disk. transformers writes
  `trainer_state.json` after it. If one of these two files is missing, or another file differs, the checkpoint is torn.

With `save_only_model` a checkpoint has the model, `trainer_state.json` and, written last, `crisp_run.json` with the run's id alone. No run
can resume from it.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp.run.files import write_json

FILES_FILE = "checkpoint_files.json"
RUN_FILE = "crisp_run.json"
TRAINER_STATE_FILE = "trainer_state.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*", "adapter_model*", "global_step*")


def seal(checkpoint: str | Path) -> None:
    """Record the checkpoint's files, all of which are on disk now."""
    checkpoint = Path(checkpoint)
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != FILES_FILE
    }
    write_json(checkpoint / FILES_FILE, files)


def find_fault(checkpoint: str | Path) -> str | None:
    """Return why a run cannot resume from a checkpoint, or `None` if the checkpoint is whole."""
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


def has_weights(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has the student's weights, or an adapter's: whole, in parts, or as DeepSpeed and FSDP write them."""
    return any(next(Path(checkpoint).glob(pattern), None) is not None for pattern in _WEIGHTS)


def state_of(checkpoint: str | Path) -> TrainerState | None:
    """Return the trainer's state in a checkpoint, `None` if there is none that can be read."""
    try:
        return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
    except (OSError, ValueError, TypeError):
        return None


def is_model_alone(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint was saved with `save_only_model`, to its end."""
    # One that is torn while it is saved with its optimizer gets its list of files before the state
    return (Path(checkpoint) / TRAINER_STATE_FILE).is_file() and not (Path(checkpoint) / FILES_FILE).exists()


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a directory, whole or not, the latest step first."""
    steps = {
        path: int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()
    }
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def remove_torn(checkpoint: str | Path) -> None:
    """Remove a checkpoint if it is torn."""
    if Path(checkpoint).is_dir() and find_fault(checkpoint) is not None:
        shutil.rmtree(checkpoint)


def keep_at_most(checkpoints: Sequence[Path], limit: int | None, *kept: str | Path | None) -> None:
    """
    Remove the oldest checkpoints of a run, as transformers' `save_total_limit` does.

    Args:
        checkpoints: The run's own checkpoints, the latest first, without those of other runs in the same directory.
        limit: How many to keep; `None` or 0 keeps all. The latest is always kept.
        kept: Others that are always kept, such as the best, if they are known.
    """
    if not limit or limit < 0 or not checkpoints:
        return
    protected = {checkpoints[0], *(Path(path) for path in kept if path is not None)}
    removable = [path for path in checkpoints if path not in protected]
    left = max(limit - (len(checkpoints) - len(removable)), 0)
    for path in removable[left:]:
        shutil.rmtree(path, ignore_errors=True)
