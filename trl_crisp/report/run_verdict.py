"""What a run's own measurements say of its result, for a page without results of `trl-crisp eval`."""

from typing import Any

from trl_crisp.report.run_log import RunLog
from trl_crisp.report.verdict import MARGIN, Measured, Verdict, judge


def judge_run(run: RunLog, step: int | None = None) -> Verdict:
    """
    Return the verdict on a measured step or, if none is given, on the run's best checkpoint, or else on the last measured step.

    The change of accuracy counts where it was measured, else that of agreement with the base's majority answers. Accuracy of the base that
    is not above the margin cannot fall by more, so agreement counts before it. The log has no
    interval of the reduction, so its estimate counts. The health signals count as they were at the judged step; without a measurement, at
    the given step or the run's end.
    """
    for name in run.measured_names:
        for key, subject in _subjects(run, name):
            changes = run.series(f"{key}_change")
            if not changes:
                continue
            if step is not None:
                if step not in dict(changes):
                    continue
                return _judge_step(run, name, key, subject, step)
            judged = run.best_step if run.at(run.best_step or 0, f"{key}_change") is not None else changes[-1][0]
            assert judged is not None
            verdict = _judge_step(run, name, key, subject, judged)
            which = "the best checkpoint" if judged == run.best_step else "the last measured step"
            reasons = [f"This is step {judged}, {which}.", *verdict.reasons]
            if run.best_step is None:
                reasons.append("No measured step was found to be shorter than the base and as good.")
            return Verdict(verdict.level, verdict.headline, tuple(reasons))
    judged = run.last_step if step is None else step
    told = _last_reasons(run, judged)
    if run.is_unhealthy_at(judged):
        return Verdict(
            "do not use",
            f"Do not use this checkpoint: the signals of the training were unhealthy {run.when(judged)}",
            (*told, "Accuracy was not measured."),
        )
    return Verdict("no verdict", f"No verdict: accuracy was not measured{_rollouts(run)}", told)


def _judge_step(run: RunLog, name: str, key: str, subject: str, step: int) -> Verdict:
    return judge(_measured(run, name, key, subject, step), unhealthy=run.describe_unhealthy(step))


def _subjects(run: RunLog, name: str) -> list[tuple[str, str]]:
    """Return the keys of what was measured, the one that counts first."""
    if name == "eval_agreement":
        accuracy = ("eval_agreement_accuracy", "accuracy on the monitor prompts")
        agreement = ("eval_agreement", "agreement with the base")
        level = run.at(0, accuracy[0])
        return [agreement, accuracy] if level is not None and level <= MARGIN else [accuracy, agreement]
    return [(f"{name}_accuracy", f"accuracy on {name.removeprefix('eval_')}")]


def _measured(run: RunLog, name: str, key: str, subject: str, step: int) -> Measured:
    reduction = run.at(step, f"{name}_reduction")
    ends = {end: run.at(step, f"{key}_change_{end}") for end in ("low", "high")}
    cut = [run.at(number, f"{name}_truncated") for number in (0, step)]
    accuracy: dict[str, Any] | None = {"estimate": run.at(step, f"{key}_change"), **ends}
    return Measured(
        reduction=None if reduction is None else {"estimate": reduction, "low": None, "high": None},
        accuracy=None if None in ends.values() else accuracy,
        subject=subject,
        base_level=run.at(0, key),
        cut_shares=None if cut[0] is None or cut[1] is None else (cut[0], cut[1]),
    )


def _rollouts(run: RunLog) -> str:
    lengths = run.series("completions/mean_length")
    if len(lengths) < 2:
        return ""
    return f"; rollouts went from {lengths[0][1]:,.0f} to {lengths[-1][1]:,.0f} tokens"


def _last_reasons(run: RunLog, step: int) -> tuple[str, ...]:
    last = run.event_at(step)
    if last is None:
        return ()
    return tuple(f"Step {last['step']}, {last['status']}: {reason}." for reason in last["reasons"])
