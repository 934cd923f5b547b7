"""Two real processes on CPUs: DDP and FSDP2 in one launch, DeepSpeed ZeRO-2 and ZeRO-3 in another."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed import distance, fsdp2
from tests.distributed.runs import RECORDED_RUNS, ZERO_RUN, ZERO_RUNS, Outcome, Run, alone, train

REPOSITORY = Path(__file__).parent.parent
ACCELERATE_CONFIG = Path(__file__).parent / "distributed" / "zero.yaml"
# Of one launch, of which the longer takes about a minute
TIMEOUT_S = 600


def launch(name: str, directory: Path) -> dict:
    """Run a launch of tests/distributed/worker.py in two processes, and return its outcomes by setting."""
    command = [sys.executable, "-m"]
    if name == "zero":
        config = ["--config_file", str(ACCELERATE_CONFIG), "--zero_stage", "2", "--main_process_port", "0"]
        command += ["accelerate.commands.accelerate_cli", "launch", *config]
    else:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distributed.worker", name, str(directory)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # Of the launch that a test runs under, if it does
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(variable, None)
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{name} failed:\n{output[-6000:]}"
    return torch.load(directory / f"{name}.pt", weights_only=False)


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    return launch("torchrun", tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def ddp(torchrun):
    return torchrun["ddp"]


@pytest.fixture(scope="module")
def sharded(torchrun):
    return torchrun["fsdp2"]


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return launch("zero", tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def zero2(zero):
    return zero["zero2"]


@pytest.fixture(scope="module")
def zero3(zero):
    return zero["zero3"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return a function that trains a run in this process, once."""
    outcomes: dict[Run, Outcome] = {}

    def train_once(run: Run) -> Outcome:
        if run not in outcomes:
            outcomes[run] = train(run, tmp_path_factory.mktemp("alone"))
        return outcomes[run]

    return train_once


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-3) -> None:
    """Compare tensors by name, relative to the largest of each."""
    assert actual.keys() == expected.keys()
    for name in expected:
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            actual[name].float(),
            expected[name].float(),
            rtol=rtol,
            atol=rtol * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_same_training(actual: Outcome, expected: Outcome, rtol: float = 1e-3) -> None:
    # A logged loss is rounded to 6 digits
    assert actual.losses == pytest.approx(expected.losses, rel=rtol, abs=2e-6)
    assert actual.per_token == pytest.approx(expected.per_token, rel=rtol, abs=2e-6)
    assert any(change.abs().max() > 0 for change in expected.change.values())
    assert_close(actual.change, expected.change, rtol)


def assert_teacher_is_student_of_last_refresh(outcome: Outcome) -> None:
    assert outcome.refreshes == 1
    for name, weight in outcome.teacher.items():
        assert torch.equal(weight, outcome.student_at_refresh[name]), name


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        *(("ddp", name) for name in RECORDED_RUNS),
        *(("zero2", name) for name in ZERO_RUNS),
        *(("zero3", name) for name, run in ZERO_RUNS.items() if run.works_under_zero3),
    ],
)
def test_two_processes_train_as_one_on_the_same_rollouts(request, one_process, setting, name):
    """
    Losses to float32 rounding, updates, and what vLLM would receive. A process whose rollouts are all masked takes part, and the others
    train as without it.
    """
    outcomes = request.getfixturevalue(setting)
    run, outcome = RECORDED_RUNS[name], (outcomes if setting == "ddp" else outcomes["recorded"])[name]
    assert len(outcome.masked_rows) == (5 if run.masked_rank is not None else 1)
    expected = one_process(replace(alone(run), tool_rows=outcome.masked_rows, masked_rank=None))
    assert outcome.losses[0] == pytest.approx(expected.losses[0], rel=2e-6, abs=2e-6)
    # An update amplifies the rounding of the step before it
    assert outcome.losses[1:] == pytest.approx(expected.losses[1:], rel=5e-6, abs=2e-6)
    assert_close(outcome.pushed, expected.pushed)
    if run.optimizer == "sgd":
        assert_same_training(outcome, expected)
        return
    # AdamW divides by the gradient's own size, so rounding moves single values of tiny gradients far
    assert outcome.change.keys() == expected.change.keys()
    errors, changes = (
        sum(tensor.norm() ** 2 for tensor in tensors) ** 0.5
        for tensors in ([outcome.change[n] - c for n, c in expected.change.items()], expected.change.values())
    )
    assert errors <= 1e-3 * changes
    assert changes > 0


