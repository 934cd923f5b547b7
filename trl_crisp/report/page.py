"""The page of a run or of several: results in, one file out, as HTML that needs no network, and as Markdown."""

import base64
import hashlib
import html
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from trl_crisp import __version__
from trl_crisp.evaluation.records import ScoredProblem
from trl_crisp.report import charts
from trl_crisp.report.names import differing_parts
from trl_crisp.report.rendering import make_environment
from trl_crisp.report.run_log import RunLog, load_run
from trl_crisp.report.run_results import measured_alike, measured_results
from trl_crisp.report.run_verdict import judge_run
from trl_crisp.report.sources import Compared, Evaluated, load_compared, load_texts
from trl_crisp.report.traces import KINDS, MOST_IN_FULL, Pair, choose_pairs
from trl_crisp.report.verdict import Measured, Verdict, judge

# Ours: all texts together, as the page has them, so that a page of 500 problems stays below 5 MB
TEXT_BYTES = 2_500_000
# Of a text that is too long the end is shown too, because it has the answer
_HEAD_SHARE = 2 / 3
# Ours: so many rows stay quick to filter; the embedded JSON has all problems
MOST_ROWS = 2_000
# The logged names that the embedded JSON keeps
_KEPT_LOGS = (
    "step",
    "loss",
    "reverse_kl",
    "entropy",
    "teacher_entropy",
    "topk_overlap",
    "completions/mean_length",
    "completions/p95_length",
    "completions/clipped_ratio",
    "completions/repeats",
    "completions/empty",
    "health/status",
    "teacher/refreshes",
    "teacher/postponed",
)


def write_report(results: Sequence[Path], output: Path, runs: Sequence[Path] = ()) -> list[Path]:
    """
    Write the page of some results and runs.

    Args:
        results: Results of `trl-crisp eval` on the same problems, files or directories; the base first. May be empty if there is a run.
        output: The file. `.html` writes the page, and the same as Markdown beside it; `.md` writes Markdown alone.
        runs: The output_dirs of trainings; their logs are drawn.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: If a file or a log is not there.
        ValueError: If there is nothing to show, a file is torn, or the results cannot be compared.
        ImportError: If matplotlib or jinja2 is not installed.
    """
    if output.suffix not in (".html", ".md"):
        raise ValueError(f"--output {output}: the name has to end in .html or .md.")
    if not results and not runs:
        raise ValueError(
            "there is nothing to show: give results of `trl-crisp eval`, the base first, or --run OUTPUT_DIR."
        )
    _require_libraries()
    page = _make_page(load_compared(results) if results else None, _load_runs(runs))
    output.parent.mkdir(parents=True, exist_ok=True)
    markdown = output.with_suffix(".md")
    markdown.write_text(_render("report.md.j2", page, is_html=False), encoding="utf-8", errors="replace")
    if output.suffix == ".md":
        return [markdown]
    output.write_text(_render("report.html.j2", page, is_html=True), encoding="utf-8", errors="replace")
    return [output, markdown]


def write_run_page(output_dir: Path) -> Path:
    """
    Write output_dir/report.html (and report.md), the page of a training, and return the path.

    Where the run measured a benchmark, the page compares the base with the best checkpoint or, if there is none, with the last measured
    step. Otherwise it shows the log alone.

    Raises:
        FileNotFoundError, ValueError, ImportError: See [`write_report`].
    """
    run = load_run(output_dir)
    path, _ = write_report(measured_results(run), output_dir / "report.html", [output_dir])
    return path


def _load_runs(paths: Sequence[Path]) -> list[RunLog]:
    """Read some runs; several are named by the parts of their paths that differ."""
    folders = [path.parent if path.is_file() else path for path in paths]
    for one, other in itertools.combinations(folders, 2):
        if one.resolve() == other.resolve():
            raise ValueError(f"--run {one} and --run {other} are one run: give it once.")
    runs = [load_run(path) for path in paths]
    names = differing_parts(folders) if len(runs) > 1 else [run.name for run in runs]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _require_libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'A report needs {error.name}, which is not installed: pip install "trl-crisp[report]".'
        ) from error


@dataclass(frozen=True)
class Judged:
    """A verdict and whom it is on."""

    name: str
    verdict: Verdict
    result: Evaluated | None = None


@dataclass(frozen=True)
class _Shown:
    """A problem in full: a pair, whose it is, and the texts."""

    pair: Pair
    anchor: str
    after_name: str
    prompt: str | None
    answer: str
    before_text: str | None
    after_text: str | None


