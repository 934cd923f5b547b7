"""A training's record and model card, written into its output_dir by the trainer."""

import importlib.metadata
import os
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.integrations import is_wandb_available

from trl_crisp._upstream import get_comet_experiment_url, get_trackio_space_url
from trl_crisp.config import CRISPConfig
from trl_crisp.prompts.instructions import INSTRUCTIONS
from trl_crisp.publish.card_folder import write_card
from trl_crisp.publish.folder import load_own_results
from trl_crisp.report.run_log import EVENTS_FILE, RunLog, load_events
from trl_crisp.rows.loading import is_hub_id

# TRL's and transformers' fields that a card shows after CRISP's own
_MORE_FIELDS = (
    "learning_rate",
    "max_grad_norm",
    "top_p",
    "beta",
    "chat_template_kwargs",
    "seed",
    "use_vllm",
    "bf16",
    "optim",
)
# Their values are paths of the user's machine; a card has the file's name
_PATH_FIELDS = ("monitor_file", "resume_from_checkpoint")
_PACKAGES = ("trl-crisp", "trl", "transformers", "torch", "peft", "accelerate", "datasets", "tokenizers")


def write_run_card(
    trainer: Any,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Iterable[str] = (),
    results: Sequence[Sequence[str | Path]] = (),
) -> None:
    """
    Write crisp_training.json and README.md into a trainer's output_dir. The main process calls it.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`].
        model_name: The model's name; that of the output_dir if `None`.
        dataset_name: The Hub id or the name of the rows.
        tags: More tags of the card.
        results: As in [`~trl_crisp.publish.folder.make_folder`].

    Raises:
        FileNotFoundError, ValueError: If results do not exist, cannot be compared, or are of another model.
    """
    state, output_dir = trainer.state, Path(trainer.args.output_dir or ".")
    output_dir.mkdir(parents=True, exist_ok=True)
    record = make_record(trainer, dataset_name, tags)
    run = RunLog(
        name=output_dir.absolute().name,
        directory=output_dir,
        log_history=state.log_history,
        last_step=state.global_step,
        max_steps=state.max_steps,
        best_step=state.best_global_step,
        best_checkpoint=None if state.best_model_checkpoint is None else Path(state.best_model_checkpoint).name,
        events=load_events(output_dir / EVENTS_FILE),
        run_id=trainer.run_id,
        saved_step=trainer.model_step,
    )
    repo = trainer.hub_model_id or trainer.args.hub_model_id
    paths = [[Path(path) for path in group] for group in results]
    write_card(
        output_dir,
        repo=repo,
        name=model_name,
        record=record,
        is_adapter=is_peft_model(trainer.model),
        is_chat=bool(trainer.chat_template or trainer._tokenizer.chat_template),
        run=run if run.log_history else None,
        results=load_own_results(paths, output_dir, record, run, repo) if paths else None,
    )