def test_normalizations_differ(one_process):
    # What the tests of this file hold on to would be empty if the rollouts made no difference between them
    by_sequence, by_token = (one_process(Run(normalization=n)).losses[0] for n in ("sequence", "token"))
    assert by_sequence != pytest.approx(by_token, rel=1e-2)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_split_into_micro_batches_changes_nothing(one_process, normalization, lora):
    run = Run(normalization=normalization, lora=lora)
    for batch, accumulation in ((4, 2), (2, 4), (1, 8)):
        split = replace(run, batch=batch, accumulation=accumulation)
        assert_same_training(one_process(split), one_process(run))


@pytest.mark.parametrize(
    ("setting", "name", "resumed_name", "refreshes"),
    [
        ("ddp", "saved", "resumed", 1),
        ("zero2", "full", "resumed", 1),
        ("zero3", "full", "resumed", 1),
        # Inside the second epoch, whose order of rows is another
        ("ddp", "full-later", "full-resumed-later", 2),
        ("ddp", "lora-later", "lora-resumed-later", 2),
        ("zero2", "full-later", "full-resumed-later", 2),
        ("zero2", "lora-later", "lora-resumed-later", 2),
        ("zero3", "full-later", "full-resumed-later", 2),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(request, setting, name, resumed_name, refreshes):
    """The teacher was refreshed before the checkpoint, and is sharded under ZeRO-3."""
    outcomes = request.getfixturevalue(setting)
    whole, resumed = outcomes[name], outcomes[resumed_name]
    assert resumed.losses == whole.losses
    assert resumed.refreshes == whole.refreshes == refreshes
    for side in ("change", "teacher"):
        for parameter, value in getattr(whole, side).items():
            assert torch.equal(getattr(resumed, side)[parameter], value), (side, parameter)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_zero2_trains_as_one_process(zero2, one_process, name):
    run = replace(ZERO_RUN, lora=name == "lora")
    assert_same_training(zero2[name], one_process(alone(run)))


def test_zero2_refreshes_the_teacher(zero2):
    assert_teacher_is_student_of_last_refresh(zero2["full"])
    assert zero2["lora"].refreshes == 1
    adapter = zero2["lora"]
    assert adapter.teacher.keys() == adapter.change.keys()
    for name, weight in adapter.teacher.items():
        assert torch.equal(weight, adapter.student_at_refresh[name]), name


@pytest.mark.parametrize("name", ["full", "path"])
def test_zero3_trains_as_one_process(zero3, one_process, name):
    assert_same_training(zero3[name], one_process(alone(ZERO_RUN)))


@pytest.mark.parametrize("name", ["full", "path", "tied"])
def test_zero3_refreshes_the_teacher(zero3, name):
    assert_teacher_is_student_of_last_refresh(zero3[name])


def test_zero3_gathers_each_head_once_for_a_micro_batch(zero3):
    """In the forward: the backward has the gradients already. The teacher's; DeepSpeed keeps the student's, which is small."""
    assert zero3["path"].head_gathers == [1] * (ZERO_RUN.accumulation * ZERO_RUN.steps)


def test_zero3_copy_of_a_loaded_model_draws_nothing_from_the_rollouts_random_stream(zero3):
    assert torch.equal(zero3["path"].random_state, zero3["full"].random_state)


def test_zero3_keeps_tied_weights_tied(zero3):
    assert "lm_head.weight" in zero3["path"].teacher
    assert "lm_head.weight" not in zero3["tied"].teacher


def test_zero3_pushes_whole_weights_under_the_names_of_the_model(zero3):
    for name in ("full", "tied"):
        assert all(tensor.numel() for tensor in zero3[name].pushed.values())
        assert ("lm_head.weight" in zero3[name].pushed) == (name == "full")


@pytest.mark.parametrize("name", ["lora", "live"])
def test_zero3_with_a_teacher_in_the_students_modules_is_an_error_that_names_the_way_out(zero3, name):
    assert "does not work under DeepSpeed ZeRO-3" in zero3[name]
    assert "ZeRO-2 or FSDP2" in zero3[name]


@pytest.mark.parametrize(("stage", "name"), [("zero2", "best"), ("zero2", "best-lora"), ("zero3", "best")])
def test_a_run_ends_with_the_weights_of_its_best_checkpoint(request, stage, name):
    *by_steps, end = request.getfixturevalue(stage)[name]
    assert len(by_steps) == 3
    for parameter, weight in end.items():
        # DeepSpeed keeps the teacher's adapter, which is no part of the student, as it was at the end
        if ".teacher." not in parameter:
            assert torch.equal(weight, by_steps[0][parameter]), parameter
    assert any(not torch.equal(weight, by_steps[2][parameter]) for parameter, weight in end.items())


@pytest.mark.parametrize("launch", ["ddp", "zero2"])
def test_the_distance_of_two_processes_is_that_of_one(launch, request, tmp_path):
    outcome = request.getfixturevalue(launch)["distance"]
    assert outcome.logged[0] == pytest.approx(distance.measure(tmp_path).logged[0], abs=1e-5)
    assert list(outcome.logged) == [0, 1, 2]
    assert outcome.found == pytest.approx(outcome.expected, abs=1e-4)
    assert outcome.is_restored


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sampling", "process 1: RuntimeError: no memory is left"),
        ("grading", "process 0: ValueError: no such answer"),
    ],
)
def test_a_measurement_that_fails_on_one_process_ends_all_after_a_checkpoint(ddp, what, message):
    outcomes = ddp["failing"][what]
    assert len(outcomes) == 2
    for error, note, is_saved, measured in outcomes:
        assert error == message
        assert "could not be measured after step 1. Its checkpoint was saved" in note
        assert is_saved
        # What failed is made up for
        assert measured == [0, 1, 3]


