"""Checkpoints that a run can go on from: whole on disk, and of the same run.

A checkpoint of ours holds, beside what transformers writes, three files:

- `teacher_state.json`, `teacher.safetensors`: the teacher ([`~trl_crisp.teacher.Teacher.save`]);
- `crisp_run.json`: what the run is made of ([`describe_run`]), and where its logs stand;
- `checkpoint_files.json`: the name and size of each file, written when all of them are on disk. transformers writes
  `trainer_state.json` after it. A checkpoint where one of the two is missing, or a file differs, was torn.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp.config import CRISPConfig
from trl_crisp.json_files import write_json
from trl_crisp.revisions import cached_commit

FILES_FILE = "checkpoint_files.json"
RUN_FILE = "crisp_run.json"
STATE_FILE = "trainer_state.json"

# Ours: elements of each parameter that the fingerprint of a model looks at; any training moves some of them
_FINGERPRINT_ELEMENTS = 64
# What makes the teacher: another value trains toward something else. Learning rate, lengths and the like may change.
_COMPARED_FIELDS = (
    "instruction",
    "instruction_replaces",
    "instruction_role",
    "teacher_model_kind",
    "teacher_sync_steps",
    "teacher_update_rate",
)


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
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        name = Path(error.filename).name if isinstance(error, FileNotFoundError) else STATE_FILE
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


def last_whole(output_dir: str | Path) -> Path | None:
    """Return the latest checkpoint of a run that it can go on from."""
    return next((path for path in checkpoints_in(output_dir) if find_fault(path) is None), None)


def remove_torn(checkpoint: str | Path) -> None:
    """Remove what an earlier save to the same place left, if it was cut off."""
    if Path(checkpoint).is_dir() and find_fault(checkpoint) is not None:
        shutil.rmtree(checkpoint)


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """
    Return the checkpoint to go on from, or `None` to start afresh; say which, and what is skipped.

    Args:
        resume_from_checkpoint: A checkpoint's path; or true, also as a string, for the last whole one in `output_dir`.
        output_dir: The run's.

    Raises:
        FileNotFoundError: For a path where there is no checkpoint.
        ValueError: For a checkpoint that is not whole.
    """
    wanted = str(resume_from_checkpoint)
    if resume_from_checkpoint is None or wanted.lower() in ("false", "none", ""):
        return None
    say = PartialState().print
    if wanted.lower() == "true":
        for path in checkpoints_in(output_dir):
            if fault := find_fault(path):
                say(f"resume_from_checkpoint: {path} is skipped: {fault}.", flush=True)
            else:
                say(f"resume_from_checkpoint: going on from {path}.", flush=True)
                return str(path)
        say(
            f"resume_from_checkpoint: {output_dir} has no whole checkpoint yet, so training starts afresh.", flush=True
        )
        return None
    last = last_whole(output_dir)
    hint = f" The last whole one in output_dir is {last}." if last else ""
    if not Path(wanted).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={wanted!r}: there is no such directory.{hint} Use resume_from_checkpoint true "
            "for the last one in output_dir."
        )
    if fault := find_fault(wanted):
        raise ValueError(f"resume_from_checkpoint={wanted!r} cannot be resumed: {fault}.{hint}")
    return wanted


def fingerprint(model: nn.Module) -> str | None:
    """
    Return a hash of a model's weights, adapters aside, from elements of each parameter; `None` where they are sharded.

    It tells the model that a run began with from another, or from one that was trained on; it reads a few kilobytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or parameter.is_meta:
            return None
        if "lora_" in name:
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // _FINGERPRINT_ELEMENTS)][:_FINGERPRINT_ELEMENTS].cpu().contiguous()
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_run(model: nn.Module, args: CRISPConfig, instruction: str) -> dict[str, Any]:
    """
    Return what a run is made of: the teacher's context and schedule, the adapter, the model it began with.

    Args:
        model: The student at the start, before it is wrapped or trained.
        args: The run's config.
        instruction: The instruction's text.
    """
    config: Any = getattr(model, "config", None)
    run: dict[str, Any] = {name: getattr(args, name) for name in _COMPARED_FIELDS}
    run["instruction"] = instruction
    if is_peft_model(model):
        adapter: Any = model.peft_config[model.active_adapters[0]]  # type: ignore[index, union-attr]
        modules = adapter.target_modules
        run["lora"] = {
            "r": adapter.r,
            "lora_alpha": adapter.lora_alpha,
            "target_modules": modules if isinstance(modules, str | None) else sorted(modules),
        }
    name = getattr(config, "_name_or_path", None)
    init_kwargs: dict[str, Any] = args.model_init_kwargs or {}  # type: ignore[assignment]
    run["model"] = {
        "name": name,
        "revision": cached_commit(name, init_kwargs.get("revision")),
        "weights": fingerprint(model),
    }
    return run


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each thing that the run of a checkpoint was set to otherwise than this one is."""
    before, after = dict(saved), dict(now)
    models = [side.pop("model") for side in (before, after)]
    lines = [
        f"{name}: {before.get(name)!r} in the checkpoint, {after.get(name)!r} now"
        for name in (*_COMPARED_FIELDS, "lora")
        if before.get(name) != after.get(name)
    ]
    # The same weights may have moved to another directory; where they are sharded only the name and the commit are known
    keys = ("weights",) if all(model["weights"] for model in models) else ("name", "revision")
    if any(models[0][key] != models[1][key] for key in keys):
        names = [f"{model['name']!r} (revision {model['revision']}, weights {model['weights']})" for model in models]
        lines.append(f"model: {names[0]} in the checkpoint, {names[1]} now")
    return lines


def check_same_run(checkpoint: str | Path, now: dict[str, Any], allowed: bool) -> None:
    """
    Check that a checkpoint is of a run like this one.

    Args:
        checkpoint: The checkpoint to go on from.
        now: What [`describe_run`] says of this run.
        allowed: Differences are what the user wants: only say them.

    Raises:
        ValueError: Where something differs and that was not allowed.
    """
    lines = differences(json.loads((Path(checkpoint) / RUN_FILE).read_text(encoding="utf-8"))["run"], now)
    if not lines:
        return
    listed = "".join(f"\n  {line}" for line in lines)
    if not allowed:
        raise ValueError(
            f"{checkpoint} is of a run that differs from this one:{listed}\nSet them back to go on with that run; set "
            "allow_changed_resume=True to go on from its state with the new settings; or start a new run from its model "
            "with another output_dir."
        )
    PartialState().print(f"resume_from_checkpoint: going on with other settings than {checkpoint} had:{listed}")
