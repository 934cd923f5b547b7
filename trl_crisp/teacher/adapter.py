"""The teacher under LoRA: a second, frozen adapter on the student's base model."""

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
    A second, frozen LoRA adapter on the student's base model; a copy of the student's adapter at the start.

    The adapter lives in the layers, but neither among the PEFT model's adapters nor in its state dict, so saving or pushing
    that model never includes it. Every kind but `"live"` has one: that is right also where the student's adapter is no
    identity at step 0.
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
        # Small, and never refreshed it is a draw of the run's own, which another process would not repeat
        return "file"

    def begin_step(self, step: int) -> None:
        # Not before: by the state dict accelerate sends the first process's weights to the others when it shards the model
        self._hide_adapter()
        super().begin_step(step)

    def _add_adapter(self) -> None:
        model: Any = self.student
        if ADAPTER_NAME not in _adapters_in(model):
            config = copy.deepcopy(model.peft_config[self._student_adapter])
            # Some initialisations (PiSSA, OLoRA, LoftQ) subtract the adapter from the base weights, which the student's
            # adapter has done already; these values are overwritten below
            config.init_lora_weights = True
            config.inference_mode = True
            # The draw of its first values must not move the random stream of the rollouts
            with torch.random.fork_rng(devices=[]):
                model.add_adapter(ADAPTER_NAME, config)
            del model.peft_config[ADAPTER_NAME]
        for _, source, target in self._weight_pairs():
            # The student's dtype and device too (meta, where another process loads the weights for FSDP2)
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
    # PEFT saves every tensor of a layer but those of adapters that it knows to be others than the one it saves
    for name in [n for n in state_dict if n.startswith(prefix) and ADAPTER_NAME in n.removeprefix(prefix).split(".")]:
        del state_dict[name]


def _adapters_in(model: nn.Module) -> set[str]:
    return {name for layer in _lora_layers(model) for name in layer.scaling}


@contextmanager
def _active_adapter(model: nn.Module, name: str) -> Iterator[None]:
    # PEFT's own set_adapter flips requires_grad, which distributed wrappers and the optimizer must not see
    layers = list(_lora_layers(model))
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        # A merged layer answers with the student's weights, whatever adapter is active
        assert not layer.merged, "the student's adapter is merged into the base model during the teacher's pass"
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active
