"""The page of a run or of several: results in, one file out, as HTML that needs no network, and as Markdown."""

import base64
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from trl_crisp import __version__
from trl_crisp.evaluation.records import ScoredProblem
from trl_crisp.report import charts
from trl_crisp.report.embedding import clip, embed
from trl_crisp.report.names import differing_parts
from trl_crisp.report.rendering import make_environment
from trl_crisp.report.run_log import RunLog, load_run
from trl_crisp.report.run_results import measured_alike, measured_results
from trl_crisp.report.run_verdict import judge_run
from trl_crisp.report.sources import Compared, Evaluated, Texts, load_compared, load_texts
from trl_crisp.report.traces import KINDS, MOST_IN_FULL, Pair, choose_pairs
from trl_crisp.report.verdict import Measured, Verdict, judge

# Ours: a page opens fast and can be sent
MOST_BYTES = 5_000_000
# Ours: all texts together, as the page has them
TEXT_BYTES = 2_500_000
# A page that is too large gets this share of the texts, of the rows and of the log entries, then the next one
_SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)
# Ours: so many rows stay quick to filter
MOST_ROWS = 2_000
# Below this share the embedded JSON has no numbers of each problem
_SMALLEST_WITH_PROBLEMS = 0.25
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
    compared, logs = load_compared(results) if results else None, _load_runs(runs)
    page = _make_page(compared, logs)
    output.parent.mkdir(parents=True, exist_ok=True)
    markdown = output.with_suffix(".md")
    markdown.write_text(_render("report.md.j2", page, is_html=False), encoding="utf-8", errors="replace")
    if output.suffix == ".md":
        return [markdown]
    output.write_bytes(_render_small(page, compared, logs))
    return [output, markdown]


def _render_small(page: Mapping[str, Any], compared: Compared | None, runs: Sequence[RunLog]) -> bytes:
    """Return the HTML, with as many texts, rows and log entries as fit into a page that is not too large."""
    loaded = None if compared is None else _load_traces(compared)
    encoded = b""
    for share in _SHARES:
        traces = {} if compared is None or loaded is None else _show_traces(compared, loaded, share)
        data = embed(_data(compared, runs, page["judged"], share))
        text = _render(
            "report.html.j2",
            {
                **page,
                **traces,
                "data": data,
                "share": share,
                "most_bytes": MOST_BYTES,
                "data_has_problems": share >= _SMALLEST_WITH_PROBLEMS,
            },
            is_html=True,
        )
        encoded = text.encode("utf-8", "replace")
        if len(encoded) < MOST_BYTES:
            break
    return encoded


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
    return page


