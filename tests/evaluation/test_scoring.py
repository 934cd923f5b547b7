"""The rows of results.json: whose text each grade is of, and what stands in each column."""

import pytest

from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.records import problem_to_dict
from trl_crisp.evaluation.sample_file import Sample
from trl_crisp.evaluation.scoring import score_samples
from trl_crisp.evaluation.settings import EvaluationSettings

LOOP = "I say it again and again. " * 8
# Each kind apart from its next, so that grades that are made kind by kind have to find back to their rows
PROBLEMS = [
    Problem("sum", "1 + 1?", "2", "math", "easy"),
    Problem("capital", "Capital of Norway?", ["Oslo", "Christiania"], "text"),
    Problem("letter", "A or B?", "B", "choice", "hard"),
    Problem("product", "2 * 3?", "6", "math"),
]
TEXTS = {
    # Right at the end alone, right from the start
    ("sum", 0): "Wait, maybe. Answer: 2",
    ("sum", 1): "Answer: 3",
    ("capital", 0): "It is Oslo.",
    ("capital", 1): "It is Bergen. Or Oslo.",
    ("letter", 0): "Answer: A",
    ("letter", 1): "Answer: B",
    ("product", 0): LOOP,
    ("product", 1): r"\boxed{6}",
    # Of another run, with more samples a problem
    ("sum", 2): "Answer: 2",
}
ANSWERS = {
    ("sum", 0): "2",
    ("sum", 1): "3",
    ("letter", 0): "A",
    ("letter", 1): "B",
}


def score(budgets=(9, 1000), **options):
    samples = {
        (name, number): Sample(name, number, text, list(map(ord, text)), 1 + number, number == 0, "0" * 64)
        for (name, number), text in TEXTS.items()
    }
    return score_with(PROBLEMS, samples, budgets, 2, **options)


class Characters:
    """A tokenizer for which a token is a character."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def score_with(problems, samples, budgets, numbers=1, exact=False, on_progress=None):
    asked = EvaluationSettings(
        "m", "b", samples=numbers, max_new_tokens=max(budgets), budgets=tuple(budgets), exact=exact
    )
    return [problem_to_dict(one) for one in score_samples(problems, samples, asked, Characters(), on_progress)]


@pytest.fixture(scope="module")
def scored():
    return score()


def test_each_row_holds_its_own_problem_in_the_order_of_the_problems(scored):
    rows = [(row["id"], row["level"], row["answer"]) for row in scored]
    assert rows == [
        ("sum", "easy", "2"),
        ("capital", None, ["Oslo", "Christiania"]),
        ("letter", "hard", "B"),
        ("product", None, "6"),
    ]


def test_each_sample_has_its_own_measures(scored):
    for row in scored:
        found = [(s["tokens"], s["thinking_tokens"], s["ended_by_eos"]) for s in row["samples"]]
        assert found == [(len(TEXTS[row["id"], 0]), 1, True), (len(TEXTS[row["id"], 1]), 2, False)], row["id"]


def test_each_grade_is_of_its_own_text_answer_and_budget(scored):
    correct = {
        (row["id"], number): tuple(sample["grades"][budget]["correct"] for budget in ("9", "1000"))
        for row in scored
        for number, sample in enumerate(row["samples"])
    }
    assert correct == {
        ("sum", 0): (False, True),
        ("sum", 1): (False, False),
        ("capital", 0): (False, True),
        ("capital", 1): (False, False),
        ("letter", 0): (False, False),
        ("letter", 1): (True, True),
        ("product", 0): (False, False),
        ("product", 1): (True, True),
    }


def test_the_answer_column_is_what_the_answer_line_says(scored):
    for row in scored:
        for number, sample in enumerate(row["samples"]):
            grade = sample["grades"]["1000"]
            assert grade["answer"] == ANSWERS.get((row["id"], number)), (row["id"], number)
            # Of the other kinds nothing is said anywhere
            assert ("anywhere_correct" in grade) is (row["id"] == "capital")
    assert [sample["grades"]["1000"]["anywhere_correct"] for sample in scored[1]["samples"]] == [True, True]


def test_repetition_and_words_of_doubt_are_those_of_the_text(scored):
    for row in scored:
        for number, sample in enumerate(row["samples"]):
            loops = (row["id"], number) == ("product", 0)
            words = 2 if (row["id"], number) == ("sum", 0) else 0
            found = [sample["grades"]["1000"][name] for name in ("compresses", "repeats", "epistemic_words")]
            # Too short to compress tenfold, whatever it says
            assert found == [False, loops, words], (row["id"], number)
            assert sample["grades"]["9"]["repeats"] is False


def test_a_long_loop_compresses():
    samples = {("loop", 0): Sample("loop", 0, LOOP * 50, [1], 0, False, "0" * 64)}
    (row,) = score_with([Problem("loop", "?", "x", "text")], samples, [8])
    assert row["samples"][0]["grades"]["8"]["compresses"] is True


def test_exact_grades_by_the_authors_rules():
    samples = {("sum", 0): Sample("sum", 0, "**Answer**: 2", [1], 0, True, "0" * 64)}
    graded = [score_with(PROBLEMS[:1], samples, [8], exact=exact)[0]["samples"][0] for exact in (False, True)]
    assert [sample["grades"]["8"]["answer"] for sample in graded] == ["2", None]


def test_progress_ends_at_the_number_of_grades():
    told = []
    score(budgets=[1000], on_progress=lambda *values: told.append(values))
    assert told[-1] == ("grading", 4, 4, "")
