"""Which adapters student and teacher can share one base model with."""

import dataclasses
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig

from trl_crisp.config import CRISPConfig

ADAPTER_NAME = "teacher"

# Fields of a LoRA config that say which layers get an adapter, of which size, and how it starts. All are with the teacher's
# as with the student's, so sharing is exact (tests/models/test_adapter_checks.py has each).
_SHAREABLE_FIELDS = {
    "alpha_pattern",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
}
# Fields that change no number: what the config is, and where it comes from
_DESCRIPTIVE_FIELDS = {field.name for field in dataclasses.fields(PeftConfig)} | {"megatron_core"}
_WHY_NOT_SHAREABLE = {
    "alora_invocation_tokens": "activates the adapter by a pass of PEFT's own, which the loss steps around: no gradient",
    "arrow_config": "routes between several adapters, and one is trained here",
    "bias": "trains biases of the base model, so the teacher would change with the student",
    "ensure_weight_tying": "ties an adapter of the embedding to one of the output head, whose own weight the loss reads",
    "kasa_config": "truncates the base model's weights for each adapter, so the teacher's would do it a second time",
    "layer_replication": "copies layers for each adapter, so the teacher's would do it a second time",
    "megatron_config": "is for Megatron's layers, which the loss does not know",
    "modules_to_save": "trains whole modules, so the teacher would change with the student",
    "monteclora_config": "samples weights and needs a loss term of its own, which is not added here",
    "trainable_token_indices": "trains rows of the embedding, so the teacher would change with the student",
}


def check_adapter_config(config: PeftConfig, name: str = "default") -> None:
    """
    Check that an adapter of this config can be shared, before a model gets one.

    Args:
        config: The adapter's config.
        name: The adapter's name, for the error.

    Raises:
        ValueError: If it is no LoRA config, or has a field with which sharing would not be exact.
    """
    if not isinstance(config, LoraConfig) or getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise ValueError(
            f"the adapter {name!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}; a teacher can share "
            "the base model with LoRA adapters only. Use peft.LoraConfig, or merge the adapter and train the full model."
        )
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _SHAREABLE_FIELDS | _DESCRIPTIVE_FIELDS or not value or value == _default(field):
            continue
        why = _WHY_NOT_SHAREABLE.get(field.name, "is not known to be shared rightly by student and teacher")
        raise ValueError(
            f"the LoRA config's {field.name}={value!r} {why}. Remove {field.name}, or train the full model."
        )


def check_adapters_of(model: Any, config: PeftConfig | None) -> None:
    """
    Check the adapters that a model (or the id or path of one) has, or is to get, by their configs.

    Raises:
        ValueError: As [`check_adapter_config`].
    """
    if isinstance(config, PeftConfig):
        check_adapter_config(config)
    elif not isinstance(model, str) and is_peft_model(model):
        for name in model.active_adapters:
            check_adapter_config(model.peft_config[name], name)


def check_adapter(model: Any, args: CRISPConfig, accelerator: Accelerator) -> None:
    """
    Check that student and teacher can share a PEFT model's base model.

    Args:
        model: A PEFT model, before the teacher's adapter is added.
        args: The run's config.
        accelerator: The run's accelerator.

    Raises:
        ValueError: If its active adapter cannot be shared, or more than that adapter is trained.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "LoRA with a shared teacher does not work under DeepSpeed ZeRO-3: the teacher's pass over the same modules "
            "breaks its parameter trace. Use ZeRO-2 or FSDP2 (examples/accelerate/zero2.yaml, fsdp2.yaml)."
        )
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active adapters ({', '.join(active)}); one is trained and shared with the "
            "teacher. Activate one with `model.set_adapter(name)`."
        )
    name = active[0]
    if name == ADAPTER_NAME:
        raise ValueError(
            f"the student's adapter is called {ADAPTER_NAME!r}, which is the name of the teacher's. Load it under another "
            "name, such as 'default'."
        )
    check_adapter_config(model.peft_config[name], name)
    _check_trained_parameters(model, name)
    if args.teacher_model_init_kwargs:
        warnings.warn(
            "teacher_model_init_kwargs has no effect with LoRA: the teacher's adapter has the dtype of the student's.",
            stacklevel=5,
        )
    dtype = model.get_input_embeddings().weight.dtype
    if args.use_vllm and dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"TRL merges the adapter into the {dtype} base model and takes it out again for each update of vLLM, which "
            "rounds: the base model drifts, and with it the teacher (huggingface/trl#6688). Load the model in float32, or "
            "train the full model.",
            stacklevel=5,
        )


def _check_trained_parameters(model: Any, name: str) -> None:
    trained = [n for n, parameter in model.named_parameters() if parameter.requires_grad]
    if not any(_is_of(n, name) for n in trained):
        raise ValueError(
            f"no parameter of the active adapter {name!r} is trainable, so nothing would be learned. Load it with "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if others := [n for n in trained if "lora_" not in n]:
        raise ValueError(
            f"{len(others)} parameters of the base model are trainable beside the adapter, such as {others[0]}. Student and "
            "teacher share them, so the teacher would change with the student. Freeze them with requires_grad_(False), or "
            "train the full model."
        )


def _is_of(parameter_name: str, adapter_name: str) -> bool:
    parts = parameter_name.split(".")
    return any(part.startswith("lora_") and adapter_name in parts[i + 1 :] for i, part in enumerate(parts))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
