"""A training run as it left its output_dir: the log of its steps, the health events, the best checkpoint and how it ended."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_crisp.report.figures import REFRESHES_KEY, refresh_steps

STATE_FILE = "trainer_state.json"
EVENTS_FILE = "health_events.jsonl"
# What a checkpoint, and an output_dir, say of the run that they belong to
RUN_FILE, OUTPUT_RUN_FILE = "crisp_run.json", "_crisp_run.json"
# What a saved model says of its training
_RECORD_FILE = "crisp_training.json"
STATUS_KEY = "health/status"
POSTPONED_KEY = "teacher/postponed"
_UNHEALTHY = 2


class EmptyLogError(ValueError):
    """A run has logged nothing."""


@dataclass(frozen=True)
class RunLog:
    """
    A run's log.

    Attributes:
        name: The directory's name.
        directory: The run's output_dir.
        log_history: The log entries.
        last_step, max_steps: The steps that were done and planned. `max_steps` is 0 if unknown.
        best_step: The step of the best checkpoint, `None` if there is none.
        best_checkpoint: The name of its directory.
        events: The lines of health_events.jsonl.
        run_id: The run's id, `None` if it is not known.
        is_checkpoint: Whether this is the log of one checkpoint, and the run may have gone on.
        saved_step: The step of the model in the directory, `None` if it is not known. It is the best checkpoint's if the run took that back.
    """

    name: str
    directory: Path
    log_history: list[dict[str, Any]]
    last_step: int
    max_steps: int
    best_step: int | None
    best_checkpoint: str | None
    events: list[dict[str, Any]]
    run_id: str | None = None
    is_checkpoint: bool = False
    saved_step: int | None = None

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return the steps and the finite values of a logged name."""
        return [
            (int(entry["step"]), float(entry[key]))
            for entry in self.log_history
            if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]) and "step" in entry
        ]

    def at(self, step: int, key: str) -> float | None:
        """Return the last value of a name at a step, `None` if there is none."""
        return dict(self.series(key)).get(step)

    @property
    def refreshes(self) -> list[int]:
        """The logged steps at which the teacher was refreshed."""
        return refresh_steps(self.log_history)

    @property
    def postponed(self) -> list[int]:
        """The logged steps at which a refresh was postponed."""
        steps, seen = [], 0.0
        for step, count in self.series(POSTPONED_KEY):
            if count > seen:
                steps.append(step)
            seen = count
        return steps

    @property
    def ended_early(self) -> bool:
        """Whether the run did fewer steps than planned."""
        return 0 < self.last_step < self.max_steps and not self.is_checkpoint

    def status_at(self, step: int) -> int | None:
        """Return what the signals said at a step, by the last log entry up to it: 0 healthy, 1 watch, 2 unhealthy; `None` if nothing."""
        statuses = [status for at, status in self.series(STATUS_KEY) if at <= step]
        return int(statuses[-1]) if statuses else None

    def is_unhealthy_at(self, step: int) -> bool:
        """Whether the signals were unhealthy at a step."""
        return self.status_at(step) == _UNHEALTHY

    def describe_unhealthy(self, step: int) -> str | None:
        """Return a sentence if the signals were unhealthy at a step, else `None`."""
        return (
            f"The signals of the training {self.name} were unhealthy {self.when(step)}."
            if self.is_unhealthy_at(step)
            else None
        )

    def event_at(self, step: int) -> dict[str, Any] | None:
        """Return the last health event up to a step, `None` if there is none."""
        return next((event for event in reversed(self.events) if event["step"] <= step), None)

    def when(self, step: int) -> str:
        """Return a step in words, as a time of the run."""
        return f"at step {step}" if step < self.last_step else "at its end"

    @property
    def measured_names(self) -> list[str]:
        """What was measured during the run, such as `eval_math500` and `eval_agreement`, benchmarks first."""
        suffix = "_mean_tokens"
        names = dict.fromkeys(
            key.removesuffix(suffix)
            for entry in self.log_history
            for key in entry
            if key.startswith("eval_") and key.endswith(suffix)
        )
        return sorted(names, key=lambda name: name == "eval_agreement")

    def describe_end(self) -> str:
        """Return how the run ended, in a sentence."""
        if self.is_checkpoint:
            return f"This is the log of the checkpoint of step {self.last_step} of {self.max_steps}."
        if not self.ended_early:
            return f"The run did {self.last_step} steps."
        return f"The run ended at step {self.last_step} of {self.max_steps}."


