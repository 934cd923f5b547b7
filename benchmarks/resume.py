"""Kills a training run at many points, resumes it, and compares it bit by bit with an uninterrupted run.

A point is a place at which a 12-step run (M = 3, a checkpoint every 2 steps) is killed. There are three kinds:

- `step K`: in step K, right after the optimizer's step;
- `save K at P%`: while the checkpoint of step K is saved, after P percent of the interpreter's calls;
- `write K`: in the middle of writing a file of the checkpoint of step K (the kernel ends the process).

The resumed run survives if its weights, its teacher's weights and every logged value (except times) are the same bits.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEPS, SYNC_STEPS, SAVE_STEPS = 12, 3, 2
SAVE_PERCENTS = (10, 50, 90)
TUNINGS = ("full", "lora")
KINDS = ("periodic", "base", "ema", "live")
# Every file with weights is larger than this
WRITE_LIMIT_BYTES = 4096


@dataclass(frozen=True)
class Point:
    """Where to kill: `how` is "step", "save" or "write"; `percent` is the share of a save's calls before the kill."""

    how: str
    step: int
    percent: int = 0

    def __str__(self) -> str:
        return f"{self.how} {self.step}" + (f" at {self.percent}%" if self.how == "save" else "")


def all_points() -> list[Point]:
    """Return every step, three places in every save, and the middle of a write in every save."""
    saves = range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
    return [
        *(Point("step", step) for step in range(1, STEPS + 1)),
        *(Point("save", step, percent) for step in saves for percent in SAVE_PERCENTS),
        *(Point("write", step) for step in saves),
    ]


def try_point(tuning: str, kind: str, point: Point, reference: Path, directory: Path) -> str | None:
    """
    Kill one run, resume it, and compare.

    Args:
        tuning: "full" or "lora".
        kind: The teacher's schedule.
        point: Where to kill.
        reference: The directory that [`run_reference`] wrote.
        directory: The run's directory; removed if the run survived.

    Returns:
        `None` if the resumed run equals the reference, else what differs.
    """
    calls = json.loads((reference / "calls.json").read_text())
    status = _in_a_process(_train, tuning, kind, directory, point, calls)
    expected = signal.SIGXFSZ if point.how == "write" else signal.SIGKILL
    if status != -expected:
        return f"signal {expected} should have killed the process, but it ended with status {status}"
    status = _in_a_process(_train, tuning, kind, directory, None, calls)
    if status:
        return f"the resumed run ended with status {status}"
    differing = _compare(reference, directory)
    if differing is None:
        shutil.rmtree(directory)
    return differing


def run_reference(tuning: str, kind: str, directory: Path) -> None:
    """Run without a kill, and write the result and the number of calls of each save to `directory`."""
    if status := _in_a_process(_train, tuning, kind, directory, None, None):
        raise RuntimeError(f"the reference run of {tuning}, {kind} ended with status {status}")


