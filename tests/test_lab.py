"""The lab: its task, its table, and CRISP itself from end to end on the lab's small base."""

import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.lab.__main__ import main
from benchmarks.lab.base import STEPS, WARM_UP_STEPS
from benchmarks.lab.protocol import FIXTURES, sha256_of
from benchmarks.lab.run import run, train, training_rows
from benchmarks.lab.settings import COMMON, SETTINGS, Setting
from benchmarks.lab.side_by_side import run_side_by_side
from benchmarks.lab.table import draw, load, mean_interval, table_rows, with_tables
from benchmarks.lab.task import (
    DIFFICULTIES,
    FORMS,
    MAX_SOLUTION_TOKENS,
    draw_problem,
    is_correct,
    lab_tokenizer,
    prompt,
    solve,
)

RESULTS = Path("benchmarks/results/lab")


def solutions(form: str, concise: bool, difficulty: int, count: int = 400) -> list[tuple[list[int], str]]:
    rng = random.Random(7)
    problems = [draw_problem(rng, difficulty) for _ in range(count)]
    return [(problem, solve(problem, FORMS[form], concise, rng)) for problem in problems]


def test_a_solution_written_by_hand_is_graded():
    rng = random.Random(0)
    assert solve([3, 8], FORMS["stability"], True, rng).startswith("b 3 + 8 = 1 1 ;")
    assert prompt([3, 8])[0]["content"] == "add : a 3 b 8"
    assert is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 1 1")
    assert not is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 1 2")
    assert not is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 2 1 1")
    # Cut before its end, or with something behind the answer
    assert not is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 1")
    assert not is_correct([3, 8], "so answer 1 1 ; check b 3 + 8 = 1 1 ok")


@pytest.mark.parametrize("form", FORMS)
def test_the_concise_writer_writes_less_and_both_write_every_length(form):
    lengths = {concise: [len(text.split()) for _, text in solutions(form, concise, 4)] for concise in (False, True)}
    assert statistics.mean(lengths[True]) < 0.75 * statistics.mean(lengths[False])
    # The modes overlap: reverse KL has next to no gradient toward what the student never does
    assert min(lengths[False]) < statistics.mean(lengths[True])
    assert max(lengths[True]) > statistics.quantiles(lengths[False], n=10)[0]


def test_brevity_is_nearly_free_at_first_and_dear_beyond_on_long_problems_first():
    never = replace(FORMS["tradeoff"], first_check_probability=(0.0, 0.0))
    rng = random.Random(7)
    accuracy = {}
    for k in (2, 7):
        for concise in (False, True):
            accuracy[concise, k] = statistics.mean(
                is_correct(p, text) for p, text in solutions("tradeoff", concise, k, 2000)
            )
        problems = [draw_problem(rng, k) for _ in range(2000)]
        accuracy["unchecked", k] = statistics.mean(is_correct(p, solve(p, never, True, rng)) for p in problems)
    assert accuracy[True, 7] > accuracy[False, 7] - 0.06
    assert accuracy["unchecked", 7] < accuracy[True, 7] - 0.3
    assert accuracy["unchecked", 2] > accuracy[True, 2] - 0.2
    assert all(is_correct(p, text) for p, text in solutions("stability", True, 7))


def _longest(form: str, difficulty: int) -> int:
    """All checks made and all sums of two digits: no solution has more tokens."""
    step, check, answer = (
        text.count(" ") + 1 for text in ("b 1 0 + 8 = 1 8 ;", "check b 1 0 + 8 = 1 8 ok ;", "so answer 1 8")
    )
    return (difficulty - 1) * (step + FORMS[form].max_checks * check) + answer + 1


def test_every_word_is_one_token_and_the_longest_solution_fits():
    tokenizer = lab_tokenizer()
    for form in FORMS:
        for difficulty in DIFFICULTIES:
            for problem, text in solutions(form, False, difficulty, 50):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.decode(ids) == text
                assert len(ids) + 1 <= _longest(form, difficulty) <= MAX_SOLUTION_TOKENS
                text = tokenizer.apply_chat_template(prompt(problem), tokenize=False, add_generation_prompt=True)
                # An unknown word would be left out
                assert len(tokenizer(text)["input_ids"]) == len(text.split())


@pytest.mark.parametrize("form", FORMS)
def test_the_committed_base_is_the_one_of_the_results(form):
    directory = FIXTURES / form
    assert sum(path.stat().st_size for path in directory.iterdir()) < 3_000_000
    source = json.loads((directory / "source.json").read_text(encoding="utf-8"))
    assert (source["warm_up_steps"], source["steps"]) == (WARM_UP_STEPS, STEPS[form])
    assert sha256_of(directory) == source["weights_sha256"]
    # Reading them compares their protocols, of which the base is a part
    assert any(result["protocol"]["form"] == form for results in load(RESULTS).values() for result in results)