def load_run(directory: Path) -> RunLog:
    """
    Read what a run left: the trainer_state.json that was written last, of output_dir or of its checkpoints, and health_events.jsonl.

    Args:
        directory: The run's output_dir, a checkpoint of it, or a trainer_state.json.

    Raises:
        FileNotFoundError: If the directory has no log.
        ValueError: If the log is torn; [`EmptyLogError`] if it has no entries.
    """
    path = _state_path(directory)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        _check_state(state)
        log_history = state["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is torn or no log of a run ({type(error).__name__}: {error}). Give the trainer_state.json of a checkpoint's directory "
            "to --run instead."
        ) from error
    if not log_history:
        raise EmptyLogError(f"{path} has no log entries: the run did not reach its first logging_steps.")
    place = Path(os.path.abspath(path.parent))
    root = place.parent if (is_in_checkpoint := _number_of(place) is not None) else place
    run_ids = _run_id_in(place), _run_id_in(root)
    last_step = int(state.get("global_step") or 0)
    # Another run in the same directory writes its events over those of the checkpoint's
    events = load_events(root / EVENTS_FILE) if None in run_ids or run_ids[0] == run_ids[1] else []
    return RunLog(
        name=root.name,
        directory=root,
        log_history=log_history,
        last_step=last_step,
        max_steps=int(state.get("max_steps") or 0),
        best_step=state.get("best_global_step") if state.get("best_model_checkpoint") else None,
        best_checkpoint=Path(state["best_model_checkpoint"]).name if state.get("best_model_checkpoint") else None,
        events=[event for event in events if event["step"] <= last_step],
        run_id=run_ids[0],
        is_checkpoint=is_in_checkpoint and Path(os.path.abspath(directory)) != root,
        saved_step=_saved_step(root, run_ids[0]),
    )


def _check_state(state: Any) -> None:
    """Check the types of what is read from a trainer_state.json. Other values of a log may be anything; only numbers are drawn."""
    if not isinstance(state, dict) or not isinstance(state["log_history"], list):
        raise ValueError("log_history is not a list of entries")
    whole = "global_step", "max_steps", "best_global_step"
    faults = [f"{key} is {state[key]!r}, not a step" for key in whole if not _is_step(state.get(key) or 0)]
    checkpoint = state.get("best_model_checkpoint")
    if not isinstance(checkpoint, str | None):
        faults.append(f"best_model_checkpoint is {checkpoint!r}, not a path")
    for number, entry in enumerate(state["log_history"]):
        if not isinstance(entry, dict):
            raise ValueError("log_history is not a list of entries")
        if not _is_step(entry.get("step")):
            faults.append(f"log_history[{number}] has the step {entry.get('step')!r}")
        faults += [
            f"log_history[{number}] has {key} {entry[key]!r}"
            for key in (REFRESHES_KEY, POSTPONED_KEY, STATUS_KEY)
            if key in entry and not (isinstance(entry[key], int | float) and math.isfinite(entry[key]))
        ]
    if faults:
        raise ValueError(faults[0])


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and float(value).is_integer()


def _state_path(directory: Path) -> Path:
    if directory.is_file():
        return directory
    if not directory.is_dir():
        raise FileNotFoundError(f"--run {directory}: there is no such directory. Give the output_dir of a training.")
    own_id = _run_id_in(directory)
    found = [
        path
        for path in directory.glob(f"checkpoint-*/{STATE_FILE}")
        if _number_of(path.parent) is not None and (own_id is None or _run_id_in(path.parent) in (None, own_id))
    ]
    own = directory / STATE_FILE
    if own.is_file():
        written_at = own.stat().st_mtime
        found = [path for path in found if _saved_at(path.parent) > written_at] or [own]
    if not found:
        raise FileNotFoundError(
            f"--run {directory}: it has no {STATE_FILE}, nor a checkpoint with one, so no training has logged there. Give the output_dir of a "
            "training."
        )
    # A run that went back to an earlier checkpoint leaves later steps behind, which it has given up
    return max(found, key=lambda path: (_saved_at(path.parent), _number_of(path.parent) or 0))


def _number_of(checkpoint: Path) -> int | None:
    prefix, _, number = checkpoint.name.rpartition("-")
    return int(number) if prefix == "checkpoint" and number.isdigit() else None


def _saved_at(checkpoint: Path) -> float:
    return float(_run_record(checkpoint).get("saved_at", 0))


def _run_id_in(directory: Path) -> str | None:
    return _run_record(directory).get("run_id")


def _run_record(directory: Path) -> dict[str, Any]:
    """Return what a checkpoint or an output_dir says of its run; nothing if it says nothing."""
    for name in (RUN_FILE, OUTPUT_RUN_FILE):
        try:
            record = json.loads((directory / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(record, dict):
            return record
    return {}


def _saved_step(directory: Path, run_id: str | None) -> int | None:
    """Return the step of the model that a run saved in its output_dir; `None` if there is none, or it is of another run."""
    try:
        record = json.loads((directory / _RECORD_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_own = isinstance(record, dict) and record.get("run_id") == run_id
    return int(record["step"]) if is_own and _is_step(record.get("step")) else None


def load_events(path: Path) -> list[dict[str, Any]]:
    """
    Read health_events.jsonl; no events if there is no such file.

    Raises:
        ValueError: If a line does not hold an event.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            events.append(
                {"step": int(event["step"]), "status": str(event["status"]), "reasons": list(event["reasons"])}
            )
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                # The process was killed while it wrote this line
                break
            raise ValueError(
                f"{path}, line {number}: this line does not hold a health event ({type(error).__name__}: {error}). Remove the line."
            ) from error
    return events
