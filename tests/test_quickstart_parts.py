"""What the quickstart is made of: sampling, metrics, figures, and its own small rules."""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import save_tiny, tiny_llama
from trl_crisp.evaluation.metrics import paired_bootstrap_reduction, repeats_itself, share
from trl_crisp.evaluation.sampling import Completion, SamplingProgress, next_tokens, sample
from trl_crisp.report.figures import completion_length_figure, refresh_steps

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EOS = [5, 9]


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Wide enough for distributions that are not flat, so that rows end at different steps
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, 24, size=size).tolist() for size in (3, 11, 7, 1, 5, 9, 4, 6, 2, 8)]


# --- sampling


def test_greedy_equals_generate(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    # More tokens than the cache grows by at once, so that it has to grow
    cap_tokens = 150
    got = sample(model, prompts, max_new_tokens=cap_tokens, temperature=0, batch_size=4)
    for prompt, completion in zip(prompts, got, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=cap_tokens, do_sample=False)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_an_answer_ends_at_any_eos_and_keeps_it(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    got = sample(model, prompts * 4, max_new_tokens=40, temperature=1.0, top_p=1.0, top_k=0, seed=3)
    ended = [completion for completion in got if completion.ended_by_eos]
    assert {completion.token_ids[-1] for completion in ended} == set(EOS)
    for completion in got:
        assert not set(completion.token_ids[:-1]) & set(EOS)
        assert completion.ended_by_eos == (completion.token_ids[-1] in EOS)
        assert completion.ended_by_eos or len(completion.token_ids) == 40
    other = sample(model, prompts, max_new_tokens=40, seed=3, eos_token_ids={7})
    assert all(7 not in completion.token_ids[:-1] for completion in other)


def test_a_row_depends_neither_on_the_batch_nor_on_the_others(
    model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    arguments = {"max_new_tokens": 60, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1}
    together = sample(model, prompts, batch_size=len(prompts), **arguments)
    assert together == sample(model, prompts, batch_size=1, **arguments)
    assert together[:4] == sample(model, prompts[:4], batch_size=3, **arguments)
    assert together != sample(model, prompts, **{**arguments, "seed": 2})


def test_a_part_of_the_prompts_gives_the_same_answers_at_their_places(
    model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    arguments = {"max_new_tokens": 30, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1}
    told: dict[int, Completion] = {}
    whole = sample(model, prompts, on_completion=told.__setitem__, **arguments)
    assert [told[index] for index in range(len(prompts))] == whole
    places = [4, 1]
    assert sample(model, [prompts[place] for place in places], places=places, **arguments) == [whole[4], whole[1]]


def test_progress_counts_up_to_all_rows(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    model.train()
    reports: list[SamplingProgress] = []
    got = sample(model, prompts, max_new_tokens=20, batch_size=4, progress=reports.append)
    assert model.training
    model.eval()
    assert reports[-1].rows_done == reports[-1].rows == len(prompts)
    assert reports[-1].tokens == sum(len(completion.token_ids) for completion in got)
    assert reports[-1].left_at_most_s == 0
    assert all(report.left_at_most_s is None or report.left_at_most_s > 0 for report in reports[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_sampling_settings_that_make_no_sense_are_refused(
    model: LlamaForCausalLM, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, [[1]], **{"max_new_tokens": 2, **changes})  # type: ignore[arg-type]


def test_an_empty_prompt_and_a_missing_eos_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="place 1 has no tokens"):
        sample(model, [[1], []], max_new_tokens=2)
    kept, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with pytest.raises(ValueError, match="no eos_token_id"):
            sample(model, [[1]], max_new_tokens=2)
    finally:
        model.generation_config.eos_token_id = kept


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 3), (0.6, 4)])
def test_draws_have_the_cut_distribution(top_p: float, top_k: int) -> None:
    logits = [0.3, -1.2, 2.0, 0.0, 1.1, -0.4]
    temperature, draws = 0.8, 20_000
    # The oracle: plain loops over tokens sorted by probability
    weights = {token: math.exp(value / temperature) for token, value in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])[: top_k or None]
    total = sum(weights[token] for token in ranked)
    kept, reached = [], 0.0
    for token in ranked:
        if reached < top_p:
            kept.append(token)
        reached += weights[token] / total
    mass = sum(weights[token] for token in kept)
    # Evenly spaced numbers make the frequencies exact up to one draw at each border
    uniforms = (torch.arange(draws) + 0.5) / draws
    ids = next_tokens(
        torch.tensor([logits]).expand(draws, -1), uniforms, temperature=temperature, top_p=top_p, top_k=top_k
    )
    counts = torch.bincount(ids, minlength=len(logits)) / draws
    for token in range(len(logits)):
        expected = weights[token] / mass if token in kept else 0.0
        assert counts[token].item() == pytest.approx(expected, abs=1e-3)


def test_a_draw_never_leaves_the_support() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(3, -1)
    ids = next_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), temperature=1.0)
    assert ids.tolist() == [1, 2, 2]


