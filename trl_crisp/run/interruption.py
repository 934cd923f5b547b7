"""After Ctrl-C or SIGTERM: finish the step, save a checkpoint, and print the command that resumes from it."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Environment variable with the command that the user typed. The launching command sets it for the training's process
COMMAND_VARIABLE = "TRL_CRISP_COMMAND"
# The signals with which a terminal, a supervisor or a scheduler stops a run
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The status that a shell reports for a process that such a signal ended
EXIT_CODES = tuple(128 + signum for signum in SIGNALS)
# Signals within this time are one request. Our choice: a terminal or a supervisor signals all processes, and a launcher passes
# the signal on to them, within milliseconds
_SAME_REQUEST_S = 1.0
_LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "trl-crisp", "trl_crisp.cli"),
}


class SaveOnInterrupt(TrainerCallback):
    """
    Ends training after the current step, with a checkpoint, on Ctrl-C or SIGTERM. A second signal ends it at once.

    If the launcher ends, that counts as a SIGTERM, because `accelerate launch` with one process does not pass signals on. Several
    processes all stop after the same step, even if the signal reached only one of them.

    Attributes:
        stopped_at_step: The optimizer step after which training was stopped, `None` if it was not stopped.
        exit_code: The exit status of a stopped process: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self) -> None:
        self.stopped_at_step: int | None = None
        self.exit_code = 0
        self._requested: int | None = None
        self._handlers_before: dict[int, Any] = {}
        self._launcher_pid = os.getppid() if _is_launcher(os.getppid()) else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped_at_step = self._requested = None
        # Python delivers signals to the main thread only
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = {signum: signal.signal(signum, self._request) for signum in SIGNALS}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the signal handlers from before the training."""
        for signum, handler in self._handlers_before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._handlers_before = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._requested is None and self._launcher_pid not in (None, os.getppid()):
            self._requested = signal.SIGTERM
            _tell("\nThe launcher has ended: saving a checkpoint.")
        requests = torch.tensor([float(self._requested == signum) for signum in SIGNALS], device=args.device)
        for requested, exit_code in zip(reduce(requests, "sum").tolist(), EXIT_CODES, strict=True):
            if requested:
                control.should_save = control.should_training_stop = True
                self.stopped_at_step, self.exit_code = state.global_step, exit_code

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested = signum
            start_s = time.monotonic()
            _tell(
                f"\n{_name(signum)}: finishing this step, and its measurement if one has begun, then saving a checkpoint. Send it "
                "again to stop at once."
            )
            # Signals that arrive meanwhile are part of the same request. The handler waits instead of comparing times, because
            # Python calls it only after a long call into C, so its clock does not tell when a signal arrived
            with self._ignoring():
                time.sleep(max(0.0, start_s + _SAME_REQUEST_S - time.monotonic()))
        else:
            self.restore()
            raise KeyboardInterrupt(signum)

    @contextlib.contextmanager
    def _ignoring(self) -> Iterator[None]:
        handlers = {signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


@contextlib.contextmanager
def ending_with_words() -> Iterator[None]:
    """
    End the program on Ctrl-C or SIGTERM with one line instead of a traceback. During training steps [`SaveOnInterrupt`] applies.

    Raises:
        SystemExit: With the status of the signal, 130 or 143.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise KeyboardInterrupt(signum)

    before = {signum: signal.signal(signum, end) for signum in SIGNALS}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        signum = interrupt.args[0] if interrupt.args else signal.SIGINT
        _tell(f"\n{_name(signum)}: stopped at once, without a checkpoint of what came after the last one.")
        raise SystemExit(128 + signum) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


def ignore_signals() -> None:
    """Ignore the signals in a process that is about to end, because a launcher may send them again."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


def resume_command(checkpoint: str = "true", **changes: Any) -> str:
    """
    Return the command that resumes the training of this process.

    Args:
        checkpoint: The value of `resume_from_checkpoint`.
        changes: Fields that get other values than in this process.
    """
    command = os.environ.get(COMMAND_VARIABLE)
    if command is None:
        # The launcher's own options are unknown in this process, so the command lacks them
        module = getattr(sys.modules["__main__"], "__spec__", None)
        script = ["-m", module.name] if module is not None else [sys.argv[0]]
        command = shlex.join(["accelerate", "launch", *script, *sys.argv[1:]])
    flags = {"resume_from_checkpoint": checkpoint, **changes}
    return shlex.join(
        [*shlex.split(command), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    )


def _is_launcher(pid: int) -> bool:
    try:
        # The interpreter, its options, then the script or -m and a module
        words = psutil.Process(pid).cmdline()[:5]
    except psutil.Error:
        return False
    return any(Path(word).name in _LAUNCHERS for word in words)


def _name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _tell(message: str) -> None:
    # Only the main process prints. Before accelerate is set up it is unknown, so every process prints
    if not PartialState._shared_state or PartialState().is_main_process:
        print(message, file=sys.stderr)
