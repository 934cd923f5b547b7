"""The results of a page: which is the base, which are compared with it, and the texts of their answers."""

import itertools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl_crisp.evaluation.comparison import check_comparable, compare, compare_problems, shared_budgets
from trl_crisp.evaluation.records import Change, ScoredProblem, problem_from_dict
from trl_crisp.evaluation.results import load_results
from trl_crisp.report.names import differing_parts, distinct_labels
from trl_crisp.report.result_shape import check_shape

Role = Literal["base", "concise", "trained"]

# So long names of models fill a table's column. Ours
_LONGEST_NAME = 60
# As `dataclasses.asdict` writes a sample; a line that does not begin so is read as a whole
_LINE_START = re.compile(rb'\{"problem": ("(?:[^"\\]|\\.)*"), "number": (\d+),')


@dataclass(frozen=True)
class Evaluated:
    """
    The results of one evaluation and what changed from the base.

    Attributes:
        name: What the page calls it; no two have the same.
        role: "base"; "concise", if it is the base with an instruction; else "trained".
        path: The file.
        results: As [`~trl_crisp.evaluation.results.load_results`] returns them.
        problems: The scored problems by id, in the base's order.
        comparison: The comparison with the base at the page's budget, as results.json has it; `None` for the base.
        levels: The change of each level, if the benchmark has levels.
    """

    name: str
    role: Role
    path: Path
    results: dict[str, Any]
    problems: dict[str, ScoredProblem]
    comparison: dict[str, Any] | None = None
    levels: dict[str, Change] = field(default_factory=dict)

    def summary(self, budget_tokens: int) -> dict[str, Any]:
        """Return the measures over all problems at a budget."""
        found: dict[str, Any] = self.results["summary"][str(budget_tokens)]["all"]
        return found


@dataclass(frozen=True)
class Compared:
    """
    Evaluations of the same problems.

    Attributes:
        all: The base first, then in the order given.
        budget_tokens: The largest budget that all have; the page's numbers are at it.
        budgets_tokens: All budgets that all have.
    """

    all: list[Evaluated]
    budget_tokens: int
    budgets_tokens: list[int]

    @property
    def base(self) -> Evaluated:
        """The first one."""
        return self.all[0]

    @property
    def size_in_words(self) -> str:
        """How many problems and samples there are, for each evaluation if they differ."""
        problems = len(self.base.problems)
        samples = [one.results["samples"] for one in self.all]
        text = f"{problems:,} problem{'s' * (problems != 1)} \N{MULTIPLICATION SIGN} "
        if len(set(samples)) == 1:
            return f"{text}{samples[0]} sample{'s' * (samples[0] != 1)}"
        return (
            text
            + ", ".join(f"{count} ({one.name})" for one, count in zip(self.all, samples, strict=True))
            + " samples"
        )

    @property
    def trained(self) -> list[Evaluated]:
        """Those that are neither the base nor the base told to be concise."""
        return [one for one in self.all if one.role == "trained"]


def load_compared(paths: Sequence[Path]) -> Compared:
    """
    Read results of the same problems. The first is the base.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is torn or of another kind, has no answers, or the results differ in more than the model and the
            instruction, or not even in these. The message names the difference.
    """
    loaded = [(_file_of(path), load_results(path)) for path in paths]
    for file, results in loaded:
        check_shape(results, file)
    _check_order(loaded)
    _check_distinct(loaded)
    (base_path, base), *others = loaded
    scored = [{problem["id"]: problem_from_dict(problem) for problem in results["problems"]} for _, results in loaded]
    for path, results in others:
        answers = {problem["id"]: problem["answer"] for problem in results["problems"]}
        try:
            check_comparable(base, results["protocol"], answers)
        except ValueError as error:
            raise ValueError(f"{path} cannot be compared with {base_path}: {error}") from error
    shared = set(map(int, base["summary"]))
    for _, results in others:
        shared &= set(shared_budgets(base, results))
    if not shared:
        listed = "".join(f"\n  {path}: {', '.join(results['summary'])}" for path, results in loaded)
        raise ValueError(f"the results have no budget in common. Their budgets in tokens:{listed}")
    budget = max(shared)
    base_problems = scored[0]
    names = _names(loaded)
    evaluated = [Evaluated(names[0], "base", base_path, base, base_problems)]
    for (path, results), name, found in zip(others, names[1:], scored[1:], strict=True):
        problems = {problem: found[problem] for problem in base_problems}
        comparison = compare(base, results, budget)
        role: Role = "concise" if _is_told_base(base, results) else "trained"
        levels = _compare_levels(base_problems, problems, budget)
        evaluated.append(Evaluated(name, role, path, results, problems, comparison, levels))
    return Compared(evaluated, budget, sorted(shared))


def _file_of(path: Path) -> Path:
    return path / "results.json" if path.is_dir() else path