# --- metrics


def test_the_interval_is_that_of_plain_loops() -> None:
    generator = np.random.default_rng(4)
    before = generator.integers(20, 400, size=40)
    after = (before * generator.uniform(0.3, 1.1, size=40)).round()
    got = paired_bootstrap_reduction(before, after, resamples=4000, seed=1)
    assert got.estimate == pytest.approx(1 - sum(after.tolist()) / sum(before.tolist()))
    other = np.random.default_rng(99)
    reductions = []
    for _ in range(4000):
        rows = [int(other.integers(40)) for _ in range(40)]
        reductions.append(1 - sum(float(after[row]) for row in rows) / sum(float(before[row]) for row in rows))
    reductions.sort()
    assert got.low == pytest.approx(reductions[100], abs=0.01)
    assert got.high == pytest.approx(reductions[3900], abs=0.01)


def test_interval_of_the_same_factor_everywhere_is_a_point() -> None:
    before = np.arange(1, 101)
    got = paired_bootstrap_reduction(before, 0.75 * before)
    assert (got.estimate, got.low, got.high) == pytest.approx((0.25, 0.25, 0.25))
    assert got.excludes(0)
    assert not got.excludes(got.estimate)


def test_interval_covers_a_known_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits, trials = 0, 200
    for trial in range(trials):
        before = generator.exponential(100, size=64)
        after = before * 0.8 + generator.normal(0, 20, size=64)
        got = paired_bootstrap_reduction(before, after, resamples=500, seed=trial)
        hits += not got.excludes(0.2)
    # 95% of 200 trials is 190, with a standard deviation of 3; percentile intervals of 64 problems run a little short
    assert 0.89 <= hits / trials <= 0.99


def test_samples_of_a_problem_are_averaged_first() -> None:
    before, after = np.array([[10, 30], [40, 40], [5, 15]]), np.array([[5, 15], [30, 30], [10, 10]])
    assert paired_bootstrap_reduction(before, after) == paired_bootstrap_reduction([20, 40, 10], [10, 30, 10])


@pytest.mark.parametrize(
    ("before", "after", "arguments", "message"),
    [
        ([1, 2], [1], {}, "2 problems before and 1 after"),
        ([1], [1], {}, "no interval"),
        ([0, 0], [1, 1], {}, "length 0"),
        ([1, 2], [1, 2], {"confidence": 95}, "confidence is 95"),
        ([[[1]]], [[[1]]], {}, "shape"),
    ],
)
def test_an_interval_that_is_not_defined_is_refused(
    before: list, after: list, arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap_reduction(before, after, **arguments)  # type: ignore[arg-type]


def test_a_share_is_of_at_least_one_flag() -> None:
    assert share([True, False, False, True]) == 0.5
    with pytest.raises(ValueError, match="no answers"):
        share([])


WORKED = (
    "John starts with 35 apples and 3 times as many kiwis, which is 105.\nHe buys 93 apples and 93 - 38 = 55 kiwis.\n"
    "35 + 93 = 128 apples. 105 + 55 = 160 kiwis. 128 + 160 = 288.\nThe answer is 288."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        (" \n", False),
        ("4", False),
        (WORKED, False),
        # Lists and short runs are no loops
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22", False),
        ("1, 1, 1, 1, 1, 1", False),
        (WORKED + "\n" + WORKED, False),
        # Loops at the end, whole or cut
        (WORKED + " So the answer is 288." * 4, True),
        (WORKED + " So the answer is 288." * 3, False),
        (WORKED + (" So the answer is 288." * 8)[:-9], True),
        (WORKED + "0" * 60, True),
        (WORKED + "0" * 50, False),
        (WORKED + " So the answer is 288." * 8 + "\n\n", True),
        # Left again: only a tail that compresses 10x tells
        ("no no " * 20 + WORKED, False),
        ("no no " * 2000 + WORKED, True),
        # A loop outside of the last 10,000 characters does not count
        ("no no " * 2000 + " ".join(map(str, range(3000))), False),
    ],
)
def test_loops_at_the_end_are_repetition_and_worked_solutions_are_not(text: str, expected: bool) -> None:
    assert repeats_itself(text) is expected


