import json

import pytest

from tests.report.made_results import write_evaluation
from trl_crisp.evaluation.comparison import compare
from trl_crisp.evaluation.results import load_results
from trl_crisp.report.sources import load_compared, load_texts


def right(i, j):
    return 100 + i, True


def shorter(i, j):
    return 50 + i, True


def write(directory, name, answer=right, **changed):
    return write_evaluation(directory / name, answer, weights=changed.pop("weights", name), **changed)


def edit(path, change):
    file = path / "results.json"
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


def test_roles_names_and_comparisons(tmp_path):
    base = write(tmp_path, "base", budgets=(250, 500))
    concise = write(tmp_path, "concise", shorter, weights="base", instruction="Be concise.")
    after = [write(tmp_path, f"seed{i}", shorter) for i in range(2)]
    told = write(tmp_path, "told", shorter, instruction="Be concise.", weights="seed0")
    compared = load_compared([base, concise, *after])
    assert [one.role for one in compared.all] == ["base", "concise", "trained", "trained"]
    assert [one.name for one in compared.all] == ["base", "told to be concise", "CRISP, seed0", "CRISP, seed1"]
    assert (compared.budget_tokens, compared.budgets_tokens) == (1000, [250, 1000])
    expected = compare(load_results(base), load_results(after[0]), 1000)
    assert compared.all[2].comparison == expected
    assert expected["reduction"]["estimate"] == pytest.approx(50 / 105.5)
    assert {level: change.problems for level, change in compared.all[2].levels.items()} == {
        "level 0": 4,
        "level 1": 4,
        "level 2": 4,
    }
    assert [one.name for one in load_compared([base, told]).all] == ["base", "CRISP, told to be concise"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protocol": {"temperature": 1.0}}, "temperature: 0.6 there, 1.0 here"),
        ({"protocol": {"benchmark_revision": "sha256:1"}}, "benchmark_revision: 'sha256:0' there, 'sha256:1' here"),
        ({"problems": 11}, "1 problems are in one of the results only, such as 'problem/11'"),
        ({"names": lambda i: f"other/{i}"}, "24 problems are in one of the results only"),
    ],
)
def test_results_of_different_problems_or_protocols_are_refused(tmp_path, changed, message):
    paths = [write(tmp_path, "base"), write(tmp_path, "after", **changed)]
    with pytest.raises(ValueError, match=f"after/results.json cannot be compared with .*(?s:.*){message}"):
        load_compared(paths)


def test_results_without_a_common_budget_are_refused(tmp_path):
    paths = [write(tmp_path, "base"), write(tmp_path, "after")]

    def grade_at_7(results):
        results["summary"] = {"7": results["summary"]["1000"]}
        for problem in results["problems"]:
            for sample in problem["samples"]:
                sample["grades"] = {"7": sample["grades"]["1000"]}

    edit(paths[1], grade_at_7)
    with pytest.raises(ValueError, match="no budget in common"):
        load_compared(paths)


WHOLE = ("protocol", "first_prompt", "samples", "summary", "problems")


