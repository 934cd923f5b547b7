"""Which run a checkpoint belongs to, the settings of that run, and which checkpoint a run resumes from."""

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from torch import nn
from transformers import TrainingArguments

from trl_crisp.run.checkpoints import RUN_FILE, checkpoints_in, find_fault, is_model_alone
from trl_crisp.run.files import write_json

# Holds the id of the run that output_dir belongs to. Uploads to the Hub skip names that begin with an underscore.
OUTPUT_RUN_FILE = "_crisp_run.json"

# Elements of each parameter that the fingerprint of a model reads. Our choice: few to read, and any training changes some
_FINGERPRINT_ELEMENTS = 64
# These fields define the teacher: with another value, training aims at another target. The learning rate, lengths and other
# fields may change when a run resumes.
_COMPARED_FIELDS = (
    "instruction",
    "instruction_replaces",
    "instruction_role",
    "teacher_model_kind",
    "teacher_sync_steps",
    "teacher_update_rate",
    "teacher_refresh_gate",
)
# With other values, the numbers of a run before and after its interruption could not be compared
_MONITOR_FIELDS = (
    *("monitor_prompts", "monitor_samples", "monitor_base_samples", "monitor_max_new_tokens", "monitor_steps"),
    *("monitor_grader", "monitor_margin"),
    # How the answers are asked for and sampled
    *("temperature", "top_p", "top_k", "chat_template_kwargs", "use_vllm", "seed"),
)


def start_run(output_dir: str | Path, run_id: str | None = None) -> str:
    """
    Record that `output_dir` belongs to a run from now on, and return the run's id. The main process calls it.

    A fresh run prints a message if `output_dir` has checkpoints of other runs.

    Args:
        output_dir: The run's output directory.
        run_id: The id of a run that resumes, `None` for a fresh run.
    """
    output_dir = Path(output_dir)
    if run_id is None:
        run_id = uuid.uuid4().hex
        if others := [path.name for path in checkpoints_in(output_dir)]:
            print(
                f"{output_dir} has checkpoints of another run ({_listed(others)}). This run starts afresh. It never resumes from "
                "them and never removes them, but its own checkpoint of the same step replaces one. Use another output_dir to "
                "keep them, or resume_from_checkpoint to resume from one.",
                flush=True,
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / OUTPUT_RUN_FILE, {"run_id": run_id})
    return run_id


def run_id_of(path: str | Path) -> str | None:
    """Return the id of the run that a checkpoint or an `output_dir` belongs to, or `None` if no id is recorded."""
    for name in (RUN_FILE, OUTPUT_RUN_FILE):
        try:
            return json.loads((Path(path) / name).read_text(encoding="utf-8")).get("run_id")
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            continue
    return None


def own_checkpoints(output_dir: str | Path) -> list[Path]:
    """
    Return the whole checkpoints in `output_dir` that belong to its run, the one that was saved last first.

    Usually that is the order of the steps. A run that went back to an earlier checkpoint leaves later steps behind, which it has given up.

    Raises:
        ValueError: If `output_dir` does not say which run it belongs to, and has checkpoints of several runs.
    """
    whole = [path for path in checkpoints_in(output_dir) if find_fault(path) is None]
    last_saved_first = sorted(whole, key=_saved_at, reverse=True)
    own = run_id_of(output_dir)
    if own is not None:
        return [path for path in last_saved_first if run_id_of(path) == own]
    first_of_each = {run_id_of(path): path for path in reversed(whole)}
    if len(first_of_each) > 1:
        raise ValueError(
            f"{output_dir} has checkpoints of {len(first_of_each)} runs and does not say which one it belongs to: "
            f"{' and '.join(f'{path.name} is of run {run_id}' for run_id, path in first_of_each.items())}. Name the checkpoint "
            "to resume from: resume_from_checkpoint=PATH."
        )
    return last_saved_first


def saved_checkpoints(output_dir: str | Path, run_id: str | None) -> list[Path]:
    """Return a run's checkpoints in `output_dir`, those saved with `save_only_model` too, the one that was saved last first."""
    saved = [
        path
        for path in checkpoints_in(output_dir)
        if run_id_of(path) == run_id and (is_model_alone(path) or find_fault(path) is None)
    ]
    return sorted(saved, key=_saved_at, reverse=True)


def _saved_at(checkpoint: Path) -> float:
    # The sort keeps the order of the steps if there is no time
    try:
        return json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8")).get("saved_at", 0.0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0.0