def make_record(trainer: Any, dataset_name: str | None = None, tags: Iterable[str] = ()) -> dict[str, Any]:
    """Return what crisp_training.json has; see [`write_run_card`]."""
    links = _links()
    return {
        **describe_training(trainer, dataset_name),
        "links": links,
        "tags": sorted({*tags, *_tags_of(trainer.model, links)}),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # vLLM's build for CPUs has another name, and no version is worth a checkpoint
        return None


def describe_training(trainer: Any, dataset_name: str | None = None) -> dict[str, Any]:
    """
    Return what a trainer has trained, from what and how. No value is a path of the machine.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`].
        dataset_name: The Hub id or the name of the rows.
    """
    args, state, model, report = trainer.args, trainer.state, trainer.model, trainer.prompt_report
    used = {"vllm": trainer.use_vllm, "deepspeed": trainer.is_deepspeed_enabled}
    packages = [*_PACKAGES, *(name for name, is_used in used.items() if is_used)]
    return {
        "run_id": trainer.run_id,
        "base": {**trainer.origin, "weights": trainer.run_description["model"]["weights"]},
        "adapter": _adapter_of(model),
        "trained_parameters": sum(
            # DeepSpeed keeps the whole parameter's size beside a shard
            getattr(parameter, "ds_numel", parameter.numel())
            for parameter in model.parameters()
            if parameter.requires_grad
        ),
        "instruction": trainer.prompt_pairs.instruction,
        "instruction_name": _name_of_instruction(args.instruction),
        "own_teacher_prompts": report.given,
        "fields": {name: _field_value(args, name) for name in (*_own_fields(), *_MORE_FIELDS)},
        "dataset": {**_dataset_of(dataset_name), "rows": _rows_trained_on(trainer)},
        "step": trainer.model_step,
        "last_step": state.global_step,
        "planned_steps": state.max_steps,
        "rollouts_per_step": args.train_batch_size
        * args.gradient_accumulation_steps
        * trainer.accelerator.num_processes,
        "device": _device_of(trainer.accelerator),
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
    }


def _rows_trained_on(trainer: Any) -> int:
    rows, report = trainer.train_dataset, trainer.prompt_report
    # A stream's rows are counted as they are read; monitor prompts are left out of a dataset alone
    return len(rows) if isinstance(rows, Dataset) else report.rows - report.dropped


def _own_fields() -> list[str]:
    return [name for name in CRISPConfig.__annotations__ if name in CRISPConfig.__dataclass_fields__]


def _field_value(args: CRISPConfig, name: str) -> Any:
    value = getattr(args, name)
    if name == "instruction":
        return _name_of_instruction(value)
    if name in _PATH_FIELDS and isinstance(value, str):
        return Path(value).name
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, int | float | str | dict | None) else str(value)


def _name_of_instruction(instruction: str) -> str:
    text = instruction.strip()
    if not text:
        return "none"
    if text in INSTRUCTIONS or re.fullmatch(r"(percent|words):\d+", text):
        return text
    if text.endswith(".txt") and "\n" not in text:
        return Path(text).name
    return "a text of its own"


def _adapter_of(model: Any) -> dict[str, Any] | None:
    if not is_peft_model(model):
        return None
    config: Any = model.peft_config[model.active_adapters[0]]
    variants = {name: True for name in ("use_dora", "use_rslora") if getattr(config, name, False)}
    return {
        "type": str(getattr(config.peft_type, "value", config.peft_type)),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": _modules_in_words(config.target_modules),
        **variants,
    }


def _modules_in_words(modules: Any) -> str | None:
    if isinstance(modules, str | None):
        return modules
    # PEFT may write out "all-linear" as the full name of each layer's module
    kinds = sorted({name.rpartition(".")[2] for name in modules})
    return ", ".join(kinds) if len(kinds) == len(modules) else f"{', '.join(kinds)} ({len(modules)} modules)"


def _dataset_of(name: str | None) -> dict[str, str | None]:
    if not name:
        return {"name": None, "hub_id": None}
    if is_hub_id(name):
        return {"name": name, "hub_id": name}
    is_task = name.startswith("reasoning-gym:")
    return {"name": name if is_task else Path(name).expanduser().absolute().name, "hub_id": None}


def _device_of(accelerator: Any) -> str:
    device, count = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{count} x {name}" if count > 1 else name


def _links() -> dict[str, str]:
    """Return where the trackers show the run, as TRL's card does."""
    links: dict[str, str | None] = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        links["Weights & Biases"] = None if wandb.run is None else wandb.run.url
    return {name: url for name, url in links.items() if url is not None}


def _tags_of(model: Any, links: dict[str, str]) -> list[str]:
    """Return the tags that TRL and transformers give."""
    tags = list(getattr(model, "model_tags", None) or [])
    if hasattr(model.config, "unsloth_version"):
        tags.append("unsloth")
    if "JOB_ID" in os.environ:
        tags.append("hf_jobs")
    if (url := links.get("Trackio")) is not None:
        # The Hub embeds it in the model's page
        tags.append(f"trackio:{url}")
    return tags
