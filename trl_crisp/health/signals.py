"""Signs of a run's health that need no labels: what the trainer logs anyway, judged in words against the run's first steps."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Status = Literal["healthy", "watch", "unhealthy"]
Values = Mapping[str, float]

# From the best to the worst; the place is the number that is logged as health/status
STATUSES: tuple[Status, ...] = ("healthy", "watch", "unhealthy")
EVENTS_FILE = "health_events.jsonl"
STATUS_KEY = "health/status"
# The text of an event; the trackers get it, and the log that checkpoints keep does not
EVENT_KEY = "health/event"

# A run is compared with its own first steps, and the last steps are averaged over as many. Ours: the steps of
# completions/relative_length; 160 rollouts at the paper's batch. One step of 24 rollouts varies by 20%, the mean of 5 by 10%.
WINDOW_STEPS = 5

# The figures below are of the lab's 78 runs with logs (benchmarks/results/lab; base 0.92 right, 0.93 in the form "stability"), with
# means over 5 steps. "Kept" are the 53 runs that end at most 10 points below their base.

# The student's entropy against the first steps'. Kept runs stay below 1.98 times it. M = 20, which lost 17
# points, reaches 2.05 to 2.09. Runs that lost 50 points and more reach 2.89 to 11.4.
ENTROPY_WATCH_RATIO = 2.0
ENTROPY_UNHEALTHY_RATIO = 2.5
# A rise below this is noise in the entropy of a model that is certain of nearly every token (the lab's base: 0.043 nats)
ENTROPY_RISE_NATS = 0.03
# A model that is certain of every token says one thing. Runs of the lab end at 0.45 times the first steps' entropy or above, also
# the lost ones.
ENTROPY_LEFT_WATCH_RATIO = 0.2
# The teacher's entropy. Kept runs stay below 1.62 times the first steps', lost ones reach 2.0 to 7.0.
TEACHER_ENTROPY_WATCH_RATIO = 2.0
# Training lowers the reverse KL, except that a refresh brings it back to about the start's. Kept runs stay
# below 1.83 times it (a LoRA run at 100 times the paper's rate), lost ones reach up to 7.6.
REVERSE_KL_WATCH_RATIO = 2.0
# A rise below this is noise if both models get nearly the same prompt (the lab's start: 0.02 nats)
REVERSE_KL_RISE_NATS = 0.01
# The mean and the 95th percentile of the rollouts' length. Training shortens; the largest mean of a kept run is
# 1.32 times the first steps' (the same LoRA rate).
LENGTH_GROWTH_WATCH_RATIO = 1.5
# The paper's largest shortening, 64% with M = 10, lost 26 points on AIME 2024; its sweet spot is half. Kept runs
# have at least 39% of the length left, and M = 5 goes down to 33%.
LENGTH_LEFT_WATCH_RATIO = 0.35
# Rollouts that run on to the cap: most are clipped, and they are longer than at the start. M = 1 in the lab ends so (1.34 to 1.44
# times the length), as in the paper's collapse. A cap that clips most rollouts from the start meets neither condition.
RUNAWAY_LENGTH_RATIO = 1.2
# Shares of rollouts (clipped, repeating themselves, empty): most of them, and clearly more than at the start
MAJORITY = 0.5
MAJORITY_RISE = 0.25
# At the paper's batch, shares of 160 rollouts differ by 0.2 by chance in fewer than one of 1,000 comparisons
SHARE_WATCH_RISE = 0.2
# The mass of both models on their common top tokens is 0.97 to 0.99 where distillation works (arXiv 2604.13016)
OVERLAP_WATCH = 0.9
# Some pairs of prompts begin lower
OVERLAP_WATCH_FALL = 0.05

# The signals by the names that the trainer logs them under. The teacher's age is that of the last step, the others are means
AVERAGED = (
    "completions/mean_length",
    "completions/p95_length",
    "completions/clipped_ratio",
    "completions/repeats",
    "completions/empty",
    # Reported without a rule: a healthy lab run whose checks are waste loses 87% of these words by step 20
    "completions/epistemic_words",
    "entropy",
    "teacher_entropy",
    "reverse_kl",
    "topk_overlap",
)
LATEST = ("teacher/age_steps",)


@dataclass(frozen=True)
class Verdict:
    """What the signals say: a status, and each reason for it in words. A healthy run has no reasons."""

    status: Status = "healthy"
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rule:
    """A reason to worry; `holds` gets the last steps' and the first steps' means of `signals`, in this order."""

    status: Status
    subject: str
    reason: str
    signals: tuple[str, ...]
    holds: Callable[..., bool]


def _rises(ratio: float, rise: float) -> Callable[[float, float], bool]:
    return lambda now, first: now >= ratio * first and now >= first + rise


def _most(now: float, first: float) -> bool:
    return now >= MAJORITY and now >= first + MAJORITY_RISE


def _more(now: float, first: float) -> bool:
    return now >= first + SHARE_WATCH_RISE


# For each subject only the first rule that holds is told, so the worse one comes first. The texts hold no numbers of the run,
# because a reason is new if its text is
_RULES = (
    _Rule(
        "unhealthy",
        "clipped",
        f"most rollouts run on to the cap, and they are {RUNAWAY_LENGTH_RATIO:g} times as long as at the start or more",
        ("completions/clipped_ratio", "completions/mean_length"),
        lambda now, first, length, first_length: _most(now, first) and length >= RUNAWAY_LENGTH_RATIO * first_length,
    ),
    _Rule("watch", "clipped", "more rollouts are clipped than at the start", ("completions/clipped_ratio",), _more),
    _Rule("unhealthy", "repeats", "most rollouts end in repetition", ("completions/repeats",), _most),
    _Rule("watch", "repeats", "more rollouts end in repetition than at the start", ("completions/repeats",), _more),
    _Rule("unhealthy", "empty", "most rollouts are empty", ("completions/empty",), _most),
    _Rule("watch", "empty", "more rollouts are empty than at the start", ("completions/empty",), _more),
    _Rule(
        "unhealthy",
        "entropy",
        f"the student's entropy is {ENTROPY_UNHEALTHY_RATIO:g} times that of the first steps or more",
        ("entropy",),
        _rises(ENTROPY_UNHEALTHY_RATIO, ENTROPY_RISE_NATS),
    ),
    _Rule(
        "watch",
        "entropy",
        f"the student's entropy is {ENTROPY_WATCH_RATIO:g} times that of the first steps or more",
        ("entropy",),
        _rises(ENTROPY_WATCH_RATIO, ENTROPY_RISE_NATS),
    ),
    _Rule(
        "watch",
        "entropy",
        f"the student's entropy has fallen to {ENTROPY_LEFT_WATCH_RATIO:.0%} or less of that of the first steps",
        ("entropy",),
        lambda now, first: now <= ENTROPY_LEFT_WATCH_RATIO * first and now <= first - ENTROPY_RISE_NATS,
    ),
    _Rule(
        "watch",
        "teacher's entropy",
        f"the teacher's entropy is {TEACHER_ENTROPY_WATCH_RATIO:g} times that of the first steps or more",
        ("teacher_entropy",),
        _rises(TEACHER_ENTROPY_WATCH_RATIO, ENTROPY_RISE_NATS),
    ),
    _Rule(
        "watch",
        "reverse KL",
        f"the reverse KL is {REVERSE_KL_WATCH_RATIO:g} times that of the first steps or more: student and teacher part",
        ("reverse_kl",),
        _rises(REVERSE_KL_WATCH_RATIO, REVERSE_KL_RISE_NATS),
    ),
    _Rule(
        "watch",
        "overlap",
        f"less than {OVERLAP_WATCH:.0%} of the two models' probability is on tokens that both rank among their top ones",
        ("topk_overlap",),
        lambda now, first: now < OVERLAP_WATCH and now <= first - OVERLAP_WATCH_FALL,
    ),
    _Rule(
        "watch",
        "length",
        f"rollouts are {LENGTH_GROWTH_WATCH_RATIO:g} times as long as at the start or more",
        ("completions/mean_length",),
        _rises(LENGTH_GROWTH_WATCH_RATIO, 0.0),
    ),
    _Rule(
        "watch",
        "length",
        f"rollouts have {LENGTH_LEFT_WATCH_RATIO:.0%} or less of their length at the start; the paper's largest shortening lost accuracy",
        ("completions/mean_length",),
        lambda now, first: now <= LENGTH_LEFT_WATCH_RATIO * first,
    ),
    _Rule(
        "watch",
        "longest",
        f"the longest rollouts (95th percentile) are {LENGTH_GROWTH_WATCH_RATIO:g} times as long as at the start or more",
        ("completions/p95_length",),
        _rises(LENGTH_GROWTH_WATCH_RATIO, 0.0),
    ),
)


def judge(now: Values, first: Values) -> Verdict:
    """
    Say in words how a run does, from signals alone. A signal that is missing on either side, or is NaN, says nothing.

    Args:
        now: Means over the last 5 steps, by the names that the trainer logs.
        first: Means over the first 5 steps.

    Returns:
        "unhealthy" if a rule of that status holds, else "watch" if one of that status holds, else "healthy"; with the reason of
        each rule that holds.
    """
    told: dict[str, _Rule] = {}
    for rule in _RULES:
        pairs = [side.get(name, math.nan) for name in rule.signals for side in (now, first)]
        if rule.subject not in told and not any(map(math.isnan, pairs)) and rule.holds(*pairs):
            told[rule.subject] = rule
    worst = max((STATUSES.index(rule.status) for rule in told.values()), default=0)
    return Verdict(STATUSES[worst], tuple(rule.reason for rule in told.values()))


@dataclass
class _Entry:
    steps: int
    values: dict[str, float]


def _mean(entries: Iterable[_Entry], name: str) -> float | None:
    pairs = [(entry.steps, entry.values[name]) for entry in entries if name in entry.values]
    return sum(steps * value for steps, value in pairs) / sum(steps for steps, _ in pairs) if pairs else None


@dataclass
class RunningSignals:
    """
    The signals of a run so far, fed with its log entries in order. Its state is a function of these entries.

    Attributes:
        step: The last entry's step.
        verdict: What the signals say after the last entry. Healthy while the first 5 steps are not over.
        unhealthy_steps: How many optimizer steps the last entries cover that were judged unhealthy, without one between them that
            was not.
        unhealthy_entries: How many such entries there are.
    """

    step: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    unhealthy_steps: int = 0
    unhealthy_entries: int = 0
    _first: list[_Entry] = field(default_factory=list)
    # An entry covers at least one step
    _last: "deque[tuple[int, _Entry]]" = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))

    def add(self, step: int, logs: Mapping[str, Any]) -> dict[str, Any] | None:
        """
        Take a log entry of the training.

        Args:
            step: The optimizer step at which it was logged. Its values are means over the steps since the entry before.
            logs: The values. Those that are no signals are left.

        Returns:
            The event, if the status has changed or there is a reason that the entry before did not have: `step`, `status`,
            `reasons`, and `values` and `first`, the means that were compared. `None` otherwise.
        """
        values = {name: logs[name] for name in (*AVERAGED, *LATEST) if isinstance(logs.get(name), int | float)}
        if not values:
            # It says nothing, so a run that was unhealthy still is
            return None
        entry = _Entry(step - self.step, values)
        is_first = self.step < WINDOW_STEPS
        if is_first:
            self._first.append(entry)
        self._last.append((step, entry))
        before, self.step = self.verdict, step
        if is_first:
            return None
        self.verdict = judge(self.now, self.first)
        if self.verdict.status == "unhealthy":
            self.unhealthy_steps += entry.steps
            self.unhealthy_entries += 1
        else:
            self.unhealthy_steps = self.unhealthy_entries = 0
        if self.verdict.status == before.status and set(self.verdict.reasons) <= set(before.reasons):
            return None
        return {
            "step": step,
            "status": self.verdict.status,
            "reasons": list(self.verdict.reasons),
            "values": _without_nonfinite(self.now),
            "first": _without_nonfinite(self.first),
        }

    @property
    def first(self) -> dict[str, float]:
        """The means over the entries that cover the first 5 steps."""
        return {name: mean for name in AVERAGED if (mean := _mean(self._first, name)) is not None}

    @property
    def now(self) -> dict[str, float]:
        """The means over the entries that were logged in the last 5 steps, and the last value of the teacher's age."""
        entries = [entry for step, entry in self._last if step > self.step - WINDOW_STEPS]
        means = {name: mean for name in AVERAGED if (mean := _mean(entries, name)) is not None}
        latest = entries[-1].values if entries else {}
        return means | {name: latest[name] for name in LATEST if name in latest}


