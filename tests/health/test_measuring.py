"""Accuracy and length during training: the numbers are those of `trl-crisp eval`, the training is left alone, the best is kept."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.tiny_models import save_tiny
from trl_crisp import CRISPConfig, CRISPTrainer
from trl_crisp.evaluation.evaluating import evaluate
from trl_crisp.evaluation.results import load_results
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.attach import attach_health
from trl_crisp.health.measuring import BenchmarkArguments, BenchmarkCallback
from trl_crisp.run.identity import run_id_of, start_run
from trl_crisp.train import main, parse_args, run

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    save_tiny(directory / "model", "qwen3")
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]
    (directory / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": [{"role": "user", "content": f"What is {i} + 1?"}]} for i in range(12)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return directory


def settings(files: Path, model: Path | None = None) -> EvaluationSettings:
    return EvaluationSettings(
        model=str(model or files / "model"),
        benchmark=str(files / "own.jsonl"),
        samples=2,
        max_new_tokens=24,
        batch_size=5,
    )


def trainer_of(
    files: Path, output_dir: Path, peft_config: LoraConfig | None = None, callbacks=None, **fields
) -> CRISPTrainer:
    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
    values = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_completion_length": 8,
        "logging_steps": 1,
        "save_steps": 2,
        "teacher_sync_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    args = CRISPConfig(str(output_dir), **{**values, **fields})
    return CRISPTrainer(
        model=str(files / "model"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
        callbacks=callbacks,
    )


class Scripted(BenchmarkCallback):
    """The rule and its book-keeping, with measurements that are given: (accuracy, mean tokens) by step."""

    given: dict[int, tuple[float, float]]
    truncated = 0.0

    def _measure(self, args, state):
        accuracy, mean_tokens = self.given[state.global_step]
        values = {"accuracy": accuracy, "mean_tokens": mean_tokens, "truncated": self.truncated}
        self.trainer.log({f"eval_{self.name}_{key}": value for key, value in values.items()})
        return accuracy, mean_tokens


def scripted(files: Path, output_dir: Path, given: dict[int, tuple[float, float]], **fields):
    trainer = trainer_of(files, output_dir, save_strategy="no", max_steps=max(given), **fields)
    callback = Scripted(trainer, settings(files), every_steps=1, max_accuracy_drop=0.02)
    callback.given = given
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def measurements(history: list[dict]) -> dict[int, dict]:
    return {
        entry["step"]: {k: v for k, v in entry.items() if "runtime" not in k and k not in ("epoch", "step")}
        for entry in history
        if "eval_own_accuracy" in entry
    }


@pytest.fixture(scope="module")
def measured(files, tmp_path_factory):
    trainer = trainer_of(files, tmp_path_factory.mktemp("measured"))
    trainer.add_callback(BenchmarkCallback(trainer, settings(files), every_steps=2))
    trainer.train()
    return trainer


def change_of(interval: dict[str, float]) -> dict[str, float]:
    names = {"change": "estimate", "change_low": "low", "change_high": "high"}
    return {f"eval_own_accuracy_{name}": interval[field] for name, field in names.items()}


def test_the_log_has_the_numbers_of_the_command_on_the_checkpoint(measured, files, tmp_path):
    output_dir = Path(measured.args.output_dir)
    points = measurements(measured.state.log_history)
    assert list(points) == [0, 2, 4]
    for step, model in ((0, files / "model"), (2, output_dir / "checkpoint-2"), (4, output_dir / "checkpoint-4")):
        baseline = load_results(tmp_path / "0") if step else None
        by_command = evaluate(settings(files, model), tmp_path / str(step), baseline=baseline)
        along = load_results(output_dir / "evaluation" / "own" / f"step-{step}")
        assert along["problems"] == by_command["problems"], step
        assert along["protocol"]["step"] == step
        assert along["protocol"]["model"] == f"{files / 'model'} at step {step}"
        assert along["protocol"]["trained_from"] == str(files / "model")
        assert along["tokens_per_s"] > 0
        summary = by_command["summary"]["24"]["all"]
        base_tokens = points[0]["eval_own_mean_tokens"]
        assert points[step] == {
            "eval_own_accuracy": summary["accuracy"],
            "eval_own_mean_tokens": summary["mean_tokens"],
            "eval_own_reduction": 1 - summary["mean_tokens"] / base_tokens,
            "eval_own_truncated": summary["truncated"],
            **({} if step == 0 else change_of(by_command["comparison"]["24"]["accuracy_change"])),
        }
    texts = [(output_dir / "evaluation" / "own" / f"step-{step}" / "samples.jsonl").read_text() for step in (0, 4)]
    assert texts[0].partition("\n")[2] != texts[1].partition("\n")[2], "training changed no answer"


def test_an_adapter_is_measured_with_the_students_weights_not_the_teachers(files, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = trainer_of(files, tmp_path / "run", lora, learning_rate=1.0, max_steps=2, teacher_sync_steps=50)
    trainer.add_callback(BenchmarkCallback(trainer, settings(files), every_steps=2))
    trainer.train()
    along = {
        step: load_results(tmp_path / "run" / "evaluation" / "own" / f"step-{step}")["problems"] for step in (0, 2)
    }
    for step, model in ((0, files / "model"), (2, tmp_path / "run" / "checkpoint-2")):
        assert along[step] == evaluate(settings(files, model), tmp_path / str(step))["problems"], step


def test_the_training_is_left_alone(measured, files, tmp_path):
    alone = trainer_of(files, tmp_path)
    alone.train()
    for (name, ours), theirs in zip(
        measured.model.state_dict().items(), alone.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name

    def lines(trainer):
        return [
            {k: v for k, v in entry.items() if "time" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]

    assert lines(measured) == lines(alone)
    assert measured.model.training == alone.model.training


class _Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_killed_run_resumes_with_the_base_that_it_measured(measured, files, tmp_path):
    trainer = trainer_of(files, tmp_path)
    trainer.add_callback(BenchmarkCallback(trainer, settings(files), every_steps=2))
    trainer.add_callback(_Killed())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stale = tmp_path / "evaluation" / "own" / "step-4"
    stale.mkdir()
    (stale / "samples.jsonl").write_text("left by another run\n")
    again = trainer_of(files, tmp_path)
    again.add_callback(BenchmarkCallback(again, settings(files), every_steps=2))
    again.train(resume_from_checkpoint=True)
    assert measurements(again.state.log_history) == measurements(measured.state.log_history)


class _KilledAtOnce(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise KeyboardInterrupt


def run_in(files, output_dir, *more, resume=None):
    trainer = trainer_of(files, output_dir, callbacks=list(more))
    trainer.add_callback(BenchmarkCallback(trainer, settings(files), every_steps=2))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_each_run_keeps_its_base_for_a_resume(measured, files, tmp_path):
    results = tmp_path / "evaluation" / "own"
    first = run_in(files, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_in(files, tmp_path, _KilledAtOnce())
    later = load_results(results / "step-0")["protocol"]["run_id"]
    assert later != first.run_id
    assert load_results(results / f"step-0-{first.run_id}")["protocol"]["run_id"] == first.run_id

    # A measurement that was cut off is of no run
    aside = (results / "step-0").rename(results / "aside")
    (results / "step-0").mkdir()
    (results / "step-0" / "samples.jsonl").write_text("cut off")
    resumed = run_in(files, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert load_results(results / "step-0")["protocol"]["run_id"] == first.run_id
    assert not (results / f"step-0-{first.run_id}").exists()
    assert measurements(resumed.state.log_history) == measurements(measured.state.log_history)

    (results / "step-0").rename(tmp_path / "moved")
    aside.rename(results / "step-0")
    owner = start_run(tmp_path)
    with pytest.raises(
        ValueError, match=rf"step-0: this is the base that run {later} measured .* run {first.run_id}, "
    ):
        run_in(files, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert load_results(results / "step-0")["protocol"]["run_id"] == later
    assert run_id_of(tmp_path) == owner
    (tmp_path / "moved").rename(results / f"step-0-{first.run_id}")
    run_in(files, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert load_results(results / f"step-0-{later}")["protocol"]["run_id"] == later


def test_a_measurement_that_fails_leaves_a_checkpoint(files, tmp_path):
    trainer = trainer_of(files, tmp_path, save_steps=100)
    trainer.add_callback(BenchmarkCallback(trainer, settings(files), every_steps=2))
    # A file where the directory of the results belongs
    in_the_way = tmp_path / "evaluation" / "own" / "step-2"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    with pytest.raises(OSError, match="step-2") as failed:
        trainer.train()
    assert "could not be measured after step 2. Its checkpoint was saved" in failed.value.__notes__[0]
    in_the_way.unlink()
    again = trainer_of(files, tmp_path, save_steps=100)
    again.add_callback(BenchmarkCallback(again, settings(files), every_steps=2))
    again.train(resume_from_checkpoint=True)
    # What failed is measured first
    assert list(measurements(again.state.log_history)) == [0, 2, 4]


@pytest.mark.parametrize(
    ("field", "value"),
    [("system", "Be kind."), ("prompt_template", "Now: {question}"), ("grader", "text"), ("seed", 7)],
)
def test_a_run_that_asks_otherwise_than_it_began_is_not_resumed(files, tmp_path, field, value):
    """And that is known before the first step, not at the next measurement."""
    trainer = trainer_of(files, tmp_path, save_steps=1)
    trainer.add_callback(BenchmarkCallback(trainer, settings(files), every_steps=100))
    trainer.train()
    again = trainer_of(files, tmp_path, save_steps=1)
    again.add_callback(BenchmarkCallback(again, replace(settings(files), **{field: value}), every_steps=100))
    with pytest.raises(ValueError, match=rf"measured its base in another way[^|]*\n  {field}: "):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_is_the_shortest_of_those_that_keep_the_accuracy(files, tmp_path):
    # Step 2 is the shortest, and too wrong; step 4 is shorter than step 1 and exactly two points off
    given = {0: (0.90, 100.0), 1: (0.95, 80.0), 2: (0.87, 40.0), 3: (0.90, 85.0), 4: (0.88, 60.0), 5: (0.90, 70.0)}
    trainer, callback = scripted(files, tmp_path, given, save_total_limit=1)
    assert trainer.state.best_global_step == 4
    assert trainer.state.best_metric == 60.0
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    # The best is the last that was saved
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    sentence = callback.describe_best(trainer.state)
    assert (
        "checkpoint-4 (fewest mean tokens on own, fewer than the base, with at most 2 points of accuracy" in sentence
    )
    assert "88.0% with 60 tokens; the base had 90.0% with 100 tokens" in sentence


def test_the_best_outlives_later_checkpoints(files, tmp_path):
    given = {0: (0.9, 100.0), 1: (0.9, 50.0), 2: (0.9, 90.0), 3: (0.9, 95.0)}
    trainer = trainer_of(files, tmp_path, save_steps=1, max_steps=3, save_total_limit=1)
    callback = Scripted(trainer, settings(files), every_steps=1)
    callback.given = given
    trainer.add_callback(callback)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("after", [(0.5, 40.0), (0.9, 100.0), (0.95, 120.0)])
def test_none_is_best_where_all_lost_the_accuracy_or_are_no_shorter(files, tmp_path, after):
    trainer, callback = scripted(files, tmp_path, {0: (0.9, 100.0), 1: after})
    assert trainer.state.best_model_checkpoint is None
    assert not list(tmp_path.glob("checkpoint-*"))
    assert callback.describe_best(trainer.state).startswith("No measured step qualifies as the best checkpoint")


def test_a_cap_that_cuts_the_bases_answers_is_said(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "truncated", 0.5)
    trainer, callback = scripted(files, tmp_path, {0: (0.9, 20.0), 1: (0.9, 15.0)})
    assert "50% of the base's answers were cut at 24 tokens, so these numbers say little" in callback.describe_best(
        trainer.state
    )


def flags(files: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(files / "model"), "--dataset_name", str(files / "rows.jsonl")),
        *("--output_dir", str(output_dir), "--max_steps", "2", "--max_completion_length", "8", "--save_steps", "1"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--report_to", "none"),
        *("--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1"),
        *("--eval_benchmark", str(files / "own.jsonl"), "--eval_benchmark_max_new_tokens", "24"),
        *more,
    ]


def test_the_script_measures_and_says_why_no_step_is_the_best(files, tmp_path, capsys):
    main(*parse_args(flags(files, tmp_path, "--eval_benchmark_steps", "1", "--eval_benchmark_limit", "3")))
    said = capsys.readouterr()
    why = "the base's own, 0.0%, is not above the margin of 1 points, so it cannot fall by more"
    assert f"No measured step can be the best checkpoint by accuracy on own: {why}." in said.out
    assert "sampling: 3/3" in said.err
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert list(measurements(state["log_history"])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (["--eval_benchmark", "math600"], ["'math600' is unknown", "math500"]),
        (["--eval_benchmark_steps", "0"], ["eval_benchmark_steps=0 must be at least 1"]),
        (["--eval_benchmark_max_accuracy_drop", "2"], ["is a share", "0.01 for a point"]),
        (["--eval_benchmark_max_new_tokens", "30000"], ["max_new_tokens=30000", "made for 4096", "or less"]),
    ],
)
def test_what_cannot_be_measured_is_said(files, tmp_path, capsys, more, phrases):
    with pytest.raises(SystemExit) as ended:
        run(flags(files, tmp_path, *more))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(phrase in said for phrase in phrases), said
    assert "Traceback" not in said


def test_without_math_verify_it_is_said_before_training(files, tmp_path, monkeypatch):
    trainer = trainer_of(files, tmp_path)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "trl-crisp\[eval\]"'):
        BenchmarkCallback(trainer, settings(files))


def test_nothing_is_measured_by_default():
    assert BenchmarkArguments().eval_benchmark is None


def test_the_protocol_of_training_is_that_of_the_command_but_for_what_takes_long():
    assert BenchmarkArguments().eval_benchmark_max_new_tokens == EvaluationSettings.max_new_tokens == 30_000
    assert BenchmarkArguments().eval_benchmark_samples == 1


def test_a_resumed_run_keeps_its_measurement(measured, files, tmp_path):
    trainer = trainer_of(files, tmp_path, max_steps=2)
    trainer.train()
    later = trainer_of(files, tmp_path)
    callback = BenchmarkCallback(later, settings(files), every_steps=2)
    later.add_callback(callback)
    with pytest.raises(ValueError, match=r"resumes after step 2, and its base was not measured on own"):
        later.train(resume_from_checkpoint=True)
    assert callback.describe_best(later.state) == "Nothing was measured on own."

    other = trainer_of(files, Path(measured.args.output_dir), max_steps=5)
    changed = EvaluationSettings(**{**settings(files).__dict__, "samples": 1})
    other.add_callback(BenchmarkCallback(other, changed, every_steps=2))
    with pytest.raises(ValueError, match=r"(?s)measured its base in another way.*samples: 2 before, 1 now"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("fields", "overrides", "message"),
    [
        ({"metric_for_best_model": "loss"}, {}, "a rule of its own"),
        ({}, {"engine": "vllm"}, "engine='vllm' has no effect"),
        ({}, {"instruction": "v1"}, "instruction='v1' has no effect"),
    ],
)
def test_what_would_have_no_effect_is_refused(files, tmp_path, fields, overrides, message):
    trainer = trainer_of(files, tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        BenchmarkCallback(trainer, EvaluationSettings(**{**settings(files).__dict__, **overrides}))


def test_it_comes_before_what_decides_by_it(files, tmp_path):
    trainer = trainer_of(files, tmp_path)
    attach_health(trainer)
    with pytest.raises(ValueError, match=r"after attach_health\(trainer\), so both would choose the best checkpoint"):
        BenchmarkCallback(trainer, settings(files))


def test_one_that_is_added_after_what_decides_is_refused(files, tmp_path):
    trainer = trainer_of(files, tmp_path)
    benchmark = BenchmarkCallback(trainer, settings(files))
    attach_health(trainer)
    trainer.add_callback(benchmark)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"was added after attach_health\(trainer\), so both would choose the best"):
        trainer.train()
    assert sorted(tmp_path.rglob("*")) == before


def test_two_benchmarks_are_refused(files, tmp_path):
    trainer = trainer_of(files, tmp_path)
    for _ in range(2):
        trainer.add_callback(BenchmarkCallback(trainer, settings(files)))
    with pytest.raises(ValueError, match=r"2 BenchmarkCallbacks \(own, own\) would each choose"):
        attach_health(trainer)


@pytest.mark.parametrize("setting", ["ddp", "zero3"])
def test_two_processes_give_the_numbers_of_one(setting, files, tmp_path):
    """Each answers its share; under ZeRO-3 the weights are gathered first."""
    if setting == "zero3":
        pytest.importorskip("deepspeed")
        launch = ["accelerate.commands.accelerate_cli", "launch", "--config_file", "tests/distributed/zero.yaml"]
        launch += ["--zero_stage", "3", "--main_process_port", "0"]
    else:
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launch]
    more = ["--bf16", "false", "--eval_benchmark_steps", "2", "--eval_benchmark_samples", "2", "--save_strategy", "no"]
    result = subprocess.run(
        [*command, "-m", "trl_crisp.train", *flags(files, tmp_path / "run", *more)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    along = load_results(tmp_path / "run" / "evaluation" / "own" / "step-0")
    # The default seed of training is not that of the command
    assert along["protocol"]["seed"] == 42
    alone = evaluate(EvaluationSettings(**{**settings(files).__dict__, "seed": 42}), tmp_path / "seed-42")
    assert along["problems"] == alone["problems"]
    assert load_results(tmp_path / "run" / "evaluation" / "own" / "step-2")["problems"]
