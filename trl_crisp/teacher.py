"""Who the teacher is, when it is refreshed from the student, and what its state is.

Three places that the teacher's weights can live in, behind one interface:

| teacher | full fine-tuning | LoRA |
|---|---|---|
| periodic, base, ema | [`CopyTeacher`]: a frozen copy of the student | [`AdapterTeacher`]: a second adapter on one base model |
| live | [`LiveTeacher`]: the student itself | [`LiveTeacher`] |
"""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model, is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from trl_crisp._upstream import prepare_deepspeed
from trl_crisp.config import CRISPConfig
from trl_crisp.models.adapter_checks import ADAPTER_NAME, check_adapter
from trl_crisp.models.hidden_states import evaluation_mode

STATE_FILE = "teacher_state.json"
WEIGHTS_FILE = "teacher.safetensors"


def make_teacher(student: nn.Module, args: CRISPConfig, accelerator: Accelerator) -> "Teacher":
    """
    Make the teacher of a student, from the student's weights as they are now.

    Args:
        student: The model before it is wrapped for distributed training. Under LoRA a second adapter is added to it.
        args: The run's config.
        accelerator: The run's accelerator; a copied teacher is placed and sharded as it says.

    Raises:
        ValueError: Where the student's adapter cannot be shared, or the backend cannot hold this teacher.
    """
    if is_peft_model(student):
        check_adapter(student, args, accelerator)
        return (
            LiveTeacher(student, args)
            if args.teacher_model_kind == "live"
            else AdapterTeacher(student, args, accelerator)
        )
    if args.teacher_model_kind == "live":
        return LiveTeacher(student, args)
    return CopyTeacher(student, args, accelerator)