def _check_distinct(loaded: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Refuse two results of one model with one prompt: what one of them would be called, such as trained, would be wrong."""
    for (first_path, first), (path, other) in itertools.combinations(loaded, 2):
        is_same_file = first_path.resolve() == path.resolve()
        said, told = (results["protocol"].get("instruction") or "" for results in (first, other))
        is_same_model = _weights(first) == _weights(other)
        if first["protocol"].get("step"):
            # Two runs from one base have the same name at the same step, and their weights are not known
            is_same_model = is_same_model and first["problems"] == other["problems"]
        if is_same_file or (is_same_model and said == told):
            raise ValueError(
                f"{first_path} and {path} are {'one file' if is_same_file else 'results of the same weights with the same prompt'}, so there is "
                "no change to show between them: give the base once, and each model once. More --samples show the noise of sampling."
            )


def _weights(results: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells the weights of a result from others."""
    protocol = results["protocol"]
    weights = (protocol.get("model_revision"), protocol.get("weights_sha256"))
    return weights if any(one is not None for one in weights) else (protocol.get("model"), protocol.get("step"))


def _is_told_base(base: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the other is the base with an instruction that the base did not have."""
    said, told = (results["protocol"].get("instruction", "") for results in (base, other))
    return _weights(base) == _weights(other) and bool(told) and told != said


def _check_order(loaded: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Refuse a first result that is known not to be the base: a reversed verdict would recommend the wrong model."""
    first_path, first = loaded[0]
    for path, other in loaded[1:]:
        if first["protocol"].get("instruction") and _is_told_base(other, first):
            raise ValueError(
                f"{first_path} is the model of {path} told to be concise, so it is not the base: give {path} first."
            )
        for budget, comparison in first.get("comparison", {}).items():
            reduction = comparison.get("reduction")
            if reduction is None or budget not in other["summary"]:
                continue
            lengths = [results["summary"][budget]["all"]["mean_tokens"] for results in (other, first)]
            if lengths[0] and abs(1 - lengths[1] / lengths[0] - reduction["estimate"]) < 1e-9:
                raise ValueError(f"{first_path} was itself compared with {path}, its baseline: give {path} first.")


def _names(loaded: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    (_, base), *others = loaded
    short_names = _short_names([path for path, _ in others])
    told = [path for path, results in others if _is_told_base(base, results)]
    names = ["base"]
    for (path, results), short_name in zip(others, short_names, strict=True):
        is_told = path in told
        name = "told to be concise" if is_told else "CRISP"
        if (is_told and len(told) > 1) or (not is_told and len(others) - len(told) > 1):
            name = f"{name}, {short_name}"
        elif not is_told and results["protocol"].get("instruction"):
            name = f"{name}, told to be concise"
        names.append(name)
    return names


def _short_names(files: Sequence[Path]) -> list[str]:
    if len(files) < 2:
        return [""] * len(files)
    places = [file.absolute().parent if file.name == "results.json" else file.with_suffix("") for file in files]
    # A directory and a file beside it may have one name
    are_distinct = len(set(places)) == len(files)
    return distinct_labels(differing_parts(places if are_distinct else files), _LONGEST_NAME)


def _compare_levels(
    before: dict[str, ScoredProblem], after: dict[str, ScoredProblem], budget_tokens: int
) -> dict[str, Change]:
    by_level: dict[str, list[str]] = {}
    for problem in before.values():
        if problem.level is not None:
            by_level.setdefault(problem.level, []).append(problem.id)
    return {
        level: compare_problems(
            [before[name] for name in by_level[level]], [after[name] for name in by_level[level]], budget_tokens
        ).all
        for level in sorted(by_level)
    }


@dataclass(frozen=True)
class Texts:
    """
    The texts of some answers.

    Attributes:
        by_sample: By the problem's id and the sample's number.
        note: Why texts are missing, in words, or `None`.
    """

    by_sample: dict[tuple[str, int], str]
    note: str | None = None


def load_texts(evaluated: Evaluated, wanted: Collection[tuple[str, int]]) -> Texts:
    """
    Read the texts of some answers from the samples.jsonl beside the results.

    Args:
        evaluated: Its `path` tells the directory.
        wanted: The problem's id and the sample's number of each. Other lines are not parsed, because they hold long lists of tokens.

    Raises:
        ValueError: If the file has samples of another evaluation, or a line does not hold a sample.
    """
    path = evaluated.path.with_name("samples.jsonl")
    if evaluated.path.name != "results.json" or not path.is_file():
        return Texts({}, f"The texts are not shown: {path} is not there.")
    found: dict[tuple[str, int], str] = {}
    with path.open("rb") as file:
        first = file.readline()
        _check_protocol(first, path, evaluated)
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):
                # The process was killed while it wrote this line
                break
            try:
                start = _LINE_START.match(line)
                if start is not None and (json.loads(start[1]), int(start[2])) not in wanted:
                    continue
                sample = json.loads(line)
                key, text = (sample["problem"], sample["number"]), sample["text"]
                if not isinstance(text, str):
                    raise ValueError(f"text is a {type(text).__name__}")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: this line does not hold a sample ({type(error).__name__}: {error}). Remove the line and run the same "
                    "`trl-crisp eval` command again."
                ) from error
            if key in wanted:
                found[key] = text
    lacking = len(set(wanted)) - len(found)
    return Texts(found, f"{path} lacks {lacking} of the answers that would be shown." if lacking else None)


def _check_protocol(line: bytes, path: Path, evaluated: Evaluated) -> None:
    try:
        protocol = json.loads(line)["protocol"]
        differing = [key for key in protocol if protocol[key] != evaluated.results["protocol"].get(key)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line 1: it holds no protocol ({type(error).__name__}: {error}), so nothing tells whose answers these are. Evaluate "
            "again in another directory, or move the file away."
        ) from error
    if differing:
        listed = "".join(
            f"\n  {key}: {protocol[key]!r} there, {evaluated.results['protocol'].get(key)!r} in {evaluated.path.name}"
            for key in differing
        )
        raise ValueError(f"{path} has answers of another evaluation:{listed}\nMove the file away, or evaluate again.")