def test_the_loop_rule_agrees_with_a_plain_search() -> None:
    def ends_in_loop(text: str) -> bool:
        text = text.rstrip()
        for period in range(1, len(text) // 4 + 1):
            span = max(4 * period, 60)
            tail = text[-span:]
            if len(tail) == span and all(tail[i] == tail[i + period] for i in range(span - period)):
                return True
        return False

    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        unit = "".join(generator.choice(list("ab "), size=generator.integers(1, 25)))
        text = "x" + unit * int(generator.integers(1, 9)) + unit[: generator.integers(len(unit) + 1)]
        if len(text) < 900:  # so short that the first rule says no
            assert repeats_itself(text) == ends_in_loop(text), text
            seen.add(repeats_itself(text))
    assert seen == {False, True}


# --- figures


def history() -> list[dict[str, float]]:
    refreshes = [0, 0, 1, 1, 1, 2]
    rows = [
        {"step": i + 1, "completions/mean_length": 90.0 - i, "teacher/refreshes": count, "loss": 0.1}
        for i, count in enumerate(refreshes)
    ]
    return [*rows, {"step": 6, "train_runtime": 1.0}]


def test_refreshes_are_where_their_count_grows() -> None:
    assert refresh_steps(history()) == [3, 6]
    assert refresh_steps([{"step": 1, "loss": 0.0}]) == []


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_written(tmp_path: Path, ending: str) -> None:
    path = completion_length_figure(history(), tmp_path / "new" / f"length.{ending}")
    assert path.stat().st_size > 5_000
    assert path.read_bytes().startswith(b"\x89PNG") == (ending == "png")


def test_a_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="None of the 1 log entries"):
        completion_length_figure([{"step": 1, "loss": 0.1}], tmp_path / "length.png")


def test_report_and_metrics_import_no_torch() -> None:
    code = "import sys, trl_crisp.report.figures, trl_crisp.evaluation.metrics as m; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the quickstart's own


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 12 and then 1,234.50.", 1234.5), ("it is -3", -3.0), ("none", None), ("", None), ("5 of 7%", 7.0)],
)
def test_the_last_number_of_a_text_is_read(text: str, number: float | None) -> None:
    assert load_example("quickstart").last_number(text) == number


def test_a_model_directory_is_used_again_only_with_its_weights(tmp_path: Path) -> None:
    example = load_example("get_smollm2")
    assert example.read_source(tmp_path) is None
    (tmp_path / example.WEIGHTS).write_bytes(b"weights")
    sha256 = example._sha256(tmp_path / example.WEIGHTS)
    source = {"source": "package", "name": example.PACKAGE, "weights_sha256": sha256}
    (tmp_path / example.MARKER).write_text(json.dumps(source))
    assert example.get_smollm2(tmp_path) == source
    (tmp_path / example.WEIGHTS).write_bytes(b"others")
    assert example.read_source(tmp_path) is None
    (tmp_path / example.MARKER).write_text("{")
    assert example.read_source(tmp_path) is None


def test_held_out_problems_are_neither_trained_on_nor_repeated() -> None:
    quickstart = load_example("quickstart")
    args = argparse.Namespace(quick=True, seed=0)
    every = [problem["question"] for problem in quickstart.held_out_problems(args, set())]
    assert len(set(every)) == len(every) == quickstart.QUICK_HELD_OUT_ROWS
    others = [problem["question"] for problem in quickstart.held_out_problems(args, {every[0]})]
    assert others[:-1] == every[1:]


def test_the_layout_of_the_weights_changes_no_value() -> None:
    quickstart = load_example("quickstart")
    model = tiny_llama(tie_word_embeddings=True)
    ids = torch.tensor([[3, 5, 7]])
    before = model(ids).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    quickstart.set_weight_layout(model, columns_first=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.stride() == (1, model.lm_head.weight.shape[0])
    torch.testing.assert_close(model(ids).logits, before)
    quickstart.set_weight_layout(model, columns_first=False)
    for name, weight in model.state_dict().items():
        assert weight.is_contiguous()
        assert torch.equal(weight, weights[name])


def test_the_quickstart_runs_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = load_example("quickstart")
    save_tiny(tmp_path / "tiny")
    arguments = ["quickstart.py", "--quick", "--model", str(tmp_path / "tiny"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    # Its filters of warnings and its quiet libraries are for a script, not for the tests after this one
    monkeypatch.setattr(quickstart, "quiet", lambda: None)
    monkeypatch.setattr(quickstart, "QUICK_CAP_TOKENS", 6)
    quickstart.main()
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "Using the answers in" not in capsys.readouterr().out
    quickstart.main()
    output = capsys.readouterr().out
    second = json.loads((tmp_path / "out" / "results.json").read_text())

    assert "Using the answers in" in output
    assert (first["before_reused"], second["before_reused"]) == (False, True)
    assert first["answers"]["before"] == second["answers"]["before"]
    assert "trl-crisp train" in output
    assert output.count("Problem") == 3
    steps = [entry for entry in second["log_history"] if "loss" in entry]
    assert [entry["teacher/refreshes"] for entry in steps] == [0, 1]
    assert (tmp_path / "out" / "length.png").stat().st_size > 5_000
    LlamaForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for side in ("before", "after"):
        for prompt in ("plain", "concise"):
            answers = second["answers"][side][prompt]
            mean_tokens = sum(answer["tokens"] for answer in answers) / len(answers)
            assert second["summary"][side][prompt]["mean_tokens"] == pytest.approx(mean_tokens)