def _in_a_process(target: Any, *args: Any) -> int:
    # A fork has the libraries imported already, so a new process starts in milliseconds
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _train(tuning: str, kind: str, directory: Path, point: Point | None, calls: dict[str, int] | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "output.txt").open("a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    warnings.simplefilter("ignore")
    trainer = _make_trainer(tuning, kind, directory)
    counts = _watch_saves(trainer, point, calls)
    if point is not None and point.how == "step":
        trainer.add_callback(_kill_in_step(point.step))
    trainer.train(resume_from_checkpoint=True)

    from safetensors.torch import save_file

    weights = {f"student.{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    weights |= {f"teacher.{name}": w.clone() for name, w in trainer.teacher.state_dict()["weights"].items()}
    save_file(weights, directory / "weights.safetensors")
    times = ("step_time", "train_")
    logs = [{k: v for k, v in log.items() if not k.startswith(times)} for log in trainer.state.log_history]
    (directory / "logs.json").write_text(json.dumps(logs))
    (directory / "calls.json").write_text(json.dumps(counts))


def _make_trainer(tuning: str, kind: str, directory: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    from tests.tiny_models import tiny_model, tiny_tokenizer
    from trl_crisp import CRISPConfig, CRISPTrainer

    schedule: dict[str, Any] = {"periodic": {"teacher_sync_steps": SYNC_STEPS}}.get(kind, {})
    schedule |= {"teacher_update_rate": 0.1} if kind == "ema" else {}
    args = CRISPConfig(
        str(directory),
        instruction="v1",
        teacher_model_kind=kind,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=6,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **schedule,
    )
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} + {i * i}?"}]} for i in range(20)]
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    return CRISPTrainer(
        model=tiny_model("llama"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer("llama"),
        peft_config=lora if tuning == "lora" else None,
    )


def _kill_in_step(step: int) -> Any:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return Kill()


def _watch_saves(trainer: Any, point: Point | None, calls: dict[str, int] | None) -> dict[str, int]:
    """Count the calls of each save, and kill the process in the save of `point`."""
    counts: dict[str, int] = {}
    save = trainer._save_checkpoint

    def watched(model: Any, trial: Any) -> None:
        step = trainer.state.global_step
        here = point is not None and point.step == step
        if here and point.how == "write":
            # Python ignores this signal. With the default handler it ends the process when the write reaches the limit
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (WRITE_LIMIT_BYTES, WRITE_LIMIT_BYTES))
        last = None
        if here and point.how == "save":
            assert calls is not None
            last = calls[str(step)] * point.percent // 100
        counts[str(step)] = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            counts[str(step)] += 1
            if counts[str(step)] == last:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            save(model, trial)
        finally:
            sys.setprofile(None)

    trainer._save_checkpoint = watched
    return counts


def _compare(reference: Path, resumed: Path) -> str | None:
    from safetensors.torch import load_file

    before, after = (load_file(directory / "weights.safetensors") for directory in (reference, resumed))
    if before.keys() != after.keys():
        return "other weights"
    for name, value in before.items():
        if value.numpy().tobytes() != after[name].numpy().tobytes():
            return f"the weights {name} differ"
    logs = [json.loads((directory / "logs.json").read_text()) for directory in (reference, resumed)]
    for one, other in zip(*logs, strict=True):
        if differing := [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]:
            return f"step {one.get('step')} logged another {differing[0]}: {one} and {other}"
    return None


def checkpoint_sizes(directory: Path) -> dict[str, dict[str, int]]:
    """Return the size of a checkpoint after a refresh, and the size of the teacher's files in it, in bytes."""
    sizes = {}
    for tuning in TUNINGS:
        run_reference(tuning, "periodic", directory / tuning)
        files = {p.name: p.stat().st_size for p in (directory / tuning / f"checkpoint-{STEPS}").iterdir()}
        teacher = sum(size for name, size in files.items() if name.startswith("teacher"))
        sizes[tuning] = {"bytes": sum(files.values()), "bytes_of_teacher": teacher, "files": len(files)}
    return sizes


def main() -> None:
    """Try every point of every combination and write the results."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Example: python -m benchmarks.resume --output benchmarks/results/resume.json",
    )
    parser.add_argument("--tuning", choices=TUNINGS, nargs="+", default=TUNINGS)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS, help="the teacher's schedule")
    parser.add_argument("--output", type=Path, default=Path("resume.json"))
    args = parser.parse_args()

    from importlib.metadata import version

    import torch
    from rich.progress import track

    # Imported before the forks, which inherit them
    import tests.tiny_models  # noqa: F401
    import trl_crisp.trainer  # noqa: F401

    torch.set_num_threads(1)
    started_s = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        combinations = [(tuning, kind) for tuning in args.tuning for kind in args.kind]
        for tuning, kind in combinations:
            run_reference(tuning, kind, Path(scratch) / f"{tuning}-{kind}")
        tries = [(tuning, kind, point) for tuning, kind in combinations for point in all_points()]
        for tuning, kind, point in track(tries, "killing and resuming"):
            reference = Path(scratch) / f"{tuning}-{kind}"
            differing = try_point(tuning, kind, point, reference, Path(scratch) / "run")
            rows.append({"tuning": tuning, "kind": kind, **asdict(point), "differing": differing})
            if differing:
                print(f"{tuning}, {kind}, {point}: {differing}", file=sys.stderr)
                shutil.rmtree(Path(scratch) / "run", ignore_errors=True)
        sizes = checkpoint_sizes(Path(scratch) / "sizes")
    survived = sum(row["differing"] is None for row in rows)
    result = {
        "schema": "trl-crisp resume 1",
        "protocol": {
            "run": f"{STEPS} steps, teacher_sync_steps {SYNC_STEPS}, save_steps {SAVE_STEPS}, save_total_limit 2, float32, CPU",
            "model": "a Llama of two layers, made in memory",
            "killed_by": {"step": "SIGKILL", "save": "SIGKILL", "write": f"a write past {WRITE_LIMIT_BYTES} bytes"},
            "compared": "all weights, the teacher's weights, all logged values but times: equal bits",
            "machine": f"{platform.machine()}, 1 thread",
            "versions": {name: version(name) for name in ("trl", "transformers", "peft", "accelerate", "torch")},
        },
        "tried": len(rows),
        "survived": survived,
        "checkpoint": sizes,
        "points": rows,
        "wall_s": round(time.monotonic() - started_s, 1),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{survived} of {len(rows)} points survived, in {result['wall_s']:.0f} s. Wrote {args.output}.")
    sys.exit(survived != len(rows))


if __name__ == "__main__":
    main()