def last_own_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the checkpoint in `output_dir` that its run saved last and can resume from."""
    return next(iter(own_checkpoints(output_dir)), None)


def resolve_checkpoint(
    resume_from_checkpoint: str | bool | None, output_dir: str | Path, allowed: bool = False
) -> str | None:
    """
    Return the checkpoint to resume from, or `None` to start afresh. Print the choice and the skipped checkpoints.

    Args:
        resume_from_checkpoint: A checkpoint's path; or true, also as a string, for the run's last whole checkpoint in `output_dir`.
        output_dir: The run's output directory.
        allowed: Whether `resume_from_checkpoint` may be the checkpoint of another run than `output_dir`'s.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the checkpoint is torn, or belongs to another run than `output_dir`.
    """
    wanted = str(resume_from_checkpoint)
    if resume_from_checkpoint is None or wanted.lower() in ("false", "none", ""):
        return None
    own = own_checkpoints(output_dir)
    if wanted.lower() == "true":
        return _last_own(Path(output_dir), own)
    hint = f" The last whole checkpoint in output_dir is {own[0]}." if own else ""
    if not Path(wanted).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={wanted!r}: there is no such directory.{hint} Use resume_from_checkpoint true "
            "for the last checkpoint in output_dir."
        )
    if fault := find_fault(wanted):
        raise ValueError(f"resume_from_checkpoint={wanted!r} cannot be resumed: {fault}.{hint}")
    if own and not allowed and run_id_of(wanted) != run_id_of(own[0]):
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is of run {run_id_of(wanted)}, and output_dir {str(output_dir)!r} belongs to run "
            f"{run_id_of(own[0])}, whose last checkpoint is {own[0]}. Resume that one with resume_from_checkpoint true, give "
            "another output_dir to resume the other run there, or set allow_changed_resume=True to resume it here."
        )
    return wanted


def _last_own(output_dir: Path, own: list[Path]) -> str | None:
    say = PartialState().print
    last = own[0] if own else None
    for path in checkpoints_in(output_dir):
        if path == last:
            break
        if fault := find_fault(path):
            say(f"resume_from_checkpoint: {path} is skipped: {fault}.", flush=True)
        elif path not in own:
            say(f"resume_from_checkpoint: {path} is skipped: it is of another run, {run_id_of(path)}.", flush=True)
        else:
            say(
                f"resume_from_checkpoint: {path} is skipped: after saving it, this run went back to an earlier step.",
                flush=True,
            )
    if last is None:
        say(
            f"resume_from_checkpoint: {output_dir} has no whole checkpoint of this run yet, so training starts afresh.",
            flush=True,
        )
        return None
    say(f"resume_from_checkpoint: resuming from {last}.", flush=True)
    return str(last)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fingerprint(model: nn.Module) -> str | None:
    """
    Return a hash of a model's weights without adapters, from some elements of each parameter; `None` if they are sharded.

    The hash of the model that a run began with differs from those of other models and of the trained model. It reads a few
    kilobytes.
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


def describe_run(
    model: nn.Module, args: TrainingArguments, instruction: str, revision: str | None = None
) -> dict[str, Any]:
    """
    Return the description of a run: the teacher's context and schedule, the adapter, the model it began with.

    Args:
        model: The student at the start, before it is wrapped or trained.
        args: The run's config.
        instruction: The instruction's text.
        revision: The commit of the model on the Hub.
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
    if getattr(args, "is_monitored", False):
        run["monitor"] = {name: getattr(args, name) for name in _MONITOR_FIELDS}
    name = getattr(config, "_name_or_path", None)
    run["model"] = {
        "name": name,
        "revision": revision,
        "weights": fingerprint(model),
    }
    return run


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each setting in which a checkpoint's run differs from this run."""
    before, after = dict(saved), dict(now)
    models = [side.pop("model") for side in (before, after)]
    lines = [
        f"{name}: {before.get(name)!r} in the checkpoint, {after.get(name)!r} now"
        for name in (*_COMPARED_FIELDS, "lora", "monitor")
        if before.get(name) != after.get(name)
    ]
    # The same weights may have moved to another directory, so their hashes decide. Sharded weights have no hash: then the name
    # and the commit decide
    keys = ("weights",) if all(model["weights"] for model in models) else ("name", "revision")
    if any(models[0][key] != models[1][key] for key in keys):
        names = [f"{model['name']!r} (revision {model['revision']}, weights {model['weights']})" for model in models]
        lines.append(f"model: {names[0]} in the checkpoint, {names[1]} now")
    return lines


def check_same_run(checkpoint: str | Path, now: dict[str, Any], allowed: bool) -> None:
    """
    Check that a checkpoint's run has the same settings as this run.

    Args:
        checkpoint: The checkpoint to resume from.
        now: This run's description, from [`describe_run`].
        allowed: Whether the user wants the differences; they are printed then.

    Raises:
        ValueError: If a setting differs and `allowed` is false.
    """
    lines = differences(json.loads((Path(checkpoint) / RUN_FILE).read_text(encoding="utf-8"))["run"], now)
    if not lines:
        return
    listed = "".join(f"\n  {line}" for line in lines)
    if not allowed:
        raise ValueError(
            f"{checkpoint} is of a run that differs from this one:{listed}\nSet them back to resume that run; set "
            "allow_changed_resume=True to resume from its state with the new settings; or start a new run from its model "
            "with another output_dir."
        )
    PartialState().print(f"resume_from_checkpoint: resuming with other settings than {checkpoint} had:{listed}")
