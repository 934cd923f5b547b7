"""The teacher with LoRA: a second, frozen adapter on the student's base model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trl_crisp.config import CRISPConfig
from trl_crisp.models.adapter_checks import ADAPTER_NAME
from trl_crisp.teacher.schedule import Teacher
from trl_crisp.teacher.sharding import named_parameters


class AdapterTeacher(Teacher):
    """
    A second, frozen LoRA adapter on the student's base model. It starts as a copy of the student's adapter.

    The adapter is in the layers, but not in the PEFT model's list of adapters nor in its state dict, so saving or pushing the
    model never includes it. Every kind except `"live"` uses it, because the student's adapter may change the base model's output
    at step 0 already; the base model alone would then be another teacher.
    """

    def __init__(self, student: nn.Module, args: CRISPConfig, accelerator: Accelerator) -> None:
        super().__init__(student, args)
        self._student_adapter: str = student.active_adapters[0]  # type: ignore[index, union-attr, assignment]
        self._is_hidden = False
        self._add_adapter()
        self._start_averages()
        if getattr(accelerator.state, "fsdp_plugin", None) is None:
            self._hide_adapter()

    def _weights_source(self) -> str:
        # The adapter is always saved: it is small, and its initial values are random, so a new process could not repeat them
        return "file"

    def begin_step(self, step: int) -> None:
        # Hidden only now, because accelerate shards the model before: it sends the first process's weights, adapter included, to
        # the other processes through the state dict
        self._hide_adapter()
        super().begin_step(step)

    def _add_adapter(self) -> None:
        model: Any = self.student
        if ADAPTER_NAME not in _adapters_in(model):
            config = copy.deepcopy(model.peft_config[self._student_adapter])
            # Some initialisations (PiSSA, OLoRA, LoftQ) subtract the adapter from the base weights. The student's adapter has
            # done so already, so the default initialisation is used; its values are overwritten below
            config.init_lora_weights = True
            config.inference_mode = True
            # Drawing the initial values must not advance the rollouts' random stream
            with torch.random.fork_rng(devices=[]):
                model.add_adapter(ADAPTER_NAME, config)
            del model.peft_config[ADAPTER_NAME]
        for _, source, target in self._weight_pairs():
            # This also copies the student's dtype and device (meta, if another process loads the weights for FSDP2)
            torch.utils.swap_tensors(target, nn.Parameter(source.detach().clone(), requires_grad=False))
        for layer in _lora_layers(model):
            layer.scaling[ADAPTER_NAME] = layer.scaling[self._student_adapter]

    def _hide_adapter(self) -> None:
        if not self._is_hidden:
            for layer in _lora_layers(self.student):
                layer.register_state_dict_post_hook(_drop_the_teachers)
            self._is_hidden = True

    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        parameters = dict(named_parameters(self.student))
        for name, source in parameters.items():
            parts = name.split(".")
            for i in range(1, len(parts)):
                if parts[i - 1].startswith("lora_") and parts[i] == self._student_adapter:
                    parts[i] = ADAPTER_NAME
                    target_name = ".".join(parts)
                    yield target_name, source, parameters[target_name]
                    break

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        with super().serving(), _active_adapter(self.student, ADAPTER_NAME):
            yield self.student


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _drop_the_teachers(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    # PEFT omits the tensors of other adapters only if they are in its list of adapters, and the teacher's adapter is not
    for name in [n for n in state_dict if n.startswith(prefix) and ADAPTER_NAME in n.removeprefix(prefix).split(".")]:
        del state_dict[name]


def _adapters_in(model: nn.Module) -> set[str]:
    return {name for layer in _lora_layers(model) for name in layer.scaling}


@contextmanager
def _active_adapter(model: nn.Module, name: str) -> Iterator[None]:
    # PEFT's set_adapter changes requires_grad, which would confuse distributed wrappers and the optimizer
    layers = list(_lora_layers(model))
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        # A merged layer uses the student's weights, no matter which adapter is active
        assert not layer.merged, "the student's adapter is merged into the base model during the teacher's pass"
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active