class Teacher(ABC):
    """
    The frozen side of the divergence: its weights' schedule, and how to run it.

    Args:
        student: The student's module, unwrapped.
        args: Gives `teacher_model_kind`, `teacher_sync_steps` and `teacher_update_rate`.

    Attributes:
        wrapped_model: The teacher's module as the distributed backend wrapped it, `None` where it is the student's.
        refreshes: How many times the weights were taken over from the student since the start.
    """

    wrapped_model: nn.Module | None = None

    def __init__(self, student: nn.Module, args: CRISPConfig) -> None:
        self.student = student
        self.kind = args.teacher_model_kind
        self.sync_steps = args.teacher_sync_steps
        self.update_rate = (args.teacher_update_rate or 1.0) if self.kind == "ema" else 1.0
        self.refreshes = 0
        self._completed_steps = 0
        self._refreshed_at_step = 0
        # float32 moving averages by parameter name, where the teacher's own weights are of a lower precision
        self._averages: dict[str, torch.Tensor] = {}

    @property
    def age_steps(self) -> int:
        """Optimizer steps that the student made since its weights were last taken over."""
        return 0 if self.kind == "live" else self._completed_steps - self._refreshed_at_step

    def is_due(self, step: int) -> bool:
        """Whether the start of optimizer step `step`, counted from 1, refreshes the teacher (Algorithm 1)."""
        return self.kind in ("periodic", "ema") and step % self.sync_steps == 0  # type: ignore[operator]

    def begin_step(self, step: int) -> None:
        """Tell the teacher that optimizer step `step`, counted from 1, begins; refreshes it if that is due."""
        self._completed_steps = step - 1
        if self.is_due(step):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """
        Take the student's weights over now: a copy, or for `"ema"` its share in the moving average.

        Raises:
            ValueError: For `"base"`, whose weights are those of step 0.
        """
        if self.kind == "base":
            raise ValueError(
                "teacher_model_kind='base' keeps the weights of step 0, so it cannot be refreshed. Use 'periodic'."
            )
        for name, source, target in self._weight_pairs():
            with self._gathered(source, target):
                self._blend(name, source, target)
        self.refreshes += 1
        self._refreshed_at_step = self._completed_steps

    def state_dict(self) -> dict[str, Any]:
        """
        What the teacher is made of: the schedule's counters and, under `"weights"`, tensors by parameter name (those of
        this process; the float32 averages for `"ema"`). The tensors are not copies.
        """
        weights = {name: target.detach() for name, _, target in self._weight_pairs()} | self._averages
        return {
            "kind": self.kind,
            "refreshes": self.refreshes,
            "completed_steps": self._completed_steps,
            "refreshed_at_step": self._refreshed_at_step,
            "weights": weights,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore what [`state_dict`] returned, without `"weights"` only the counters.

        Raises:
            ValueError: For the state of another kind of teacher, or of another model.
        """
        if state["kind"] != self.kind:
            raise ValueError(
                f"the saved teacher is of kind {state['kind']!r} and this run's teacher_model_kind is {self.kind!r}. Set "
                f"teacher_model_kind={state['kind']!r}."
            )
        if "weights" in state:
            self._load_weights(state["weights"])
        self.refreshes = state["refreshes"]
        self._completed_steps = state["completed_steps"]
        self._refreshed_at_step = state["refreshed_at_step"]

    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        targets = {name: target for name, _, target in self._weight_pairs()}
        if differing := sorted(targets.keys() ^ weights.keys()):
            raise ValueError(
                f"the saved teacher is of another model: {len(differing)} parameters are in one of them only, such as "
                f"{differing[0]}. Resume with the model, and the LoRA modules, that the state was saved with."
            )
        for name, target in targets.items():
            with self._gathered(target, target):
                for own in (target, self._averages.get(name)):
                    if own is not None:
                        own.copy_(_sharded_like(own, weights[name]))

    def save(self, directory: str | Path, write: bool = True) -> None:
        """
        Write the state into a checkpoint, as `teacher_state.json` and, where it has weights of its own, `teacher.safetensors`.

        A copy that was never refreshed is not written: it has the weights of the model that the run began with, and the run
        that resumes makes it from them again.

        Args:
            directory: The checkpoint.
            write: Whether this process writes. Where the weights are sharded all processes have to call this, to gather
                them.
        """
        source = self._weights_source()
        if source == "file":
            tensors = {}
            for name, _, target in self._weight_pairs():
                full = self._full(self._averages.get(name, target))
                if write:
                    tensors[name] = full.cpu().contiguous()
            if write:
                save_file(tensors, Path(directory) / WEIGHTS_FILE)
        if not write:
            return
        state = {name: value for name, value in self.state_dict().items() if name != "weights"}
        state |= {"age_steps": self.age_steps, "weights_from": source}
        (Path(directory) / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def load(self, directory: str | Path, allow_changed: bool = False) -> None:
        """
        Restore what [`save`] wrote; all processes call it.

        Args:
            directory: The checkpoint.
            allow_changed: Take over what fits of the state of another kind of teacher.

        Raises:
            FileNotFoundError: For a checkpoint without a teacher.
            ValueError: For the state of another teacher.
        """
        path = Path(directory) / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {STATE_FILE}: it is no checkpoint of a CRISP run. Resume from another checkpoint, or "
                "start afresh with that directory as the model."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        source = state.pop("weights_from")
        if allow_changed and source == "student" and self.kind in ("periodic", "ema"):
            self._take_over()
        if allow_changed:
            state["kind"] = self.kind
        # A teacher that was never refreshed is the one that this run began with
        if source == "file" and self.kind != "live":
            state["weights"] = load_file(Path(directory) / WEIGHTS_FILE)
        self.load_state_dict(state)

    def _weights_source(self) -> str:
        return "file" if self.refreshes else "start"

    def _take_over(self) -> None:
        for name, source, target in self._weight_pairs():
            with self._gathered(source, target), torch.no_grad():
                target.copy_(source)
                if name in self._averages:
                    self._averages[name].copy_(source)

    def _full(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return tensor.full_tensor().detach()
        if hasattr(tensor, "ds_id"):
            with self._gathered(tensor, tensor):  # type: ignore[arg-type]
                return tensor.detach().clone()
        return tensor.detach()

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        """
        Yield the unwrapped module to run as the teacher: without dropout, with the teacher's weights.

        Where that module is the student's, everything about the student is as before on leaving: the training mode of
        each module, the active adapter, the requires_grad flags. Run it under `torch.no_grad()`.
        """
        with evaluation_mode(self.student):
            yield self.student

    @abstractmethod
    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield each of the teacher's parameters: its name, the student's it is taken from, and itself."""

    def _gathered(self, source: nn.Parameter, target: nn.Parameter):
        return nullcontext()

    def _blend(self, name: str, source: nn.Parameter, target: nn.Parameter) -> None:
        average = self._averages.get(name, target)
        if isinstance(target, DTensor) and not isinstance(average, DTensor):
            # The adapter was sharded after its average was started, and has not moved since
            average = self._averages[name] = target.detach().float()
        if self.update_rate == 1.0:
            average.copy_(source)
        else:
            average.lerp_(source.to(average.dtype), self.update_rate)
            # The mean of two equal infinities (the bias of masked tokens) would be NaN
            average.copy_(torch.where(torch.isinf(source), source.to(average.dtype), average))
        if average is not target:
            target.copy_(average)

    def _start_averages(self) -> None:
        # A float16 or bfloat16 average would round an update of 0.005 of a small difference to nothing
        if self.kind == "ema":
            self._averages = {
                name: (target if isinstance(target, DTensor) else source).detach().float().clone()
                for name, source, target in self._weight_pairs()
                if target.dtype != torch.float32
            }


class LiveTeacher(Teacher):
    """The student itself, seen through the teacher's prompt; its weights are the student's at every step."""

    def _weights_source(self) -> str:
        return "student"

    def refresh(self) -> None:
        """Do nothing: the weights are the student's already."""

    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        return iter(())


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
        parameters = dict(_named_parameters(self.student))
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


class CopyTeacher(Teacher):
    """A frozen copy of the student's module, in evaluation mode, with the student's dtype unless the config gives one."""

    def __init__(self, student: nn.Module, args: CRISPConfig, accelerator: Accelerator) -> None:
        super().__init__(student, args)
        fsdp_plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if fsdp_plugin is not None and fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "a teacher cannot be refreshed under FSDP version 1, which flattens the parameters. Set fsdp_version: 2 in "
                "the accelerate config (examples/accelerate/fsdp2.yaml), or use DeepSpeed."
            )
        self._model = _frozen_copy(student, (args.teacher_model_init_kwargs or {}).get("dtype"))  # type: ignore[union-attr]
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.wrapped_model = prepare_deepspeed(self._model, accelerator)
        elif fsdp_plugin is not None:
            # Sharded as the student will be: layer by layer, and from the first process's weights where only that one
            # loaded them (fsdp_cpu_ram_efficient_loading)
            self.wrapped_model = self._model = fsdp2_prepare_model(accelerator, self._model)
            # No backward follows the teacher's forward, which would free the head's gathered weights
            self._model.set_reshard_after_forward(True)  # type: ignore[operator]
        else:
            self.wrapped_model = self._model
            if getattr(self._model, "hf_device_map", None) is None:
                self._model.to(accelerator.device)
        if self.kind == "ema" and _is_partitioned(self._model) and self._model.dtype != torch.float32:
            raise ValueError(
                "teacher_model_kind='ema' needs a float32 moving average, which ZeRO-3 has no place for beside "
                f"{self._model.dtype} parameters. Use ZeRO-2 or FSDP2, or teacher_model_kind='periodic'."
            )
        self._start_averages()

    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        sources = {_plain_name(name): parameter for name, parameter in _named_parameters(self.student)}
        for name, target in _named_parameters(self._model):
            yield _plain_name(name), sources[_plain_name(name)], target

    def _gathered(self, source: nn.Parameter, target: nn.Parameter):
        partitioned = [parameter for parameter in (source, target) if hasattr(parameter, "ds_id")]
        if not partitioned:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        yield self._model


