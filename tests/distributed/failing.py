"""A measurement that fails on one of several processes, and what each of them then says."""

from pathlib import Path

from accelerate.utils import gather_object

from tests.helpers import make_trainer, rows
from trl_crisp import CRISPTrainer
from trl_crisp.health import student_answers
from trl_crisp.health.attach import attach_health
from trl_crisp.health.failures import MeasurementError

STEP = 1


def fail(directory: Path) -> dict[str, list[tuple[str, str, bool, list[int]]]]:
    """
    Train, with a measurement before step 2 that fails, and resume.

    Returns:
        By what failed, for each process: the error, its note, whether the checkpoint is whole, and the steps that the resumed run has
        measured.
    """
    return {name: _train(name, directory / name) for name in ("sampling", "grading")}


def _make(directory: Path) -> CRISPTrainer:
    return make_trainer(
        directory,
        dataset=rows(24),
        monitor_prompts=8,
        monitor_samples=2,
        monitor_steps=2,
        per_device_train_batch_size=2,
        max_steps=3,
    )


def _train(name: str, directory: Path) -> list[tuple[str, str, bool, list[int]]]:
    trainer = _make(directory)
    fails_at = {"sampling": 1, "grading": 0}[name]

    def is_time() -> bool:
        return trainer.accelerator.process_index == fails_at and trainer.state.global_step == STEP

    def answer_of(_: str) -> str:
        if name == "grading" and is_time():
            raise ValueError("no such answer")
        # So each prompt has a majority answer
        return "same"

    real = student_answers.sample_problems

    def sample_problems(*args: object) -> None:
        if name == "sampling" and is_time():
            raise RuntimeError("no memory is left")
        real(*args)  # type: ignore[arg-type]

    student_answers.sample_problems = sample_problems
    attach_health(trainer, answer_of)
    try:
        trainer.train()
    except MeasurementError as error:
        saved = directory / f"checkpoint-{STEP}" / "trainer_state.json"
        outcome = str(error), error.__notes__[0], saved.is_file()
    else:
        outcome = "it did not fail", "", False
    finally:
        student_answers.sample_problems = real
    resumed = _make(directory)
    attach_health(resumed, lambda _: "same")
    resumed.train(resume_from_checkpoint=True)
    measured = [log["step"] for log in resumed.state.log_history if "eval_agreement" in log]
    return gather_object([(*outcome, measured)])