def _make_page(compared: Compared | None, runs: Sequence[RunLog]) -> dict[str, Any]:
    """Return all that the templates show."""
    judged = (
        judge_results(compared, runs) if compared is not None else [Judged(run.name, judge_run(run)) for run in runs]
    )
    page: dict[str, Any] = {
        "version": __version__,
        "judged": judged,
        "compared": compared,
        "runs": runs,
        "curves": charts.training_curves(runs),
        "marks": charts.marks_of(runs[0]) if len(runs) == 1 else {},
        "figures": [],
        "share_names": {},
        "shown": [],
        "rows": [],
        "rows_left_out": 0,
        "notes": [],
        "kinds": KINDS,
        "run_colours": charts.RUN_COLOURS,
    }
    if compared is not None:
        protocol = compared.base.results["protocol"]
        summaries = [one.summary(compared.budget_tokens) for one in compared.all]
        # A share is shown if all have it
        summary = min(summaries, key=lambda one: "anywhere_accuracy" in one)
        page["share_names"] = charts.share_names(summary, str(protocol.get("kind")))
        page["figures"] = _figures(compared, runs, page["share_names"])
        page.update(_choose_traces(compared))
    page["data"] = embed(_data(compared, runs, judged))
    return page


def judge_results(compared: Compared, runs: Sequence[RunLog]) -> list[Judged]:
    """Return the verdict on each trained model, against the base."""
    others = compared.trained or compared.all[1:]
    if not others:
        return [Judged(compared.base.name, judge(None))]
    return [
        Judged(one.name, judge(_measure(compared, one), unhealthy_run=_unhealthy_run(one, compared, runs)), one)
        for one in others
    ]


def _measure(compared: Compared, one: Evaluated) -> Measured:
    comparison = one.comparison
    assert comparison is not None
    before, after = compared.base.summary(compared.budget_tokens), one.summary(compared.budget_tokens)
    groups: dict[str, Any] = {
        f"the problems that the base solves {name} of the time": change["accuracy_change"]
        for name, change in comparison["by_pass_rate"].items()
    }
    for level, change in one.levels.items():
        accuracy = change.changes["accuracy"]
        groups[f"level {level}"] = None if accuracy is None else asdict(accuracy)
    unread = comparison["unread_before"], comparison["unread_after"]
    return Measured(
        reduction=comparison["reduction"],
        accuracy=comparison["accuracy_change"],
        unread=comparison["unread_change"],
        unread_shares=None if None in unread else unread,
        cut_shares=(before["truncated"], after["truncated"]),
        repeats_shares=(before["repeats"], after["repeats"]),
        groups=groups,
        base_level=before["accuracy"],
        problems=comparison["problems"],
    )


def _unhealthy_run(one: Evaluated, compared: Compared, runs: Sequence[RunLog]) -> str | None:
    """
    Return the name of a run that a result's model may come from, if its signals were unhealthy at its end.

    These are the runs that have the model or the result in their directory. If there is none (the model was moved, merged or loaded from
    the Hub), they are the runs that no other result is of.
    """
    of_run = [run for run in runs if _is_of(one, run)]
    if not of_run and one.role == "trained":
        of_run = [run for run in runs if not any(_is_of(other, run) for other in compared.trained)]
    return next((run.name for run in of_run if run.is_unhealthy), None)


def _is_of(one: Evaluated, run: RunLog) -> bool:
    """Whether a result or its model is in a run's directory, or may be: a relative path was read from a directory that is not recorded."""
    protocol, directory = one.results["protocol"], run.directory.resolve()
    if one.path.resolve().is_relative_to(directory):
        return True
    if protocol.get("model_revision") is not None:
        return False
    # The name may be any text, and no path has a NUL
    model = Path(str(protocol.get("model")).replace("\0", ""))
    if model.resolve().is_relative_to(directory):
        return True
    names = () if model.is_absolute() else tuple(part for part in model.parts if part != "..")
    endings = {
        place.parts[-count:] for place in (directory, run.directory.absolute()) for count in range(1, len(names) + 1)
    }
    return any(names[:count] in endings for count in range(1, len(names) + 1))


def _figures(compared: Compared, runs: Sequence[RunLog], share_names: Mapping[str, str]) -> list[charts.Figure]:
    figures: list[charts.Figure | None] = [
        charts.accuracy_against_length(compared, measured_alike(runs[0], compared) if len(runs) == 1 else ()),
        charts.length_distributions(compared),
    ]
    several = len(compared.trained) > 1
    for number, one in enumerate(compared.trained or compared.all[1:]):
        of = f", {one.name}" if several else ""
        assert one.comparison is not None
        figures += [
            charts.changes_by_group(
                f"levels-{number}",
                f"Change by level{of}",
                one.levels,
                "Groups of problems as the benchmark names them.",
            ),
            charts.changes_by_group(
                f"pass-rates-{number}",
                f"Change by the base's pass rate{of}",
                one.comparison["by_pass_rate"],
                "From problems that the base seldom solves to those that it always solves. One half of the base's samples chooses the group, "
                "the other is measured.",
            ),
        ]
    figures += [charts.answer_formats(compared, share_names), charts.accuracy_at_budgets(compared)]
    return [figure for figure in figures if figure is not None]


