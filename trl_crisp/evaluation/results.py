"""What an evaluation leaves on disk: samples as they finish, one line each, and one JSON file with protocol and numbers.

`samples.jsonl`: a first line with the protocol that the samples depend on, then a line a sample ([`Sample`]). It is only appended
to, so a run that was interrupted goes on with what is missing; a last line that was cut off is dropped.

`results.json` (schema version 1):

- `schema`, `schema_version`
- `protocol`: the model and its weights, the problems and their revision, the sampling, the grader, the versions of the libraries
- `first_prompt`: as the model reads it, special tokens included
- `problems`: id, level, the right answer, and each sample's measures (tokens, thinking and answer tokens, how it ended, the grades at
  each budget)
- `summary`: by budget in tokens, for `all` problems and for each level: see [`summarize`]
- `comparison`, with a baseline: by each budget of both, see [`compare`]
- `wall_s`, `tokens_per_s`: of the sampling that this call did, 0 where all was there
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_crisp.evaluation.metrics import (
    Interval,
    paired_bootstrap_difference,
    paired_bootstrap_reduction,
    pass_at_k,
    share,
)
from trl_crisp.run.files import write_json

SCHEMA = "trl-crisp evaluation"
SCHEMA_VERSION = 1
# What has to be the same in two results for their difference to be one of the models, or of the instruction
_COMPARED = (
    "benchmark_revision",
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "chat_template_kwargs",
    "prompt_template",
    "system",
    "kind",
    "grader",
)
# The shares of right answers in a summary, and the flag of a grade that each counts; the last one only texts have
FLAGS = {
    "accuracy": "correct",
    "answer_accuracy": "answer_correct",
    "boxed_accuracy": "boxed_correct",
    "anywhere_accuracy": "anywhere_correct",
}
# Ours: of the base's pass rate, for the table of what happens to problems that it finds hard and easy
PASS_RATE_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sample:
    """
    One sampled answer.

    Attributes:
        problem: The problem's id.
        number: Which of the problem's samples, from 0.
        text: The answer, with special tokens that are part of it (such as `<think>`), without the one that ended it.
        token_ids: As sampled, the ending token included.
        thinking_tokens: How many of them are thinking, 0 where the model does not think.
        ended_by_eos: Not cut at the cap.
        prompt_sha256: Of the prompt's token ids.
    """

    problem: str
    number: int
    text: str
    token_ids: list[int]
    thinking_tokens: int
    ended_by_eos: bool
    prompt_sha256: str


# Python's names of the types that JSON has
_SAMPLE_TYPES = {
    "problem": str,
    "number": int,
    "text": str,
    "token_ids": list,
    "thinking_tokens": int,
    "ended_by_eos": bool,
    "prompt_sha256": str,
}


class SampleFile:
    """
    The samples of a run, on disk as they finish.

    Args:
        path: The file; made with its directory where it is not there.
        protocol: What the samples depend on. A file of another protocol is refused.

    Raises:
        ValueError: For a file of another protocol, naming what differs; for a line that is no sample, naming it; and where nothing
            tells whether the weights are the same.
    """

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self.path = path
        self.samples: dict[tuple[str, int], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if lines and not lines[-1].endswith(b"\n"):
            # Cut off when the process was killed
            with path.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
            lines = lines[:-1]
        if not lines:
            path.write_text(json.dumps({"protocol": protocol}) + "\n", encoding="utf-8")
            return
        before = _read_protocol(lines[0], path)
        now = json.loads(json.dumps(protocol))
        if differing := [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]:
            listed = "".join(
                f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in sorted(differing)
            )
            raise ValueError(f"{path} has samples of another run:{listed}\nGive another --output, or remove the file.")
        if "model" in now and not (now.get("model_revision") or now.get("weights_sha256")):
            raise ValueError(
                f"{path} has samples, and neither a commit nor a digest tells whether the weights of {now['model']!r} are still those "
                "that they came from. Give another --output, or remove the file."
            )
        for number, line in enumerate(lines[1:], start=2):
            sample = _read_sample(line, path, number)
            self.samples[sample.problem, sample.number] = sample

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
        self.samples[sample.problem, sample.number] = sample


def _read_protocol(line: bytes, path: Path) -> dict[str, Any]:
    try:
        protocol = json.loads(line.decode("utf-8"))["protocol"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line 1: it holds no protocol ({type(error).__name__}: {error}), so nothing tells what the samples came from. Give "
            "another --output, or remove the file."
        ) from error
    if not isinstance(protocol, dict):
        raise ValueError(f"{path}, line 1: the protocol is a {type(protocol).__name__}. Give another --output.")
    return protocol


def _read_sample(line: bytes, path: Path, number: int) -> Sample:
    try:
        values = json.loads(line.decode("utf-8").rstrip())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        sample = Sample(**values)
        for name, kind in _SAMPLE_TYPES.items():
            # true is no number
            if type(value := getattr(sample, name)) is not kind:
                raise ValueError(f"{name} is a {type(value).__name__}")
        if other := [value for value in sample.token_ids if type(value) is not int]:
            raise ValueError(f"token_ids has {other[0]!r}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: it is no sample ({error}). Remove the line, and the same command samples that answer again."
        ) from error
    return sample


def summarize(problems: Sequence[dict[str, Any]], budget_tokens: int, k: int) -> dict[str, Any]:
    """
    Return the measures of some problems at a budget.

    Args:
        problems: As in the file: each with `samples`.
        budget_tokens: Answers that are longer count at this length, and by what they say up to there.
        k: The samples of each problem.

    Returns:
        `problems`, `samples`; `accuracy` (mean@k, dual), `answer_accuracy`, `boxed_accuracy`, of texts `anywhere_accuracy`, `pass_at` (pass@1, 2, 4 ... k, unbiased);
        of the tokens
        `mean_tokens`, `median_tokens`, `p90_tokens`, `p99_tokens`, `mean_thinking_tokens`, `mean_answer_tokens`; the shares
        `truncated`, `compresses` (the last 10,000 characters more than 10x), `repeats` (that, or it ends in a loop), `unparseable`, `not_graded` (a time-out or an error); `epistemic_words_per_1000_tokens`.
    """
    key = str(budget_tokens)
    samples = [sample for problem in problems for sample in problem["samples"]]
    grades = [sample["grades"][key] for sample in samples]
    tokens = np.array([min(sample["tokens"], budget_tokens) for sample in samples], dtype=float)
    thinking = np.array([min(sample["thinking_tokens"], budget_tokens) for sample in samples], dtype=float)
    correct = [[sample["grades"][key]["correct"] for sample in problem["samples"]] for problem in problems]
    words = sum(grade["epistemic_words"] for grade in grades)
    return {
        "problems": len(problems),
        "samples": len(samples),
        **{name: share([grade[flag] for grade in grades]) for name, flag in FLAGS.items() if flag in grades[0]},
        "accuracy": pass_at_k(correct, 1),
        "pass_at": {str(tried): pass_at_k(correct, tried) for tried in _powers_of_two(k)},
        "mean_tokens": float(tokens.mean()),
        "median_tokens": float(np.median(tokens)),
        "p90_tokens": float(np.quantile(tokens, 0.9)),
        "p99_tokens": float(np.quantile(tokens, 0.99)),
        "mean_thinking_tokens": float(thinking.mean()),
        "mean_answer_tokens": float((tokens - thinking).mean()),
        "truncated": share([not s["ended_by_eos"] or s["tokens"] > budget_tokens for s in samples]),
        "compresses": share([grade["compresses"] for grade in grades]),
        "repeats": share([grade["repeats"] for grade in grades]),
        "unparseable": share([grade["status"] == "unparseable" for grade in grades]),
        "not_graded": share([grade["status"] in ("timeout", "error") for grade in grades]),
        "epistemic_words_per_1000_tokens": 1000 * words / max(float(tokens.sum()), 1.0),
    }


def _powers_of_two(k: int) -> list[int]:
    return sorted({*(2**i for i in range(k.bit_length()) if 2**i <= k), k})


def summaries(problems: Sequence[dict[str, Any]], budgets_tokens: Sequence[int], k: int) -> dict[str, Any]:
    """Return [`summarize`] by budget, for `all` problems and for each level."""
    levels = sorted({problem["level"] for problem in problems if problem["level"] is not None})
    return {
        str(budget): {
            "all": summarize(problems, budget, k),
            **{
                f"level {level}": summarize([p for p in problems if p["level"] == level], budget, k)
                for level in levels
            },
        }
        for budget in budgets_tokens
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a results file at once."""
    write_json(path, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **results})


