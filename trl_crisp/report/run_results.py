"""What a run measured of itself on a benchmark: the results in its directory, and whether a page's results are of the same problems."""

from pathlib import Path

from trl_crisp.evaluation.comparison import check_comparable
from trl_crisp.evaluation.results import load_results
from trl_crisp.report.run_log import RunLog
from trl_crisp.report.sources import Compared


def measured_results(run: RunLog) -> list[Path]:
    """Return the results of the base and of the run's result on a benchmark that it measured; none, if there are not both."""
    for name in run.measured_names:
        steps = [
            step
            for step, _ in run.series(f"{name}_accuracy")
            if (_directory(run, name, step) / "results.json").is_file()
        ]
        if 0 in steps and max(steps) > 0:
            step = run.best_step if run.best_step in steps and run.best_step else max(steps)
            return [_directory(run, name, 0), _directory(run, name, step)]
    return []


def measured_alike(run: RunLog, compared: Compared) -> list[tuple[float, float]]:
    """
    Return mean tokens and accuracy along a run, if they are of the page's benchmark.

    A benchmark is known by its name. If the run's first results are at hand, they have to be of the same problems and measured in the
    same way as the page's, so that the two can be compared.
    """
    base = compared.base.results
    name = f"eval_{Path(str(base['protocol'].get('benchmark'))).stem}"
    first = _directory(run, name, 0)
    if (first / "results.json").is_file():
        answers = {problem.id: problem.answer for problem in compared.base.problems.values()}
        try:
            check_comparable(load_results(first), base["protocol"], answers)
        except (ValueError, KeyError, TypeError, AttributeError):
            return []
    accuracies = dict(run.series(f"{name}_accuracy"))
    return [(length, accuracies[step]) for step, length in run.series(f"{name}_mean_tokens") if step in accuracies]


def _directory(run: RunLog, name: str, step: int) -> Path:
    return run.directory / "evaluation" / name.removeprefix("eval_") / f"step-{step}"