def set_at(place, value):
    """Return a function that sets a value in results, at a place such as `problems.3.id`."""

    def change(results):
        *outer, last = [int(key) if key.isdecimal() and len(key) == 1 else key for key in place.split(".")]
        for key in outer:
            results = results[key]
        results[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results: results.update(schema="other"), "its schema is 'other'"),
        (lambda results: results.update(schema_version=9), "has schema version 9"),
        *((lambda results, key=key: results.pop(key), f"it lacks {key}") for key in WHOLE),
        *((set_at(key, None), f"{key} is None, not a") for key in (*WHOLE, "comparison")),
        *((set_at(key, [1]), rf"{key} is \[1\], not a") for key in (*WHOLE, "comparison") if key != "problems"),
        (set_at("problems", {"a": 1}), "problems is {'a': 1}, not a list"),
        (set_at("problems", []), "it has no answers"),
        (set_at("summary", {}), "it has no answers"),
        (set_at("samples", 0), "samples is 0, not a positive count"),
        (set_at("comparison", {"1000": {}}), "comparison.1000 lacks reduction"),
        (
            set_at("comparison", {"1000": {"reduction": {"estimate": "1"}}}),
            "comparison.1000.reduction.estimate is '1'",
        ),
        *(
            (lambda results, key=key: results["protocol"].pop(key), f"protocol lacks {key}")
            for key in ("model", "benchmark")
        ),
        (set_at("protocol.instruction", 3), "protocol.instruction is 3, not a text"),
        (lambda results: results["summary"]["1000"]["all"].pop("repeats"), "summary.1000.all lacks repeats"),
        (set_at("summary.1000", []), r"summary.1000 is \[\], not a mapping"),
        (set_at("summary.abc", {}), "summary has the key 'abc', not a number"),
        (set_at("summary.1000.all.mean_tokens", None), "summary.1000.all.mean_tokens is None, not a finite number"),
        (set_at("summary.1000.all.mean_tokens", float("nan")), "summary.1000.all.mean_tokens is nan"),
        (set_at("summary.1000.all.accuracy", True), "summary.1000.all.accuracy is True"),
        (set_at("summary.1000.all.pass_at", None), "summary.1000.all.pass_at is None, not a mapping"),
        (set_at("problems.3", "x"), r"problems\[3\] is 'x', not a mapping"),
        (set_at("problems.3.id", 5), r"problems\[3\].id is 5, not a text"),
        (set_at("problems.3.id", None), r"problems\[3\].id is None, not a text"),
        (set_at("problems.3.id", "problem/2"), "problem 'problem/2' is there twice"),
        (set_at("problems.3.level", 3), r"problems\[3\].level is 3, not a text"),
        (set_at("problems.3.answer", None), r"problems\[3\].answer is None, not a text or a list of texts"),
        (set_at("problems.3.answer", [1, 2]), r"problems\[3\].answer is \[1, 2\], not a text or a list of texts"),
        (set_at("problems.3.prompt", {"a": 1}), r"problems\[3\].prompt is {'a': 1}, not a text or a list of messages"),
        (set_at("problems.3.samples", []), "problem 'problem/3' has no answers, and each has to have 2"),
        (lambda results: results["problems"][3]["samples"].pop(), "'problem/3' has 1 answers, and each has to have 2"),
        (set_at("problems.3.samples.0.tokens", None), r"problems\[3\].samples\[0\].tokens is None, not a count"),
        (set_at("problems.3.samples.0.tokens", "5"), r"problems\[3\].samples\[0\].tokens is '5', not a count"),
        (set_at("problems.3.samples.0.tokens", -5), r"problems\[3\].samples\[0\].tokens is -5, not a count"),
        (lambda results: results["problems"][3]["samples"][0].pop("grades"), r"\[0\] lacks grades"),
        (
            lambda results: results["problems"][3]["samples"][0]["grades"].pop("250"),
            "an answer to problem 'problem/3' was not graded at 250 tokens",
        ),
        (set_at("problems.3.samples.0.grades.1000.correct", "yes"), "grades.1000.correct is 'yes', not true or false"),
        (set_at("problems.3.samples.0.grades.1000.status", 1), "grades.1000.status is 1, not a text"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_words(tmp_path, change, message):
    base, other = write(tmp_path, "base"), write(tmp_path, "other")
    edit(other, change)
    for paths in ([other], [base, other], [other, base]):
        with pytest.raises(ValueError, match=f"^{other}/results.json .*{message}"):
            load_compared(paths)


def test_a_torn_file_is_refused(tmp_path):
    path = write(tmp_path, "base")
    text = (path / "results.json").read_text()
    (path / "results.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_compared([path])
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_compared([tmp_path / "missing"])


def test_a_wrong_order_that_is_known_is_refused(tmp_path):
    base = write(tmp_path, "base")
    concise = write(tmp_path, "concise", shorter, weights="base", instruction="Be concise.")
    after = write(tmp_path, "after", shorter, baseline=load_results(base))
    with pytest.raises(ValueError, match=r"concise.results.json is the model of .* told to be concise"):
        load_compared([concise, base])
    with pytest.raises(ValueError, match=r"was itself compared with .*base.results.json, its baseline"):
        load_compared([after, base])
    assert len(load_compared([base, concise, after]).all) == 3


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("base", "base", "one file"),
        ("after", "after", "one file"),
        # Another seed of the same model, and the base once more after a trained model
        ("base", "again", "results of the same weights with the same prompt"),
        ("after", "after-again", "results of the same weights with the same prompt"),
        ("concise", "concise-again", "results of the same weights with the same prompt"),
    ],
)
def test_one_model_with_one_prompt_twice_is_refused(tmp_path, first, second, reason):
    told = {"weights": "base", "instruction": "Be concise."}
    settings = {
        "base": {},
        "again": {"weights": "base"},
        "concise": told,
        "concise-again": told,
        "after": {},
        "after-again": {"weights": "after"},
    }
    paths = {name: write(tmp_path, name, shorter, **changed) for name, changed in settings.items()}
    given = [paths["base"], paths["concise"], paths["after"], paths[second]]
    message = f"{first}/results.json and .*{second}/results.json are {reason}"
    with pytest.raises(ValueError, match=message):
        load_compared(given)
    with pytest.raises(ValueError, match=message):
        load_compared([paths[first], paths[second]])


