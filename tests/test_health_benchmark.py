"""The health experiment: its code of answers, its analysis against loops, its summary, and one real run of a few steps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.health.__main__ import without_nan
from benchmarks.health.answers import AnswerCode, answer_of
from benchmarks.health.measured import load, points_of, reference_of
from benchmarks.health.outcomes import accuracy_changes, gate_decisions, paired, paired_with_stop, stop_outcome
from benchmarks.health.power import Frequencies, reference_and_level, simulate
from benchmarks.health.run import run, write_run
from benchmarks.health.settings import MONITOR_SAMPLES, SETTINGS, planned_runs
from benchmarks.health.stopping import GATE_RULES, PLANNED, STOP_RULES, Seen, seen_in, shortest_that_holds, stop_at
from benchmarks.health.summary import summarize
from benchmarks.health.tables import tables, with_tables
from benchmarks.health.tracking import errors, hard_third, left_by_the_cap, wrong_majority
from trl_crisp.health.sweet_spot import Measurement, has_fallen

RESULTS = Path("benchmarks/results/health")


def made_up_run(seed: int = 0, prompts: int = 128, later: int = 3, right: float = 0.9) -> dict:
    """A run's JSON with random answers; accuracy falls from one measurement to the next."""
    rng = np.random.default_rng(seed)

    def measurement(step: int, right: float, samples: int) -> dict:
        rows = [
            "".join(
                rng.choice(list("Tab.-" if step else "Tab-"), p=_shares(right, bool(step))) for _ in range(samples)
            )
            for _ in range(prompts)
        ]
        longer = ["".join(rng.choice(list("01"), p=(0.8, 0.2)) for _ in row) for row in rows]
        accuracy = right - 0.01
        return {
            "step": step,
            "asked": "all",
            "answers": " ".join(rows),
            "longer_than_rollouts": " ".join(longer),
            "tokens": [int(samples * rng.integers(20, 200)) for _ in rows],
            "held_out": {
                g: {"accuracy": accuracy, "mean_tokens": 100.0 - step, "truncated": 0.0} for g in ("all", "2")
            },
        }

    run = {
        "setting": "made-up",
        "seed": seed,
        "protocol": {
            "form": "tradeoff",
            "arm": "ungated",
            "base": "full",
            "more_base_samples": 0,
            "held_out": {"problems_a_difficulty": 50},
            "config": {"teacher_sync_steps": 10, "max_steps": 10 * later, "monitor_samples": MONITOR_SAMPLES},
        },
        "difficulties": "3" * prompts,
        "measurements": [measurement(0, right, MONITOR_SAMPLES)]
        + [measurement(10 * i + 9, right - 0.1 * i, MONITOR_SAMPLES) for i in range(later)],
    }
    base, points = points_of(run)
    # As the run does, ask only the prompts that have a reference
    for one, point in zip(run["measurements"][1:], points, strict=True):
        rows, longer = one["answers"].split(), one["longer_than_rollouts"].split()
        if len(base.prompts) < prompts:
            one["asked"] = base.prompts
            one["answers"] = " ".join(rows[i] for i in base.prompts)
            one["longer_than_rollouts"] = " ".join(longer[i] for i in base.prompts)
            one["tokens"] = [one["tokens"][i] for i in base.prompts]
        change = float(point.change.mean())
        one |= {
            "agreement": float(point.agreement.mean()),
            "agreement_change": change,
            "agreement_change_low": change - 0.03,
            "agreement_change_high": change + 0.03,
            "agreement_mean_tokens": float(np.mean(one["tokens"])),
        }
    return run


def _shares(right: float, is_student: bool) -> list[float]:
    rest = 1 - right
    return [right, rest / 2, rest / 4, rest / 8, rest / 8] if is_student else [right, rest / 2, rest / 4, rest / 4]


def loop_reference(codes: str) -> str | None:
    given = [code for code in codes if code != "-"]
    counts = {code: given.count(code) for code in given}
    best = max(counts.values(), default=0)
    if best == 0 or (best == 1 and len(given) > 1):
        return None
    return next(code for code in given if counts[code] == best)


def loop_level(codes: str) -> float:
    total = 0.0
    for j, own in enumerate(codes):
        others = [code for i, code in enumerate(codes) if i != j and code != "-"]
        if others:
            best = max(others.count(code) for code in others)
            leaders = {code for code in others if others.count(code) == best}
            total += (own in leaders) / len(leaders)
    return total / len(codes)