def test_as_many_test_problems_were_trained_on_as_documented():
    """As benchmarks/README.md says: with two or three numbers there are too few problems to keep them apart."""
    rng = random.Random(20_000)
    trained = {row["prompt"][0]["content"] for row in training_rows()}
    known = {k: sum(prompt(draw_problem(rng, k))[0]["content"] in trained for _ in range(100)) for k in DIFFICULTIES}
    assert known == {2: 100, 3: 44, 4: 7, 5: 1, 6: 0, 7: 0}


def test_the_interval_over_seeds_is_students_t():
    # Three seeds: t = 4.303, standard deviation 1
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert mean_interval([5.0]) == (5.0, 0.0)


@pytest.fixture(scope="module")
def runs():
    names = ("stability-untrained", "short", "short-m1")
    return {name: run(name, 0) for name in names}


def test_crisp_compresses_at_the_bases_accuracy(runs):
    base, trained = (runs[name]["plain"]["all"] for name in ("stability-untrained", "short"))
    assert trained["mean_tokens"] <= 0.7 * base["mean_tokens"]
    assert trained["accuracy"] >= base["accuracy"] - 0.03
    assert trained["truncated"] == 0
    assert runs["short"]["log"][-1]["teacher/refreshes"] == 0


def test_the_live_teacher_is_worse_than_the_base(runs):
    base, live = (runs[name]["plain"]["all"] for name in ("stability-untrained", "short-m1"))
    assert live["accuracy"] < base["accuracy"] - 0.1
    assert runs["short-m1"]["log"][-1]["teacher/refreshes"] == SETTINGS["short-m1"].overrides["max_steps"]


def test_the_table_of_runs_holds_their_numbers(runs):
    rows = {row[0]: row for row in table_rows({name: [result] for name, result in runs.items()})}
    base, trained = (runs[name]["plain"]["all"]["mean_tokens"] for name in ("stability-untrained", "short"))
    assert rows["short"][4] == f"{100 * (trained / base - 1):+.1f}%"
    assert rows["stability base"][4] == ""
    assert rows["short"][5] == "0.0"
    assert [float(cell) for cell in rows["short"][6:9]] == pytest.approx(
        [100 * runs["short"]["plain"][group]["accuracy"] for group in ("all", "2", "7")], abs=0.05
    )
    # A row alone is compared with a base that has none
    alone = table_rows({name: [result] for name, result in runs.items()}, ["short"])
    assert alone == [rows["short"]]
    assert table_rows({"short": [runs["short"]]})[0][4] == ""
    assert (
        rows["stability base, concise prompt"][3]
        == f"{runs['stability-untrained']['concise']['all']['mean_tokens']:.1f}"
    )


def test_the_readmes_tables_are_those_of_the_committed_runs():
    text = Path("benchmarks/README.md").read_text(encoding="utf-8")
    assert with_tables(text, load(RESULTS)) == text


def test_the_readmes_example_is_a_problem_and_its_solution():
    text = Path("benchmarks/README.md").read_text(encoding="utf-8")
    problem, solution = re.findall(r"^    (.*)$", text.partition("## The lab")[2], flags=re.MULTILINE)[:2]
    assert problem == prompt([3, 8, 2])[0]["content"]
    drawn = (solve([3, 8, 2], FORMS["tradeoff"], concise=False, rng=random.Random(seed)) for seed in range(3000))
    assert solution in drawn
    assert is_correct([3, 8, 2], solution)


def test_the_readmes_sentences_hold_for_the_committed_runs():
    runs = load(RESULTS)
    assert set(runs) == set(SETTINGS)
    assert {name for name, results in runs.items() if [r["seed"] for r in results] != [0, 1, 2]} == set()

    def mean(name: str, key: str, side: str = "plain", group: str = "all") -> float:
        return statistics.mean(result[side][group][key] for result in runs[name])

    tokens = {name: mean(name, "mean_tokens") for name in runs}
    accuracy = {name: mean(name, "accuracy") for name in runs}
    for name in ("frozen", "long-frozen"):
        assert tokens[name] == pytest.approx(mean("untrained", "mean_tokens", "concise"), rel=0.03)
        assert accuracy[name] == pytest.approx(accuracy["untrained"], abs=0.03)
    assert tokens["m20"] < 0.75 * tokens["m50"] < 0.75 * 0.85 * tokens["frozen"]
    assert (
        accuracy["m50"] > accuracy["m20"] + 0.1 > accuracy["m10"] + 0.1 > accuracy["m5"] + 0.1 > accuracy["m1"] + 0.1
    )
    assert mean("m1", "truncated") > 0.95
    lost = {
        k: mean("untrained", "accuracy", "plain", k) - mean("m20", "accuracy", "plain", k)
        for k in map(str, DIFFICULTIES)
    }
    assert lost["7"] > lost["2"] + 0.15
    # What differs from the paper, and what makes no difference
    for name in ("forward-kl", "jsd", "token", "cap-80", "cap-256", "temperature-0.6", "temperature-1.3"):
        assert tokens[name] == pytest.approx(tokens["m50"], rel=0.04)
        assert accuracy[name] == pytest.approx(accuracy["m50"], abs=0.03)
    assert tokens["lora-3e-5"] > tokens["m50"] + 5

    def last_entropy(name: str) -> float:
        return statistics.mean(entry["entropy"] for result in runs[name] for entry in result["log"][-10:])

    assert last_entropy("m1") > last_entropy("m5") > last_entropy("m10") > 1.5 * last_entropy("m50")
    assert last_entropy("stability-m20") < 0.7 * last_entropy("stability-frozen")