def _choose_traces(compared: Compared) -> dict[str, Any]:
    others = compared.trained or compared.all[1:]
    if not others:
        return {}
    shown: list[_Shown] = []
    rows: list[dict[str, Any]] = []
    pairs_of = {
        one.name: choose_pairs(
            compared.base.problems, one.problems, compared.budget_tokens, max(1, MOST_IN_FULL // len(others))
        )
        for one in others
    }
    full = {name: sorted((p for p in pairs if p.number is not None), key=_number) for name, pairs in pairs_of.items()}
    base_texts = load_texts(compared.base, {(p.id, p.before.shown_sample) for pairs in full.values() for p in pairs})
    texts_of = {one.name: load_texts(one, {(p.id, p.after.shown_sample) for p in full[one.name]}) for one in others}
    loaded = (base_texts, *texts_of.values())
    notes = list(dict.fromkeys(one.note for one in loaded if one.note is not None))
    if not any(one.by_sample for one in loaded):
        full = {name: [] for name in full}
    most_bytes = TEXT_BYTES // max(1, 3 * sum(map(len, full.values())))
    for run_number, one in enumerate(others):
        for pair in full[one.name]:
            problem = compared.base.problems[pair.id]
            sides = (
                base_texts.by_sample.get((pair.id, pair.before.shown_sample)),
                texts_of[one.name].by_sample.get((pair.id, pair.after.shown_sample)),
            )
            before, after = (None if text is None else clip(text, most_bytes) for text in sides)
            prompt = None if problem.prompt is None else clip(_prompt_text(problem.prompt), most_bytes)
            anchor = f"trace-{run_number}-{pair.number}"
            shown.append(_Shown(pair, anchor, one.name, prompt, _answer_text(problem), before, after))
        rows += [
            {
                "pair": pair,
                "after_name": one.name,
                "anchor": f"trace-{run_number}-{pair.number}" if pair in full[one.name] else None,
            }
            for pair in pairs_of[one.name][: MOST_ROWS // len(others)]
        ]
    left_out = len(others) * len(compared.base.problems) - len(rows)
    return {"shown": shown, "rows": rows, "rows_left_out": left_out, "notes": notes}


def _number(pair: Pair) -> int:
    assert pair.number is not None
    return pair.number


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def _answer_text(problem: ScoredProblem) -> str:
    return clip(problem.answer if isinstance(problem.answer, str) else " or ".join(problem.answer), 2_000)


def clip(text: str, most_bytes: int) -> str:
    """Return a text that takes at most about `most_bytes` in a page; of a longer one the start and the end, with a note between."""
    size = len(html.escape(text).encode("utf-8", "replace"))
    if size <= most_bytes:
        return text
    kept = int(len(text) * most_bytes / size)
    head = int(kept * _HEAD_SHARE)
    tail = kept - head
    return f"{text[:head]}\n\n[… {len(text) - kept:,} of {len(text):,} characters are left out; samples.jsonl has them …]\n\n{text[-tail:]}"


def _data(compared: Compared | None, runs: Sequence[RunLog], judged: Sequence[Judged]) -> dict[str, Any]:
    """Return the numbers of the page. Summaries and comparisons are as results.json has them."""
    data: dict[str, Any] = {
        "schema": "trl-crisp report",
        "schema_version": 1,
        "trl_crisp": __version__,
        "verdicts": [{"name": one.name, **asdict(one.verdict)} for one in judged],
        "results": [],
        "runs": [
            {
                "name": run.name,
                "last_step": run.last_step,
                "max_steps": run.max_steps,
                "best_step": run.best_step,
                "refreshes": run.refreshes,
                "postponed": run.postponed,
                "events": run.events,
                "log_history": [
                    {key: value for key, value in entry.items() if key in _KEPT_LOGS or key.startswith("eval_")}
                    for entry in run.log_history
                ],
            }
            for run in runs
        ],
    }
    if compared is None:
        return data
    data["budget_tokens"] = compared.budget_tokens
    for one in compared.all:
        problems = one.problems.values()
        data["results"].append(
            {
                "name": one.name,
                "role": one.role,
                "path": str(one.path),
                "protocol": one.results["protocol"],
                "samples": one.results["samples"],
                "summary": one.results["summary"],
                "comparison": {} if one.comparison is None else {str(compared.budget_tokens): one.comparison},
                "comparison_by_level": {level: asdict(change) for level, change in one.levels.items()},
                # By columns, which are much smaller: [problems] and [problems, samples]
                "problems": {
                    "id": [problem.id for problem in problems],
                    "level": [problem.level for problem in problems],
                    "tokens": [[sample.tokens for sample in problem.samples] for problem in problems],
                    "correct": [
                        [int(sample.at_budget[compared.budget_tokens].grade.correct) for sample in problem.samples]
                        for problem in problems
                    ],
                },
            }
        )
    return data


def embed(value: Any) -> str:
    """Return a value as JSON that is inert inside a `<script>` element: ASCII, without `<`, `>` and `&`. NaN becomes null."""
    text = json.dumps(_without_nonfinite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return value


def _render(template: str, page: Mapping[str, Any], is_html: bool) -> str:
    from markupsafe import Markup

    # `inert` is for what this package made itself: drawn figures, embedded JSON
    environment = make_environment(is_html, intervals_small=_intervals_small, inert=Markup)
    folder = resources.files("trl_crisp.report") / "templates"
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    style = (folder / "style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(page, script=script, script_sha256=digest, style=style)


def _intervals_small(headline: str) -> Any:
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(\[[^\]]*\])", r'<span class="interval">\1</span>', str(escape(headline))))