def load_results(path: str | Path) -> dict[str, Any]:
    """
    Read a results file, or the one in a directory.

    Raises:
        FileNotFoundError: Where there is none.
        ValueError: For a file of another kind, or of a schema that this version does not read.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. `trl-crisp eval --output DIRECTORY` writes one.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON: {error}. `trl-crisp eval` writes results.json whole; write it again."
        ) from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} is no result of trl-crisp eval: its schema is {schema!r}, not {SCHEMA!r}.")
    if (version := results.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, and this trl-crisp reads {SCHEMA_VERSION}. Read it with the "
            "trl-crisp that is in its protocol's versions, or evaluate again."
        )
    return results


def check_comparable(base: dict[str, Any], protocol: dict[str, Any], answers: dict[str, str | list[str]]) -> None:
    """
    Raise `ValueError` where results and another evaluation differ in more than the model and the instruction.

    Args:
        base: The baseline's results.
        protocol: The other's.
        answers: The other's right answers by the problem's id.
    """
    before = json.loads(json.dumps(base["protocol"]))
    now = json.loads(json.dumps(protocol))
    # Problems that nobody knows are not the same
    unknown = {"benchmark_revision"} if now.get("benchmark_revision") is None else set()
    if differing := [key for key in _COMPARED if before.get(key) != now.get(key) or key in unknown]:
        listed = "".join(f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in differing)
        raise ValueError(f"the baseline was measured in another way, so a difference would say nothing:{listed}")
    theirs = {problem["id"]: problem["answer"] for problem in base["problems"]}
    if one_sided := sorted(theirs.keys() ^ answers.keys()):
        raise ValueError(
            f"{len(one_sided)} problems are in one of the results only, such as {one_sided[0]!r}: evaluate both with the same "
            "--benchmark and --limit."
        )
    if other := [name for name in theirs if theirs[name] != answers[name]]:
        raise ValueError(
            f"problem {other[0]!r} has the answer {theirs[other[0]]!r} in the baseline and {answers[other[0]]!r} here: these are "
            "other problems."
        )


def compare(base: dict[str, Any], other: dict[str, Any], budget_tokens: int) -> dict[str, Any]:
    """
    Return what changed from one result to another.

    Args:
        base: The baseline's results.
        other: The others'.
        budget_tokens: One that both were measured at; longer answers count at it.

    Returns:
        `reduction` of the mean tokens, `accuracy_change`, `answer_accuracy_change`, `boxed_accuracy_change`, of texts
        `anywhere_accuracy_change`, and `unread_change`, with paired bootstrap 95% intervals over problems; `unread_before` and
        `unread_after`, the shares of answers in which nothing was found or that could not be graded; and `by_pass_rate`, the same in groups of problems by the base's pass rate. A group is chosen by one half of the base's samples and
        measured against the other half, both ways around: against the samples that chose it, a group of problems that the base got
        wrong would look better, and one that it got right worse, without any change of the model. Empty where the base has a
        single sample a problem.

    Raises:
        ValueError: See [`check_comparable`]; and where one was not graded at the budget.
    """
    check_comparable(base, other["protocol"], {problem["id"]: problem["answer"] for problem in other["problems"]})
    pairs = list(_pairs(base, other, budget_tokens))
    # Problem by problem: the base's means, the other's
    whole = [(before.mean(axis=1), after.mean(axis=1)) for before, after in pairs]
    names = ["tokens", *(name for name, flag in FLAGS.items() if _has(base, flag) and _has(other, flag)), "unread"]
    groups = {}
    if all(before.shape[1] > 1 for before, _ in pairs):
        for low, high in itertools.pairwise(PASS_RATE_EDGES):
            last = high == PASS_RATE_EDGES[-1]
            group = []
            for before, after in pairs:
                views = [
                    (before[:, seen].mean(axis=1), after.mean(axis=1))
                    for chosen, seen in (
                        (slice(0, None, 2), slice(1, None, 2)),
                        (slice(1, None, 2), slice(0, None, 2)),
                    )
                    if low <= (rate := before[names.index("accuracy"), chosen].mean()) < high
                    or (last and rate == high)
                ]
                if views:
                    group.append(tuple(np.mean(views, axis=0)))
            groups[f"{low:.0%} to {high:.0%}"] = _changes(group, names)
    return {"budget_tokens": budget_tokens, **_changes(whole, names), "by_pass_rate": groups}


def shared_budgets(base: dict[str, Any], other: dict[str, Any]) -> list[int]:
    """Return the budgets in tokens that both results were measured at."""
    return sorted(int(budget) for budget in base["summary"].keys() & other["summary"].keys())


def _has(results: dict[str, Any], flag: str) -> bool:
    return all(flag in grade for grade in results["problems"][0]["samples"][0]["grades"].values())


def _pairs(base: dict[str, Any], other: dict[str, Any], budget_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each problem's measures of both sides: [tokens, the flags that both have, unread; samples]."""
    sides = [{problem["id"]: problem for problem in results["problems"]} for results in (base, other)]
    key = str(budget_tokens)
    flags = [flag for flag in FLAGS.values() if _has(base, flag) and _has(other, flag)]
    for name in sides[0]:
        row = []
        for side in sides:
            samples = side[name]["samples"]
            if any(key not in sample["grades"] for sample in samples):
                raise ValueError(
                    f"problem {name!r} was not graded at a budget of {budget_tokens} tokens; the budgets there are "
                    f"{', '.join(samples[0]['grades'])}."
                )
            grades = [sample["grades"][key] for sample in samples]
            measures = [[min(sample["tokens"], budget_tokens) for sample in samples]]
            measures += [[grade[flag] for grade in grades] for flag in flags]
            measures += [[grade["status"] != "ok" for grade in grades]]
            row.append(np.array(measures, dtype=float))
        yield row[0], row[1]


def _changes(problems: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str]) -> dict[str, Any]:
    changed = [f"{name}_change" for name in names[1:]]
    if len(problems) < 2:
        nothing = dict.fromkeys(["reduction", *changed, "unread_before", "unread_after"])
        return {"problems": len(problems), **nothing}
    before, after = (np.array(side).T for side in zip(*problems, strict=True))
    reduction: Interval = paired_bootstrap_reduction(before[0], after[0])
    changes = [asdict(paired_bootstrap_difference(*rows)) for rows in zip(before[1:], after[1:], strict=True)]
    return {
        "problems": len(problems),
        "reduction": asdict(reduction),
        **dict(zip(changed, changes, strict=True)),
        "unread_before": float(before[-1].mean()),
        "unread_after": float(after[-1].mean()),
    }
