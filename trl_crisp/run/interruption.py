"""Ctrl-C: the step is finished, a checkpoint is written, and the command that goes on from it is said."""

import os
import shlex
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Set by a command that launches the training in another process: what the user typed
COMMAND_VARIABLE = "TRL_CRISP_COMMAND"
# Ours: a launcher passes the signal on to processes that have it from the terminal already, within milliseconds
_SAME_KEYPRESS_S = 1.0
# What a shell gives a process that Ctrl-C ended
EXIT_CODE = 128 + signal.SIGINT


class SaveOnInterrupt(TrainerCallback):
    """
    Makes Ctrl-C end a training as its last step would, with a checkpoint; a second Ctrl-C ends it at once.

    Under several processes all stop after the same step, whichever of them the signal reached.

    Attributes:
        stopped_at_step: The optimizer step after which training was stopped, `None` where it was not.
    """

    def __init__(self) -> None:
        self.stopped_at_step: int | None = None
        self._requested_s: float | None = None
        self._handler_before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped_at_step = self._requested_s = None
        # Python hands signals to the main thread alone
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGINT, self._request)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give Ctrl-C its meaning of before the training back."""
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)
            self._handler_before = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        requested = torch.tensor(float(self._requested_s is not None), device=args.device)
        if reduce(requested, "sum").item():
            control.should_save = control.should_training_stop = True
            self.stopped_at_step = state.global_step

    def _request(self, signum: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._requested_s is None:
            self._requested_s = now_s
            if PartialState().is_main_process:
                print(
                    "\nCtrl-C: finishing this step, and its measurement where one has begun, then saving a checkpoint. Again to "
                    "stop at once.",
                    file=sys.stderr,
                )
        elif now_s - self._requested_s > _SAME_KEYPRESS_S:
            self.restore()
            raise KeyboardInterrupt


def resume_command() -> str:
    """Return the command that goes on with the training that this process runs."""
    command = os.environ.get(COMMAND_VARIABLE)
    if command is None:
        # The launcher's own options are not known here
        module = getattr(sys.modules["__main__"], "__spec__", None)
        script = ["-m", module.name] if module is not None else [sys.argv[0]]
        command = shlex.join(["accelerate", "launch", *script, *sys.argv[1:]])
    return f"{command} --resume_from_checkpoint true"