def test_the_figure_is_drawn(tmp_path):
    draw(RESULTS, tmp_path / "lab.png")
    assert (tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG")


def _trained(setting: Setting, **fields) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "stability", dtype=torch.float32)
    few = {"max_steps": 1, "per_device_train_batch_size": 4, "seed": 0, "weight_decay": 0.0}
    train(model, setting, {**COMMON, **few, **fields})
    return model.state_dict()


def test_masked_rollouts_are_those_that_were_cut(monkeypatch):
    monkeypatch.setattr("benchmarks.lab.run.TRAIN_PROBLEMS", 64)
    before = AutoModelForCausalLM.from_pretrained(FIXTURES / "stability", dtype=torch.float32).state_dict()
    kept, masked = Setting(""), Setting("", mask_truncated=True)
    # No rollout ends within 4 tokens, so nothing is learned; within 352 all do, so nothing is masked
    cut, whole = (_trained(masked, max_completion_length=length) for length in (4, MAX_SOLUTION_TOKENS))
    assert all(torch.equal(cut[key], before[key]) for key in before)
    assert not torch.equal(_trained(kept, max_completion_length=4)["lm_head.weight"], before["lm_head.weight"])
    expected = _trained(kept, max_completion_length=MAX_SOLUTION_TOKENS)
    assert not torch.equal(whole["lm_head.weight"], before["lm_head.weight"])
    assert all(torch.equal(whole[key], expected[key]) for key in before)


@pytest.fixture
def lab(monkeypatch, capsys):
    """Return a function that calls the command, and returns its status and what it printed and said."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["python -m benchmarks.lab", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            main()
            status: int | str = 0
        except SystemExit as ended:
            status = ended.code or 0
        printed = capsys.readouterr()
        # What a program that ends with a text says, and with which status
        return (1, printed.out, status) if isinstance(status, str) else (status, printed.out, printed.err)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for each, handler in handlers.items():
        signal.signal(each, handler)


def test_resuming_skips_what_is_there_and_refuses_what_another_protocol_made(lab, tmp_path):
    path = tmp_path / "untrained-seed0.json"
    path.write_bytes((RESULTS / path.name).read_bytes())
    before = path.stat().st_mtime_ns
    status, printed, said = lab("untrained", "--seeds", "1", "--resume", "--output_dir", tmp_path)
    assert status == 0, said
    assert path.stat().st_mtime_ns == before
    tokens = json.loads(path.read_text(encoding="utf-8"))["concise"]["all"]["mean_tokens"]
    assert re.search(rf"base, concise prompt +1 +{tokens:.1f} ", printed)
    result = json.loads(path.read_text(encoding="utf-8"))
    result["protocol"]["config"]["learning_rate"] = 1e-3
    path.write_text(json.dumps(result), encoding="utf-8")
    status, _, said = lab("untrained", "--seeds", "1", "--resume", "--output_dir", tmp_path)
    assert status == 1
    assert str(path) in said
    assert "remove the file" in said


def test_a_run_that_fails_is_named(tmp_path, capsys):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the results' directory should be", encoding="utf-8")
    failed = run_side_by_side([("stability-untrained", 0)], 1, lambda name, seed: blocked / f"{name}-seed{seed}.json")
    assert failed == [("stability-untrained", 0)]
    assert "FileExistsError" in capsys.readouterr().out


def test_ctrl_c_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-m", "benchmarks.lab", "stability-untrained", "--output_dir", str(tmp_path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As under nohup, or in the background of a script
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:
        deadline_s = time.monotonic() + 120
        while not (children := psutil.Process(process.pid).children()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert children
        # Until the command has noted the child that it has just started
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "with --resume runs the rest" in said
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["m2"], "'m2'"), (["--seeds", "0"], "0 is less than 1: give 1 or more"), (["--workers", "-1"], "-1 is less")],
)
def test_wrong_arguments_are_named(lab, arguments, message):
    status, _, said = lab(*arguments)
    assert status == 2
    assert message in said