def test_answers_in_code_keep_who_agrees_and_who_is_right():
    texts = [
        ["x ; so answer 1 2", "so answer 9", "so answer", "so answer 1 3"],
        ["no end", "so answer 5", "so answer 5", ""],
    ]
    code = AnswerCode(["1 2", "7"], texts)
    assert ["".join(code.encode(i, text) for text in row) for i, row in enumerate(texts)] == ["Ta-b", "-aa-"]
    assert code.encode(0, "so answer 1 3") == "b"
    assert code.encode(0, "so answer 4") == "."
    assert code.encode(1, "so answer 7") == "T"
    assert answer_of("so answer 1 ; so answer 2 ") == "2"


@pytest.mark.parametrize("codes", ["TTTTT", "TTaab", "ab-", "---", "-a-", "aabbT", "Ta", "TabcT-"])
def test_the_reference_is_the_packages(codes):
    found, answer = reference_of(codes), loop_reference(codes)
    assert (None if found is None else found.answer) == answer
    if found is not None:
        assert found.base_agreement == pytest.approx(loop_level(codes))


@pytest.mark.parametrize("samples", [2, 3, 5])
@pytest.mark.parametrize("cut", [False, True])
def test_points_are_those_of_a_loop(samples, cut):
    made = made_up_run(prompts=40)
    base, points = points_of(made, samples, cut)
    first = made["measurements"][0]

    def codes(measurement, place):
        row, flags = measurement["answers"].split()[place], measurement["longer_than_rollouts"].split()[place]
        return "".join("-" if cut and flag == "1" else code for code, flag in zip(row, flags, strict=True))[:samples]

    prompts = [i for i in range(40) if loop_reference(codes(first, i)) is not None]
    assert base.prompts == prompts
    for point, one in zip(points, made["measurements"][1:], strict=True):
        changes, right = [], []
        for i in prompts:
            asked = list(range(40)) if one["asked"] == "all" else one["asked"]
            if i not in asked:
                continue
            row = codes(one, asked.index(i))
            changes.append(row.count(loop_reference(codes(first, i))) / samples - loop_level(codes(first, i)))
            right.append(one["answers"].split()[asked.index(i)][:samples].count("T") / samples)
        np.testing.assert_allclose(point.change, changes)
        np.testing.assert_allclose(point.accuracy, right)


def test_errors_are_those_of_a_loop():
    runs = [made_up_run(seed) for seed in (0, 1)]
    levels, changes = [], []
    for made in runs:
        _, points = points_of(made)
        for point in points:
            levels.append(np.mean(point.agreement) - np.mean(point.accuracy))
            changes.append(np.mean(point.change) - np.mean(point.accuracy_change))
    found = errors(runs)
    assert found["measurements"] == 6
    assert found["level_bias"] == pytest.approx(np.mean(levels))
    assert found["level_largest_error"] == pytest.approx(max(map(abs, levels)))
    assert found["change_bias"] == pytest.approx(np.mean(changes))
    assert found["change_rms_to_all"] == pytest.approx(np.sqrt(np.mean(np.square(changes))))
    assert found["change_correlation"] > 0.9
    # Fewer prompts: more noise against all answers
    assert errors(runs, prompts=16)["change_rms_to_all"] > found["change_rms_to_all"]