def test_zero3_has_no_distance_and_says_so(zero3):
    assert "monitor_distance: DeepSpeed ZeRO-3 partitions the weights" in zero3["distance"]


@pytest.mark.parametrize("name", fsdp2.CASES)
def test_fsdp2_trains_as_one_process(sharded, name):
    actual, expected = sharded[name]["sharded"], sharded[name]["whole"]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert_close(actual["change"], expected["change"], rtol=1e-3)
    assert_close(actual["averages"], expected["averages"], rtol=1e-6)


@pytest.mark.parametrize("name", fsdp2.CASES)
def test_fsdp2_pushes_what_one_process_pushes(sharded, name):
    """With LoRA merged from shards, and nothing of the adapters."""
    pushed, expected = sharded[name]["sharded"]["pushed"], sharded[name]["whole"]["pushed"]
    assert not [key for key in pushed if "lora" in key or "base_layer" in key]
    assert_close(pushed, expected, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in fsdp2.CASES.items() if case.kind == "periodic"])
def test_fsdp2_refreshes_the_teacher_shard_by_shard(sharded, name):
    outcome = sharded[name]["sharded"]
    assert outcome["teacher"]
    for parameter, weight in outcome["teacher"].items():
        source = outcome["student_at_refresh"][parameter.replace(".teacher.", ".default.")]
        assert torch.equal(weight, source.to(weight.dtype)), parameter


@pytest.mark.parametrize("name", fsdp2.CASES)
def test_fsdp2_teacher_comes_back_from_a_checkpoint(sharded, name):
    outcome = sharded[name]["sharded"]
    assert outcome["teacher"].keys() == outcome["restored"]["teacher"].keys()
    for side in ("teacher", "averages"):
        for parameter, weight in outcome[side].items():
            assert torch.equal(outcome["restored"][side][parameter], weight), parameter