def judge_results(compared: Compared, runs: Sequence[RunLog]) -> list[Judged]:
    """Return the verdict on each trained model, against the base."""
    others = compared.trained or compared.all[1:]
    if not others:
        return [Judged(compared.base.name, judge(None))]
    return [
        Judged(one.name, judge(_measure(compared, one), unhealthy=_unhealthy(one, compared, runs)), one)
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


def _unhealthy(one: Evaluated, compared: Compared, runs: Sequence[RunLog]) -> str | None:
    """
    Return a sentence if the signals of a run that a result's model may come from were unhealthy at the model's step.

    These are the runs that have the model or the result in their directory. If there is none (the model was moved, merged or loaded from
    the Hub), they are the runs that no other result is of.
    """
    of_run = [run for run in runs if _is_of(one, run)]
    if not of_run and one.role == "trained":
        of_run = [run for run in runs if not any(_is_of(other, run) for other in compared.trained)]
    told = (run.describe_unhealthy(_step_of(one, run)) for run in of_run)
    return next((sentence for sentence in told if sentence is not None), None)


def _step_of(one: Evaluated, run: RunLog) -> int:
    """Return the step of a result's model: as it was measured, by its checkpoint's name, or else that of the model that the run saved."""
    protocol = one.results["protocol"]
    prefix, _, number = Path(str(protocol.get("model"))).name.rpartition("-")
    if "step" in protocol:
        return int(protocol["step"])
    if prefix == "checkpoint" and number.isdigit():
        return int(number)
    return run.last_step if run.saved_step is None else run.saved_step


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


@dataclass(frozen=True)
class _Loaded:
    """The pairs of each model by its name: all of them, and those in full, with their texts."""

    pairs: dict[str, list[Pair]]
    full: dict[str, list[Pair]]
    base_texts: Texts
    texts: dict[str, Texts]

    @property
    def notes(self) -> list[str]:
        """Why texts are missing."""
        return list(dict.fromkeys(one.note for one in (self.base_texts, *self.texts.values()) if one.note is not None))


def _load_traces(compared: Compared) -> _Loaded | None:
    others = compared.trained or compared.all[1:]
    if not others:
        return None
    most = max(1, MOST_IN_FULL // len(others))
    pairs = {
        one.name: choose_pairs(compared.base.problems, one.problems, compared.budget_tokens, most) for one in others
    }
    full = {name: sorted((p for p in found if p.number is not None), key=_number) for name, found in pairs.items()}
    base_texts = load_texts(compared.base, {(p.id, p.before.shown_sample) for found in full.values() for p in found})
    texts = {one.name: load_texts(one, {(p.id, p.after.shown_sample) for p in full[one.name]}) for one in others}
    if not any(one.by_sample for one in (base_texts, *texts.values())):
        full = {name: [] for name in full}
    return _Loaded(pairs, full, base_texts, texts)


def _show_traces(compared: Compared, loaded: _Loaded, share: float) -> dict[str, Any]:
    """Return what the page shows of the problems, with a share of the bytes of texts and of the rows."""
    shown: list[_Shown] = []
    rows: list[dict[str, Any]] = []
    full = loaded.full if share else {name: [] for name in loaded.full}
    most_bytes = int(share * TEXT_BYTES) // max(1, 3 * sum(map(len, full.values())))
    most_rows = int(share * MOST_ROWS) // len(loaded.pairs)
    for run_number, (name, pairs) in enumerate(loaded.pairs.items()):
        for pair in full[name]:
            problem = compared.base.problems[pair.id]
            sides = (
                loaded.base_texts.by_sample.get((pair.id, pair.before.shown_sample)),
                loaded.texts[name].by_sample.get((pair.id, pair.after.shown_sample)),
            )
            before, after = (None if text is None else clip(text, most_bytes) for text in sides)
            prompt = None if problem.prompt is None else clip(_prompt_text(problem.prompt), most_bytes)
            anchor = f"trace-{run_number}-{pair.number}"
            shown.append(_Shown(pair, anchor, name, prompt, _answer_text(problem), before, after))
        in_full = {pair.id for pair in full[name]}
        rows += [
            {
                "pair": pair,
                "after_name": name,
                "anchor": f"trace-{run_number}-{pair.number}" if pair.id in in_full else None,
            }
            for pair in pairs[:most_rows]
        ]
    left_out = sum(map(len, loaded.pairs.values())) - len(rows)
    return {"shown": shown, "rows": rows, "rows_left_out": left_out, "notes": loaded.notes}


def _number(pair: Pair) -> int:
    assert pair.number is not None
    return pair.number


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def _answer_text(problem: ScoredProblem) -> str:
    return clip(problem.answer if isinstance(problem.answer, str) else " or ".join(problem.answer), 2_000)


def _data(compared: Compared | None, runs: Sequence[RunLog], judged: Sequence[Judged], share: float) -> dict[str, Any]:
    """
    Return the numbers of the page. Summaries and comparisons are as results.json has them.

    `share` is the share of the log entries. The numbers of each problem and of each level are there or, in the smallest pages, `None`.
    """
    has_problems = share >= _SMALLEST_WITH_PROBLEMS
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
                    for entry in _thin(run.log_history, share)
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
                "comparison_by_level": {level: asdict(change) for level, change in one.levels.items()}
                if has_problems
                else None,
                # By columns, which are much smaller: [problems] and [problems, samples]
                "problems": {
                    "id": [problem.id for problem in problems],
                    "level": [problem.level for problem in problems],
                    "tokens": [[sample.tokens for sample in problem.samples] for problem in problems],
                    "correct": [
                        [int(sample.at_budget[compared.budget_tokens].grade.correct) for sample in problem.samples]
                        for problem in problems
                    ],
                }
                if has_problems
                else None,
            }
        )
    return data


def _thin(log_history: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Return a share of a log's entries at equal distances, and in any case what was measured and the last entry."""
    every = len(log_history) if not share else round(1 / share)
    return [
        entry
        for number, entry in enumerate(reversed(log_history))
        if number % every == 0 or any(key.startswith("eval_") for key in entry)
    ][::-1]


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
