"""Checks whether student and teacher can share one base model with an adapter."""

import dataclasses
import warnings
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig

from trl_crisp.config import CRISPConfig

ADAPTER_NAME = "teacher"

# Fields of a LoRA config for the adapted layers, the adapter's size and its initial values. They have the same effect on the
# teacher's adapter as on the student's, so sharing is exact (tests/models/test_adapter_checks.py tests
# each field but corda_config, lora_ga_config, loftq_config, runtime_config and qalora, which need data, other packages or a GPU).
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
# Fields that only describe the config and its origin, without an effect on numbers
_DESCRIPTIVE_FIELDS = {field.name for field in dataclasses.fields(PeftConfig)} | {"megatron_core"}
_WHY_NOT_SHAREABLE = {
    "alora_invocation_tokens": "activates the adapter in PEFT's own forward, which the loss bypasses, so it would get no gradient",
    "arrow_config": "routes between several adapters, but only one adapter is trained here",
    "bias": "trains biases of the base model, so the teacher would change with the student",
    "ensure_weight_tying": "ties an adapter of the embedding to one of the output head, but the loss reads the head's own weight",
    "kasa_config": "truncates the base model's weights for each adapter, so the teacher's adapter would truncate them again",
    "layer_replication": "copies layers for each adapter, so the teacher's adapter would copy them again",
    "megatron_config": "is for Megatron's layers, which the loss does not support",
    "modules_to_save": "trains whole modules, so the teacher would change with the student",
    "monteclora_config": "samples weights and needs a loss term of its own, which is not added here",
    "trainable_token_indices": "trains rows of the embedding, so the teacher would change with the student",
}


def check_adapter_config(config: PeftConfig, name: str = "default") -> None:
    """
    Check that an adapter with this config can be shared, before it is added to a model.

    Args:
        config: The adapter's config.
        name: The adapter's name, for the error message.

    Raises:
        ValueError: If it is not a LoRA config, or has a field with which sharing would not be exact.
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
        why = _WHY_NOT_SHAREABLE.get(
            field.name, "is not known to work with a base model that student and teacher share"
        )
        raise ValueError(
            f"the LoRA config's {field.name}={value!r} {why}. Remove {field.name}, or train the full model."
        )


def check_adapters_of(model: Any, config: PeftConfig | None) -> None:
    """
    Check the configs of a model's active adapters, or the config of the adapter that it will get.

    Raises:
        ValueError: See [`check_adapter_config`].
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
            "LoRA with a shared base model does not work under DeepSpeed ZeRO-3: the teacher's pass over the same modules "
            "breaks its parameter trace. Use ZeRO-2 or FSDP2 (examples/accelerate/zero2.yaml, fsdp2.yaml)."
        )
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active adapters ({', '.join(active)}), but exactly one can be trained. Activate one "
            "with `model.set_adapter(name)`."
        )
    name = active[0]
    if name == ADAPTER_NAME:
        raise ValueError(
            f"the student's adapter is called {ADAPTER_NAME!r}, which is the name of the teacher's adapter. Load it under another "
            "name, such as 'default'."
        )
    check_adapter_config(model.peft_config[name], name)
    _check_trained_parameters(model, name)
    if args.teacher_model_init_kwargs:
        warnings.warn(
            "teacher_model_init_kwargs has no effect with LoRA: the teacher's adapter has the dtype of the student's.",
            stacklevel=5,
        )
    if args.teacher_offload and args.teacher_model_kind != "live":
        warnings.warn(
            "teacher_offload has no effect with LoRA: the teacher is an adapter on the student's base model, which stays on the device.",
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
            f"{len(others)} parameters of the base model are trainable in addition to the adapter, such as {others[0]}. Student and "
            "teacher share them, so the teacher would change with the student. Freeze them with requires_grad_(False), or "
            "train the full model."
        )


def _is_of(parameter_name: str, adapter_name: str) -> bool:
    parts = parameter_name.split(".")
    return any(part.startswith("lora_") and adapter_name in parts[i + 1 :] for i, part in enumerate(parts))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