def test_two_runs_at_one_step_are_two_models_and_one_run_twice_is_refused(tmp_path):
    def write_step(name, answer, step):
        protocol = {"model": f"M at step {step}", "step": step, "weights_sha256": None}
        return write(tmp_path, name, answer, protocol=protocol)

    base = write_step("base", right, 0)
    first, other = write_step("first", shorter, 10), write_step("other", lambda i, j: (40 + i, True), 10)
    assert [one.role for one in load_compared([base, first, other]).all] == ["base", "trained", "trained"]
    copy = write_step("copy", shorter, 10)
    for paths in ([base, write_step("base-again", right, 0)], [base, first, copy]):
        with pytest.raises(ValueError, match="are results of the same weights with the same prompt"):
            load_compared(paths)


def texts_of(path, wanted):
    return load_texts(load_compared([path]).base, wanted)


def test_only_the_wanted_texts_are_read(tmp_path):
    path = write(tmp_path, "base", text=lambda i, j: f"answer {i}.{j}", names=lambda i: f'"p\u2028{i}\\')
    wanted = {('"p\u20283\\', 1), ('"p\u20284\\', 0)}
    texts = texts_of(path, wanted)
    assert texts.by_sample == {('"p\u20283\\', 1): "answer 3.1", ('"p\u20284\\', 0): "answer 4.0"}
    assert texts.note is None


def test_missing_texts_are_told(tmp_path):
    path = write(tmp_path, "base", text=lambda i, j: "text")
    assert "lacks 1 of the answers" in texts_of(path, {("problem/0", 0), ("other", 0)}).note
    (path / "samples.jsonl").unlink()
    texts = texts_of(path, {("problem/0", 0)})
    assert texts.by_sample == {}
    assert "is not there" in texts.note


def test_a_torn_last_line_is_dropped_and_another_is_named(tmp_path):
    path = write(tmp_path, "base", text=lambda i, j: "text")
    file = path / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    wanted = {("problem/0", 0), ("problem/11", 1)}
    file.write_text("".join(lines)[:-10])
    assert list(texts_of(path, wanted).by_sample) == [("problem/0", 0)]
    file.write_text("".join([lines[0], lines[1][:-30] + "\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2: this line does not hold a sample"):
        texts_of(path, wanted)


def test_answers_of_another_evaluation_are_refused(tmp_path):
    path = write(tmp_path, "base", text=lambda i, j: "text")
    other = write(tmp_path, "other", text=lambda i, j: "text")
    (other / "samples.jsonl").replace(path / "samples.jsonl")
    with pytest.raises(ValueError, match="answers of another evaluation"):
        texts_of(path, {("problem/0", 0)})
    (path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: it holds no protocol"):
        texts_of(path, {("problem/0", 0)})