def _frozen_copy(student: nn.Module, dtype: str | torch.dtype | None) -> nn.Module:
    teacher = _zero3_copy(student) if _is_partitioned(student) else copy.deepcopy(student)
    if dtype not in (None, "auto"):
        teacher = teacher.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return teacher.requires_grad_(False).eval()


def _zero3_copy(student: nn.Module) -> nn.Module:
    # A module whose parameters ZeRO-3 partitioned while loading cannot be deep-copied: its tensors are empty
    import deepspeed

    # The draw of its first values must not move the random stream of the rollouts
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        # transformers' own way in, which keeps tied weights tied and the rotary frequencies float32
        teacher = type(student)._from_config(copy.deepcopy(student.config), dtype=student.dtype)  # type: ignore[attr-defined]
    pairs = zip(student.named_parameters(), teacher.named_parameters(), strict=True)
    for (source_name, source), (target_name, target) in pairs:
        assert source_name == target_name, (source_name, target_name)
        with deepspeed.zero.GatheredParameters([source, target], modifier_rank=0), torch.no_grad():
            target.copy_(source)
    for (_, source_buffer), (_, target_buffer) in zip(student.named_buffers(), teacher.named_buffers(), strict=True):
        target_buffer.data = source_buffer.detach().clone()
    return teacher


def _is_partitioned(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _sharded_like(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if not isinstance(target, DTensor) or isinstance(values, DTensor):
        return values
    # Every process has all the values, so that none has to be sent
    return distribute_tensor(values.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # What a forward of FSDP2 has gathered stays so until a backward, which an evaluation has none of: back to the shards
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


def _plain_name(name: str) -> str:
    # What activation checkpointing and torch.compile wrap around a module shows in its parameters' names
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


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