def _without_nonfinite(values: Values) -> dict[str, float | None]:
    # JSON has no infinity
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class HealthSignals(TrainerCallback):
    """
    Judges each log entry of the training, and logs the status as `health/status` (0 healthy, 1 watch, 2 unhealthy).

    An event, which is a change of the status or a new reason, is printed, goes to the trackers as the text `health/event`, and becomes a
    line of `output_dir/health_events.jsonl` ([`RunningSignals.add`]). A resumed run has the events of the uninterrupted run, because they follow from the log.

    It must come before the callbacks that report the log; [`~trl_crisp.health.attach.attach_health`] puts it there.

    Attributes:
        running: The signals so far.
    """

    def __init__(self) -> None:
        self.running = RunningSignals()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.running = RunningSignals()
        entries = [log for log in state.log_history if "loss" in log]
        events = [event for log in entries if (event := self.running.add(int(log["step"]), log)) is not None]
        if state.is_world_process_zero:
            # Lines of another run, or of steps after the checkpoint, go; the last one may be torn
            path = _events_path(args)
            path.unlink(missing_ok=True)
            for event in events:
                _append(path, event)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        event = self.running.add(state.global_step, logs)
        status = float(STATUSES.index(self.running.verdict.status))
        # The trackers read the one, checkpoints keep the other
        logs[STATUS_KEY] = state.log_history[-1][STATUS_KEY] = status
        if event is not None and state.is_world_process_zero:
            _append(_events_path(args), event)
            text = describe(self.running.verdict, state.global_step)
            texts: dict[str, Any] = logs
            texts[EVENT_KEY] = text
            print(text, flush=True)


def describe(verdict: Verdict, step: int) -> str:
    """Return a verdict in one line."""
    reasons = "; ".join(verdict.reasons) or "nothing stands out any more"
    return f"health at step {step}: {verdict.status} ({reasons})"


def _events_path(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".", EVENTS_FILE)


def _append(path: Path, event: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event, allow_nan=False) + "\n")
