"""When the teacher takes the student's weights: the schedule, its counters, and the state that a checkpoint keeps."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from trl_crisp.config import CRISPConfig
from trl_crisp.models.hidden_states import evaluation_mode
from trl_crisp.run.files import write_json
from trl_crisp.teacher.sharding import full_tensor, gathered, sharded_like

TEACHER_STATE_FILE = "teacher_state.json"
WEIGHTS_FILE = "teacher.safetensors"


class Teacher(ABC):
    """
    The frozen model of the divergence: the schedule of its weights, and how to run it.

    Args:
        student: The student's module, unwrapped.
        args: The config; `teacher_model_kind`, `teacher_sync_steps` and `teacher_update_rate` are read.

    Attributes:
        wrapped_model: The teacher's module as the distributed backend wrapped it, `None` if the teacher uses the student's module.
        refreshes: How many times the teacher took the student's weights since the start.
        postponed: How many due refreshes the gate did not allow.
        refresh_gate: Receives the step at whose start a refresh is due, and says whether it happens. If it does not, the refresh is
            asked for again when the next one is due. `None` allows all, as in the paper.
    """

    wrapped_model: nn.Module | None = None
    refresh_gate: Callable[[int], bool] | None = None

    def __init__(self, student: nn.Module, args: CRISPConfig) -> None:
        self.student = student
        self.kind = args.teacher_model_kind
        self.sync_steps = args.teacher_sync_steps
        self.update_rate = (args.teacher_update_rate or 1.0) if self.kind == "ema" else 1.0
        self.refreshes = self.postponed = 0
        self._completed_steps = self._begun_steps = 0
        self._refreshed_at_step = 0
        # float32 moving averages by parameter name, for parameters of a lower precision
        self._averages: dict[str, torch.Tensor] = {}

    @property
    def age_steps(self) -> int:
        """Optimizer steps of the student since the teacher last took its weights."""
        return 0 if self.kind == "live" else self._completed_steps - self._refreshed_at_step

    def is_due(self, step: int) -> bool:
        """Whether the start of optimizer step `step`, counted from 1, refreshes the teacher (Algorithm 1)."""
        return self.kind in ("periodic", "ema") and step % self.sync_steps == 0  # type: ignore[operator]

    def begin_run(self) -> None:
        """Tell the teacher that the steps are counted from 1 again. Its weights and its age stay."""
        self._refreshed_at_step -= self._begun_steps
        self._completed_steps = self._begun_steps = 0

    def begin_step(self, step: int) -> None:
        """Begin optimizer step `step`, counted from 1: refresh the teacher if that is due and the gate allows it."""
        self._completed_steps, self._begun_steps = step - 1, step
        if not self.is_due(step):
            return
        if self.refresh_gate is None or self.refresh_gate(step):
            self.refresh()
        else:
            self.postponed += 1

    @torch.no_grad()
    def refresh(self) -> None:
        """
        Update the teacher from the student now: copy the weights, or for `"ema"` update the moving average.

        Raises:
            ValueError: For `"base"`, which keeps the weights of step 0.
        """
        if self.kind == "base":
            raise ValueError(
                "teacher_model_kind='base' keeps the weights of step 0, so it cannot be refreshed. Use 'periodic'."
            )
        for name, source, target in self._weight_pairs():
            with gathered(source, target):
                self._blend(name, source, target)
        self.refreshes += 1
        self._refreshed_at_step = self._completed_steps

    def state_dict(self) -> dict[str, Any]:
        """
        Return the schedule's counters and, as `"weights"`, this process's tensors by parameter name (for `"ema"` the float32
        averages). The tensors are not copies.
        """
        weights = {name: target.detach() for name, _, target in self._weight_pairs()} | self._averages
        return {
            "kind": self.kind,
            "refreshes": self.refreshes,
            "postponed": self.postponed,
            "completed_steps": self._completed_steps,
            "refreshed_at_step": self._refreshed_at_step,
            "weights": weights,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore what [`state_dict`] returned. Without `"weights"`, only the counters are restored.

        Raises:
            ValueError: If the state is that of another kind of teacher, or of another model.
        """
        if state["kind"] != self.kind:
            raise ValueError(
                f"the saved teacher is of kind {state['kind']!r} and this run's teacher_model_kind is {self.kind!r}. Set "
                f"teacher_model_kind={state['kind']!r}."
            )
        if "weights" in state:
            self._load_weights(state["weights"])
        self.refreshes = state["refreshes"]
        # Checkpoints of versions without a gate do not have it
        self.postponed = state.get("postponed", 0)
        self._completed_steps = self._begun_steps = state["completed_steps"]
        self._refreshed_at_step = state["refreshed_at_step"]

    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        targets = {name: target for name, _, target in self._weight_pairs()}
        if differing := sorted(targets.keys() ^ weights.keys()):
            raise ValueError(
                f"the saved teacher is of another model: {len(differing)} parameters are in one of them only, such as "
                f"{differing[0]}. Resume with the model, and the LoRA modules, that the state was saved with."
            )
        for name, target in targets.items():
            with gathered(target, target):
                for own in (target, self._averages.get(name)):
                    if own is not None:
                        own.copy_(sharded_like(own, weights[name]))

    def save(self, directory: str | Path, write: bool = True) -> None:
        """
        Write the state into a checkpoint, as `teacher_state.json` and, if the teacher's weights are saved, `teacher.safetensors`.

        A copy that was never refreshed has the weights of the model that the run began with. It is not written, because a
        resumed run makes the same copy from that model.

        Args:
            directory: The checkpoint.
            write: Whether this process writes. If the weights are sharded, all processes have to call this, to gather them.
        """
        source = self._weights_source()
        if source == "file":
            tensors = {}
            for name, _, target in self._weight_pairs():
                full = full_tensor(self._averages.get(name, target))
                if write:
                    tensors[name] = full.cpu().contiguous()
            if write:
                save_file(tensors, Path(directory) / WEIGHTS_FILE)
        if not write:
            return
        state = {name: value for name, value in self.state_dict().items() if name != "weights"}
        write_json(Path(directory) / TEACHER_STATE_FILE, {**state, "weights_from": source})

    def load(self, directory: str | Path, allow_changed: bool = False) -> None:
        """
        Restore what [`save`] wrote; all processes call it.

        Args:
            directory: The checkpoint.
            allow_changed: Accept the state of another kind of teacher, and restore the parts that apply.

        Raises:
            FileNotFoundError: If the checkpoint has no teacher.
            ValueError: If the state is that of another teacher.
        """
        path = Path(directory) / TEACHER_STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {TEACHER_STATE_FILE}: it is not a checkpoint of a CRISP run. Resume from another checkpoint, or "
                "start afresh with that directory as the model."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        source = state.pop("weights_from")
        if allow_changed and source == "student" and self.kind in ("periodic", "ema"):
            self._take_over()
        if allow_changed:
            state["kind"] = self.kind
        # With another source nothing is loaded: a teacher that was never refreshed has the weights that this run began with
        if source == "file" and self.kind != "live":
            state["weights"] = load_file(Path(directory) / WEIGHTS_FILE)
        self.load_state_dict(state)

    def _weights_source(self) -> str:
        return "file" if self.refreshes else "start"

    def _take_over(self) -> None:
        for name, source, target in self._weight_pairs():
            with gathered(source, target), torch.no_grad():
                target.copy_(source)
                if name in self._averages:
                    self._averages[name].copy_(source)

    @property
    def is_offloaded(self) -> bool:
        """Whether the weights are on the host between two passes, so that few long passes are better than many short ones."""
        return False

    def fetch(self) -> None:  # noqa: B027 (most teachers have nothing to bring)
        """Start to bring weights from the host to the device, if they are there, because [`serving`] comes soon."""

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        """
        Yield the unwrapped module to run as the teacher, with the teacher's weights and without dropout.

        If the module is the student's, its state is restored on exit: the training mode of each module, the active adapter and
        the requires_grad flags. Run it under `torch.no_grad()`.
        """
        with evaluation_mode(self.student):
            yield self.student

    @abstractmethod
    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield, for each of the teacher's parameters, its name, the student's parameter, and the teacher's parameter."""

    def _blend(self, name: str, source: nn.Parameter, target: nn.Parameter) -> None:
        average = self._averages.get(name, target)
        if isinstance(target, DTensor) and not isinstance(average, DTensor):
            # The adapter was sharded after its average was created, and has not changed since
            average = self._averages[name] = target.detach().float()
        if self.update_rate == 1.0:
            average.copy_(source)
        else:
            # On the student's device, also if the teacher is on the host
            new = average.to(source.device).lerp(source.to(average.dtype), self.update_rate)
            # The average of two equal infinities (the bias of masked tokens) is NaN, so infinities are copied
            average.copy_(torch.where(torch.isinf(source), source.to(average.dtype), new))
        if average is not target:
            target.copy_(average)

    def _start_averages(self) -> None:
        # In float16 or bfloat16, adding 0.005 of a small difference would often round to no change
        if self.kind == "ema":
            self._averages = {
                # Where the teacher is
                name: (target if isinstance(target, DTensor) else source).detach().float().clone().to(target.device)
                for name, source, target in self._weight_pairs()
                if target.dtype != torch.float32
            }


class LiveTeacher(Teacher):
    """The student itself, with the teacher's prompt; its weights are the student's at every step."""

    def _weights_source(self) -> str:
        return "student"

    def refresh(self) -> None:
        """Do nothing, because the weights are the student's."""

    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        return iter(())
