r"""Grading: the paper's rules on the forms that answers take, and expressions that would hang a grader."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import grading as speed
from trl_crisp.evaluation import math_verify_worker
from trl_crisp.evaluation.answers import find_answer, find_box
from trl_crisp.evaluation.grading import Grade, Grader, grade

# Response, gold answer, then whether the answer line, the literal box, and the response as a whole are right
MATH = [
    # The two formats, and both
    ("So it is 42.\nAnswer: 42", "42", True, False, True),
    (r"So it is \boxed{42}.", "42", False, True, True),
    ("\\boxed{42}\nAnswer: 42", "42", True, True, True),
    ("\\boxed{42}\nAnswer: 43", "42", False, True, True),
    ("Answer: 41", "42", False, False, False),
    # Wider than a box: the whole response is searched
    ("I get 42 clips", "42", False, False, True),
    ("I get 43 clips", "42", False, False, False),
    # Several answer lines: the last one counts
    ("Answer: 41\nNo.\nAnswer: 42", "42", True, False, True),
    ("Answer: 42\nNo.\nAnswer: 41", "42", False, False, False),
    ("answer : 42", "42", True, False, True),
    ("ANSWER:42", "42", True, False, True),
    ("The answer is: 42", "42", False, False, True),
    # What stands around it
    ("Answer: 42.", "42", True, False, True),
    ('Answer: "42"?', "42", True, False, True),
    ("Answer: $42$", "42", True, False, True),
    ("Answer: \\(42\\)", "42", True, False, True),
    ("**Answer:** 42", "42", True, False, True),
    ("Answer: **42**", "42", True, False, True),
    ("Answer: `42`", "42", True, False, True),
    ("Answer: x = 42", "42", True, False, True),
    # Fractions and decimals
    ("Answer: 1/2", r"\frac{1}{2}", True, False, True),
    ("Answer: 0.5", r"\frac{1}{2}", True, False, True),
    ("Answer: \\dfrac{1}{2}", r"\frac12", True, False, True),
    (r"\boxed{\frac{3}{4}}", "0.75", False, True, True),
    ("Answer: 2/4", r"\frac{1}{2}", True, False, True),
    ("Answer: 1/3", "0.33", False, False, False),
    ("Answer: 3.0", "3", True, False, True),
    ("Answer: -\\frac{1}{2}", r"-\frac{1}{2}", True, False, True),
    # A factorial keeps its mark
    ("Answer: 5!", "120", True, False, True),
    # ... and the whole response, where a 5 stands, is wide
    ("Answer: 5!", "5", False, False, True),
    # Tuples, intervals, sets
    ("Answer: (1, 2)", "(1,2)", True, False, True),
    ("Answer: (2, 1)", "(1,2)", False, False, False),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)", False, True, True),
    ("Answer: [0, 1)", "[0,1)", True, False, True),
    ("Answer: (0, 1)", "[0,1]", False, False, False),
    ("Answer: [-2,7]", r"x \in [-2,7]", True, False, True),
    (r"Answer: (-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", True, False, True),
    ("Answer: {2, 1}", r"\{1,2\}", True, False, True),
    ("Answer: 2, 1", "1,2", True, False, True),
    # Units, money, degrees, percentages
    ("Answer: 10 cm", "10", True, False, True),
    ("Answer: 10", r"10\text{ cm}", True, False, True),
    ("Answer: $18", "18", True, False, True),
    (r"Answer: \$18.90", "18.90", True, False, True),
    (r"Answer: 70^\circ", "70", True, False, True),
    ("Answer: 50%", "50", True, False, True),
    ("Answer: 50%", "0.5", True, False, True),
    (r"Answer: 50\%", r"50\%", True, False, True),
    ("Answer: 5%", "50", False, False, False),
    # Large numbers
    ("Answer: 1,000", "1000", True, False, True),
    ("Answer: 12,345,678", "12345678", True, False, True),
    ("Answer: 2^{10}", "1024", True, False, True),
    # Text
    ("Answer: Friday", r"\text{Friday}", True, False, True),
    (r"Answer: \text{Friday}", "Friday", True, False, True),
    ("Answer: Monday", r"\text{Friday}", False, False, False),
    (r"\boxed{\text{even}}", r"\text{even}", False, True, True),
    # Zero, roots, expressions, matrices, LaTeX spacing
    ("Answer: -0", "0", True, False, True),
    ("Answer: 0", "-0", True, False, True),
    ("Answer: -42", "42", False, False, False),
    (r"Answer: \sqrt 2", r"\sqrt{2}", True, False, True),
    ("Answer: sqrt(2)", r"\sqrt{2}", True, False, True),
    (r"Answer: 11\sqrt2", r"11\sqrt{2}", True, False, True),
    ("Answer: 1 + 2x", "2x+1", True, False, True),
    (r"Answer: \frac{ 1 }{ 2 } \, ", r"\frac{1}{2}", True, False, True),
    (r"Answer: 3\,\pi", r"3\pi", True, False, True),
    (
        r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        False,
        True,
        True,
    ),
    # Inside the thinking: the paper's rules look at the whole response
    ("<think>\nMaybe \\boxed{42}?\n</think>\nAnswer: 41", "42", False, True, True),
    ("<think>\nAnswer: 42\n</think>\nIt is 41.\nAnswer: 41", "42", False, False, False),
    # Boxes in boxes, and one that is cut off
    (r"\boxed{\boxed{42}}", "42", False, True, True),
    (r"first \boxed{42}, then \boxed{4", "42", False, True, True),
    # Digits of other scripts
    ("Answer: ٤٢", "42", True, False, True),
    ("Answer: 42", "42", True, False, True),
    ("Answer: ४२", "42", True, False, True),
    ("Answer: x²", "x2", False, False, False),
]


@pytest.fixture(scope="module")
def graded() -> list[Grade]:
    with Grader(workers=2, timeout_s=20.0) as grader:
        return grader.grade_all([(response, gold) for response, gold, *_ in MATH])


@pytest.mark.parametrize("case", range(len(MATH)), ids=lambda i: f"{MATH[i][0]!r} for {MATH[i][1]}"[:60])
def test_answer_line_and_box_are_graded_as_the_table_says(graded, case):
    _, _, answer, boxed, correct = MATH[case]
    found = graded[case]
    assert (found.answer_correct, found.boxed_correct, found.correct) == (answer, boxed, correct), found
    assert not correct or found.status == "ok"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", None),
        ("No line here", None),
        ("Answer:", None),
        ("Answer:   \nnext", "next"),
        ("Answer: .,;", None),
        ("Answer: 5!", "5!"),
        ("Answer: 42. ", "42"),
        ("**Answer:** **42**", "42"),
    ],
)
def test_the_last_answer_line_is_found_without_its_decoration(response, answer):
    assert find_answer(response) == answer


def test_the_authors_rules_to_the_letter():
    assert find_answer("**Answer:** **42**", exact=True) == "** **42**"
    assert grade("Answer: ٤٢", "42", exact=True).correct is False
    # Their second path still finds a number between asterisks
    assert grade("Answer: **42**", "42", exact=True) == Grade(False, False, True, "ok", "**42**")


@pytest.mark.parametrize(
    ("response", "box"),
    [
        ("", None),
        (r"\boxed{", None),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\fbox{3}", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_closed_box_is_found(response, box):
    assert find_box(response) == box


@pytest.mark.parametrize(
    ("response", "gold", "answer", "boxed", "status"),
    [
        ("Answer: B", "B", True, False, "ok"),
        ("Answer: b", "B", True, False, "ok"),
        ("Answer: (B)", "B", True, False, "ok"),
        ("Answer: B) 42 metres", "(B)", True, False, "ok"),
        ("Answer: **B**", "B", True, False, "ok"),
        ("Answer: $B$", "B", True, False, "ok"),
        ("Answer: C\nAnswer: B", "B", True, False, "ok"),
        (r"\boxed{B}", "B", False, True, "ok"),
        (r"\boxed{\text{B}}", "B", False, True, "ok"),
        (r"\boxed{\textbf{(B)}}", "B", False, True, "ok"),
        ("Answer: C", "B", False, False, "ok"),
        ("Answer: Because", "B", False, False, "unparseable"),
        ("I think it is B", "B", False, False, "unparseable"),
        ("", "B", False, False, "unparseable"),
    ],
)
def test_choices_are_graded_by_their_letter(response, gold, answer, boxed, status):
    found = grade(response, gold, kind="choice")
    assert (found.answer_correct, found.boxed_correct, found.status) == (answer, boxed, status)
    assert found.correct is (answer or boxed)


@pytest.mark.parametrize("response", ["", "   \n", "I do not know."])
def test_a_response_without_an_answer_is_unparseable(response):
    found = grade(response, "42")
    assert (found.correct, found.status) == (False, "unparseable")


BOMBS = [
    "Answer: 9^(9^(9^9))",
    r"\boxed{9^{9^{9^{9}}}}",
    "Answer: " + r"\sqrt{" * 400 + "2" + "}" * 400,
    "Answer: " + "7" * 1_000_000,
    r"\boxed{" + "(1+" * 5000 + "1" + ")" * 5000 + "}",
    "Answer: 100000!!!",
]


def test_bombs_neither_hang_nor_kill_nor_count_as_graded_right():
    timeout_s = 2.0
    pairs = [(bomb, "42") for bomb in BOMBS] + [("Answer: 42", "42")] * 20
    started_s = time.monotonic()
    with Grader(workers=2, timeout_s=timeout_s) as grader:
        grades = grader.grade_all(pairs)
    elapsed_s = time.monotonic() - started_s
    assert all(found.correct for found in grades[len(BOMBS) :])
    assert not any(found.correct for found in grades[: len(BOMBS)])
    assert {found.status for found in grades} & {"timeout", "error"}
    # At most three comparisons each, and a process to start again after each
    assert elapsed_s < len(BOMBS) * 3 * (timeout_s + 10)


def test_many_boxes_that_never_close_take_no_time():
    started_s = time.monotonic()
    assert find_box("\\boxed{1}" + "\\boxed{" * 20_000) == "1"
    assert find_box("\\boxed{a{b}c} } \\boxed{\\boxed{2}") == "2"
    assert time.monotonic() - started_s < 1


def test_a_process_that_died_idle_is_replaced():
    with Grader(workers=1) as grader:
        assert grader.grade_all([("Answer: 42.0", "42")])[0].correct
        grader._workers[0].process.kill()
        grader._workers[0].process.wait()
        lost, other = grader.grade_all([("Answer: 42.0", "42"), ("Answer: 7.0", "7")])
        assert lost.status in ("ok", "error")
        assert other.correct


def test_a_bomb_beside_right_answers_makes_none_of_them_time_out(monkeypatch):
    """Where a process takes longer to start than an answer may take, the answers that came meanwhile are not late."""
    slow = "import time; time.sleep(5); from trl_crisp.evaluation.math_verify_worker import main; main()"
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: start([sys.executable, "-c", slow], **more))
    # Each takes a tenth of a second or so, so that some are being compared when the bomb's time is over
    sums = [[f"x^{{{k}}}" for k in range(i, i + 6)] for i in range(2, 102)]
    with Grader(workers=3, timeout_s=4) as grader:
        right = [("Answer: " + "+".join(powers), "+".join(reversed(powers))) for powers in sums]
        grades = grader.grade_all([("Answer: 9^(9^(9^9))", "42"), *right])
    assert all(found.answer_correct for found in grades[1:])


def test_a_bomb_costs_its_time_out_only():
    with Grader(workers=1, timeout_s=1.0) as grader:
        grader.grade_all([("Answer: 42.0", "42")])
        started_s = time.monotonic()
        (found,) = grader.grade_all([("Answer: 9^(9^(9^9)) or so", "42")])
        # The answer line and the whole response, and a new process between them
        assert time.monotonic() - started_s < 2 * 1.0 + 15
        assert found.correct is False
        assert grader.grade_all([("Answer: 42.0", "42")])[0].correct


def test_a_memory_bomb_dies_alone(monkeypatch):
    """Under a tenth of the limit, which the bomb reaches sooner."""
    small = "from trl_crisp.evaluation import math_verify_worker as w; w.MEMORY_LIMIT_BYTES = 160 * 2**20; w.main()"
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: start([sys.executable, "-c", small], **more))
    bomb = ("Answer: (x+y+z+w)^{200}", "x + 1")
    neighbours = [(f"Answer: {2 * i}/2", str(i)) for i in range(40)]
    process = psutil.Process()
    with Grader(workers=2, timeout_s=120) as grader:
        grader.grade_all(neighbours)
        before_bytes = process.memory_info().rss
        first, *grades = grader.grade_all([bomb, *neighbours])
        grown_bytes = process.memory_info().rss - before_bytes
    assert (first.correct, first.status) == (False, "error")
    assert all(found.answer_correct for found in grades)
    assert grown_bytes < 16 * 2**20


def test_the_memory_limit_leaves_room_for_usual_answers():
    code = (
        "from trl_crisp.evaluation import math_verify_worker as w; w.main()\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmPeak')][0].split()[1])"
    )
    question = json.dumps([r"\frac{1}{2}", r"\boxed{0.5}", False]) + "\n"
    done = subprocess.run([sys.executable, "-c", code], input=question, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['"ready"', '"equal"']
    # It prints the rest where the caller does not read
    assert int(done.stderr.split()[-1]) * 1024 < math_verify_worker.MEMORY_LIMIT_BYTES // 4


def test_grades_do_not_depend_on_the_number_of_workers_and_progress_is_told():
    pairs = [(response, gold) for response, gold, *_ in MATH[:20]]
    told: list[int] = []
    with Grader(workers=3) as three, Grader(workers=1) as one:
        assert three.grade_all(pairs, on_progress=told.append) == one.grade_all(pairs)
        assert three.grade_all([]) == []
    # What needs no comparison is told at once
    assert told == list(range(told[0], 21))


def test_bad_input_is_refused_by_name():
    with Grader() as grader:
        with pytest.raises(ValueError, match=r"pair 1 has the gold answer ' '"):
            grader.grade_all([("Answer: 1", "1"), ("Answer: 1", " ")])
        with pytest.raises(ValueError, match="give one letter"):
            grader.grade_all([("Answer: B", "42")], kind="choice")
    with pytest.raises(ValueError, match="timeout_s=0"):
        Grader(timeout_s=0)


def test_the_speed_benchmark_counts_right_answers_and_a_bombs_time_out(tmp_path, monkeypatch):
    """Its JSON is committed; here the same code on three problems, and on one bomb."""
    (tmp_path / "math500.jsonl").write_text(
        json.dumps({"solution": r"So \boxed{\frac12}.", "answer": r"\frac{1}{2}"}) + "\n"
    )
    rows = [{"answer": "5 + 1 = 6\n#### 6"}, {"answer": "Much.\n#### 1,200"}]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    solutions = speed.read_solutions(tmp_path / "math500.jsonl", tmp_path / "gsm8k.jsonl")
    assert [answer for _, answer in solutions] == [r"\frac{1}{2}", "6", "1200"]
    monkeypatch.setattr(speed, "BOMBS", {"a tower of powers": speed.BOMBS["a tower of powers"]})
    result = speed.measure(solutions, 12, 2)
    assert result["right"] == 12
    assert result["bombs"]["a tower of powers"]["status"] == "timeout"
    assert result["bombs"]["a tower of powers"]["others_right"] == 10


def test_the_committed_speed_benchmark_graded_all_within_a_minute():
    result = json.loads(Path("benchmarks/results/grading.json").read_text(encoding="utf-8"))
    assert result["protocol"]["responses"] == result["right"] == 5000
    assert result["seconds"] < 60
    assert set(result["bombs"]) == set(speed.BOMBS)
    # The answer line and the whole response, each with its own time-out, and what starting a process again takes
    assert all(bomb["seconds"] < 3 * result["protocol"]["timeout_s"] for bomb in result["bombs"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a process with its parent on Linux alone")
def test_a_killed_caller_leaves_no_process_behind_in_the_middle_of_a_comparison():
    code = (
        "from trl_crisp.evaluation.grading import Grader\n"
        "with Grader(workers=2, timeout_s=600) as grader:\n"
        "    grader.grade_all([('Answer: 84/2', '42')] * 2)\n"
        "    print(*(worker.process.pid for worker in grader._workers), flush=True)\n"
        "    grader.grade_all([('Answer: 9^(9^(9^9))', '42'), ('Answer: 42', '42')])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as caller:
        workers = [psutil.Process(int(pid)) for pid in caller.stdout.readline().split()]
        assert len(workers) == 2
        # One of them computes
        started_s = [sum(worker.cpu_times()[:2]) for worker in workers]
        while all(sum(w.cpu_times()[:2]) < s + 0.3 for w, s in zip(workers, started_s, strict=True)):
            time.sleep(0.02)
        caller.kill()
    _, left = psutil.wait_procs(workers, timeout=10)
    for worker in left:
        worker.kill()
    assert not left


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a process with its parent on Linux alone")
def test_a_grader_outlives_the_thread_that_used_it_first():
    with Grader(workers=1) as grader:
        first = threading.Thread(target=grader.grade_all, args=([("Answer: 84/2", "42")],))
        first.start()
        first.join()
        grader._workers[0].process.wait(timeout=10)
        assert grader.grade_all([("Answer: 84/2", "42")])[0].correct