def test_prompts_with_a_wrong_majority_and_the_hard_third_are_counted():
    made = made_up_run(prompts=60, right=0.5)
    base, points = points_of(made)
    first = made["measurements"][0]["answers"].split()
    wrong = [n for n, i in enumerate(base.prompts) if loop_reference(first[i]) != "T"]
    assert wrong
    found = wrong_majority([made])
    assert found["share"] == pytest.approx(len(wrong) / len(base.prompts))
    assert found["agreement"] == pytest.approx(np.mean([p.agreement[wrong].mean() for p in points]))
    assert found["share_without_majority"] == pytest.approx(1 - len(base.prompts) / 60)
    ordered = sorted(range(len(base.prompts)), key=lambda n: base.level[n])[: len(base.prompts) // 3]
    assert hard_third([made])["base_level"] == pytest.approx(np.mean([base.level[n] for n in ordered]))


def test_the_cap_counts_what_it_cuts():
    made = made_up_run(prompts=60)
    first = made["measurements"][0]
    found = left_by_the_cap([made])
    assert found["cut"] == pytest.approx(first["longer_than_rollouts"].count("1") / 300)
    assert found["with_reference"] <= len(points_of(made)[0].prompts) / 60


def test_true_accuracy_is_of_both_kinds_of_answers():
    made = made_up_run()
    asked = range(128) if made["measurements"][1]["asked"] == "all" else made["measurements"][1]["asked"]

    def both(place):
        rows = made["measurements"][place]["answers"].split()
        rows = [rows[i] for i in asked] if place == 0 else rows
        held_out = made["measurements"][place]["held_out"]["all"]["accuracy"]
        right = sum(row.count("T") for row in rows)
        # 50 held-out problems: the made-up run has one difficulty
        return (right + 50 * held_out) / (5 * len(rows) + 50)

    assert accuracy_changes(made) == pytest.approx([both(i) - both(0) for i in (1, 2, 3)])


def test_differences_are_paired_by_seed():
    def end(seed, accuracy, tokens):
        return {"seed": seed, "final": {"all": {"accuracy": accuracy, "mean_tokens": tokens}}}

    found = paired([end(0, 0.9, 50), end(1, 0.8, 60), end(7, 0.1, 1)], [end(1, 0.9, 120), end(0, 0.9, 100)])
    assert found["seeds"] == 2
    # Differences 0 and -0.1: t(1) = 12.706, standard error 0.05
    assert found["accuracy"] == pytest.approx((-0.05, 12.706 * 0.05), rel=1e-4)
    assert found["tokens"] == pytest.approx((-0.5, 0.0))


def test_what_the_stop_names_is_compared_with_the_end_of_the_other():
    one, other = made_up_run(0), made_up_run(0, right=0.8)
    stopped, end = stop_outcome(one, PLANNED, 0.03), stop_outcome(other, PLANNED, 0.03)["end"]
    assert stopped["named"]["step"] != stopped["end"]["step"]
    found = paired_with_stop([one, {**one, "seed": 7}], [other], 0.03)
    assert found["seeds"] == 1
    expected = stopped["named"]["all_accuracy_change"] - end["all_accuracy_change"]
    assert found["accuracy"][0] == pytest.approx(expected)
    assert found["tokens"][0] == pytest.approx(stopped["named"]["tokens"] / end["tokens"] - 1)


def seen(*changes: float, half: float = 0.02) -> list[Seen]:
    return [Seen(10 * i + 9, c, c - half, c + half, 100.0 - i) for i, c in enumerate(changes)]


def test_each_rule_of_the_stop_stops_where_it_says():
    changes = seen(0.0, -0.035, -0.01, -0.04, -0.045, -0.06, -0.2)
    at = {rule: stop_at(changes, rule, 0.03) for rule in STOP_RULES}
    assert at == {
        "estimate below the margin and interval below 0, twice": 4,
        "the same, once": 1,
        "the same, three times": 5,
        "estimate below the margin, once": 1,
        "estimate below the margin, twice": 4,
        "interval below the margin, once": 5,
        "interval below the margin, twice": 6,
    }
    # A drop of exactly the margin is none, and a wide interval is no proof
    assert stop_at(seen(-0.03, -0.03), PLANNED, 0.03) is None
    assert stop_at(seen(-0.05, -0.05, half=0.06), PLANNED, 0.03) is None
    assert stop_at(seen(-0.05, -0.05, half=0.06), "estimate below the margin, twice", 0.03) == 1


def test_the_shortest_measurement_that_holds_is_named():
    assert shortest_that_holds(seen(0.0, -0.03, -0.031), 0.03) == 1
    assert shortest_that_holds(seen(-0.1, -0.1), 0.03) is None


def test_the_rules_of_the_gate_differ_where_they_say():
    doubtful, sure, fine = (
        Seen(1, -0.05, -0.09, 0.01, 1),
        Seen(1, -0.05, -0.07, -0.03, 1),
        Seen(1, -0.01, -0.04, 0.02, 1),
    )
    decided = {name: [allows(one, 0.03) for one in (doubtful, sure, fine)] for name, allows in GATE_RULES.items()}
    assert decided == {
        "estimate at least -margin": [False, False, True],
        "interval's low end at least -margin": [False, False, False],
        "unless estimate below -margin and interval below 0": [True, False, True],
    }


def test_gate_decisions_and_outcomes_of_a_run_are_those_of_a_loop():
    made = made_up_run()
    true = accuracy_changes(made)
    assert true[0] > -0.03 > true[1] > true[2]
    found = gate_decisions([made], 0.03)["estimate at least -margin"]
    changes = [one["agreement_change"] for one in made["measurements"][1:]]
    assert found == {
        "healthy": 1,
        "postponed": int(changes[0] < -0.03),
        "lost": 2,
        "allowed": sum(change >= -0.03 for change in changes[1:]),
    }
    outcome = stop_outcome(made, "estimate below the margin, twice", 0.03)
    assert (outcome["stopped_at"], outcome["named"]["step"], outcome["best"]["step"]) == (29, 9, 9)
    assert outcome["end"]["accuracy_change"] == pytest.approx(-0.2)


def test_counts_give_the_reference_and_the_level_of_a_loop():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(5, [0.5, 0.2, 0.2, 0.1], size=200)
    reference, level, has_one = reference_and_level(counts, rng)
    for row, answer, own, known in zip(counts, reference, level, has_one, strict=True):
        codes = "".join(code * n for code, n in zip("Tab-", row, strict=True))
        assert known == (loop_reference(codes) is not None)
        assert own == pytest.approx(loop_level(codes))
        assert row[answer] == row[:-1].max()


def test_a_simulated_student_loses_what_it_should():
    frequencies = Frequencies(np.array([[0.9, 0.05, 0.05], [1.0, 0.0, 0.0]]))
    rng = np.random.default_rng(0)
    runs = [simulate(frequencies, 64, 5, 16, (0.0, 0.1), rng) for _ in range(200)]
    healthy, lost = np.array([[one.change for one in found] for found in runs]).mean(axis=0)
    assert healthy == pytest.approx(0.0, abs=0.005)
    assert lost == pytest.approx(-0.1, abs=0.005)


def test_a_real_run_keeps_what_the_monitor_saw(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.health.run.HELD_OUT_PROBLEMS", 2)
    monkeypatch.setattr("benchmarks.health.run.FINAL_PROBLEMS", 2)
    monkeypatch.setattr("benchmarks.health.settings.MONITOR_PROMPTS", 12)
    setting = replace(SETTINGS["stability-m1-ungated"], steps=2, monitor_steps=2, more_base_samples=1)
    result = run("stability-m1-ungated", setting, 0)
    write_run(tmp_path / "a-seed0.json", result)
    assert load(tmp_path) == {"stability-m1-ungated": [json.loads(json.dumps(result))]}
    assert [one["step"] for one in result["measurements"]] == [0, 1, 2]
    assert [len(row) for row in result["measurements"][0]["answers"].split()] == [MONITOR_SAMPLES + 1] * 12
    assert result["log"]["teacher/refreshes"] == [0, 1] or result["log"]["teacher/refreshes"] == [1, 2]
    base, points = points_of(result)
    assert base.level.mean() == pytest.approx(result["measurements"][0]["agreement"], abs=1e-5)
    for point, one in zip(points, result["measurements"][1:], strict=True):
        # The offline count is the monitor's own
        assert point.agreement.mean() == pytest.approx(one["agreement"], abs=1e-5)
        assert point.change.mean() == pytest.approx(one["agreement_change"], abs=1e-5)
        assert point.tokens.mean() == pytest.approx(one["agreement_mean_tokens"], rel=1e-5)


def test_the_committed_runs_are_of_the_plan_and_agree_with_the_monitor():
    runs = load(RESULTS)
    assert {(name, run["seed"]) for name, results in runs.items() for run in results} <= set(planned_runs())
    for name, results in runs.items():
        for result in results:
            config = result["protocol"]["config"]
            # How often is measured changes nothing in the run
            same = {**SETTINGS[name].config, "seed": result["seed"], "monitor_steps": config["monitor_steps"]}
            assert config == same
            base, points = points_of(result, SETTINGS[name].base_samples or config["monitor_samples"])
            assert base.level.mean() == pytest.approx(result["measurements"][0]["agreement"], abs=1e-5)
            changes = [one["agreement_change"] for one in result["measurements"][1:]]
            assert [float(point.change.mean()) for point in points] == pytest.approx(changes, abs=1e-5)


def test_the_committed_summary_and_tables_are_made_from_the_committed_runs():
    summary = without_nan(summarize(load(RESULTS)))
    assert json.loads((RESULTS / "summary.json").read_text(encoding="utf-8")) == json.loads(json.dumps(summary))
    readme = Path("benchmarks/README.md").read_text(encoding="utf-8")
    assert with_tables(readme, summary) == readme
    shown = set(re.findall(r"<!-- health:([a-z-]+) -->", readme))
    assert shown <= set(tables(summary))


def test_the_rule_that_the_tables_call_planned_is_the_packages():
    for path in sorted(RESULTS.glob("*-seed*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        seen = seen_in(run)
        measured = [Measurement(one.step, one.mean_tokens, 0.5, one.change, one.high) for one in seen]
        ends = (n for n in range(len(measured)) if has_fallen(measured[: n + 1], 0.03))
        assert stop_at(seen, PLANNED, 0.03) == next(ends, None), path.name
