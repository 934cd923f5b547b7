"""What each process of a launch in test_distributed.py runs: `-m tests.distributed.worker LAUNCH OUTPUT_DIRECTORY`."""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.distributed import distance, failing, fsdp2, runs
from tests.distributed.runs import (
    LATER_EPOCH_RUNS,
    RECORDED_RUNS,
    SAVING_RUN,
    SCALE,
    ZERO_RUN,
    ZERO_RUNS,
    Outcome,
    Run,
    end_with_the_best,
    make_trainer,
)
from tests.tiny_models import save_tiny

Outcomes = dict[str, Any]


def train(run: Run, directory: Path, checkpoint: str | None = None) -> Outcome:
    _forget_launch()
    return runs.train(run, directory, checkpoint)


def ddp(directory: Path) -> Outcomes:
    outcomes: Outcomes = {name: train(run, directory) for name, run in RECORDED_RUNS.items()}
    outcomes |= {"saved": train(SAVING_RUN, directory), "resumed": _resume(SAVING_RUN, directory)}
    outcomes |= _resumed_in_a_later_epoch(LATER_EPOCH_RUNS, directory)
    outcomes["distance"] = distance.measure(directory / "distance")
    outcomes["failing"] = failing.fail(directory / "failing")
    return outcomes


def zero2(directory: Path) -> Outcomes:
    outcomes: Outcomes = {"full": train(SAVING_RUN, directory), "resumed": _resume(SAVING_RUN, directory)}
    outcomes |= _resumed_in_a_later_epoch(LATER_EPOCH_RUNS, directory)
    outcomes["lora"] = train(replace(ZERO_RUN, lora=True), directory)
    outcomes["recorded"] = {name: train(run, directory) for name, run in ZERO_RUNS.items()}
    for name, lora in (("best", False), ("best-lora", True)):
        _forget_launch()
        outcomes[name] = end_with_the_best(replace(ZERO_RUN, lora=lora), directory / name)
    _forget_launch()
    outcomes["distance"] = distance.measure(directory / "distance")
    return outcomes


def zero3(directory: Path) -> Outcomes:
    # A model in memory, and models that are partitioned while they are loaded
    paths = {"path": directory / "untied", "tied": directory / "tied"}
    if os.environ["RANK"] == "0":
        save_tiny(paths["path"], scale=SCALE)
        save_tiny(paths["tied"], tie_word_embeddings=True)
    outcomes: Outcomes = {"full": train(SAVING_RUN, directory), "resumed": _resume(SAVING_RUN, directory)}
    outcomes |= _resumed_in_a_later_epoch({"full": LATER_EPOCH_RUNS["full"]}, directory)
    for name, path in paths.items():
        outcomes[name] = train(replace(ZERO_RUN, model=str(path)), directory)
    _forget_launch()
    outcomes["best"] = end_with_the_best(ZERO_RUN, directory / "best")
    recorded = {name: run for name, run in ZERO_RUNS.items() if run.works_under_zero3}
    outcomes["recorded"] = {name: train(run, directory) for name, run in recorded.items()}
    for name, run in (("lora", replace(ZERO_RUN, lora=True)), ("live", replace(ZERO_RUN, kind="live"))):
        _forget_launch()
        try:
            make_trainer(run, directory)
        except ValueError as error:
            outcomes[name] = str(error)
    _forget_launch()
    try:
        distance.measure(directory / "distance")
    except ValueError as error:
        outcomes["distance"] = str(error)
    return outcomes


def fsdp2_cases(directory: Path) -> Outcomes:
    outcomes: Outcomes = {}
    for name, case in fsdp2.CASES.items():
        outcomes[name] = {"sharded": fsdp2.train(case, directory, sharded=True)}
        if dist.get_rank() == 0:
            outcomes[name]["whole"] = fsdp2.train(case, directory, sharded=False)
    return outcomes


def torchrun(directory: Path) -> Outcomes:
    # FSDP2's cases use the process group that the trainer has made
    return {"ddp": ddp(_made(directory / "ddp")), "fsdp2": fsdp2_cases(_made(directory / "fsdp2"))}


def zero(directory: Path) -> Outcomes:
    import deepspeed

    # Only inference uses it, and DeepSpeed would compile it at its first start, for half a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Launched with stage 2
    outcomes = {"zero2": zero2(_made(directory / "zero2"))}
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "3"
    return outcomes | {"zero3": zero3(_made(directory / "zero3"))}


LAUNCHES: dict[str, Callable[[Path], Outcomes]] = {"torchrun": torchrun, "zero": zero}


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def _resume(run: Run, directory: Path) -> Outcome:
    return train(run, directory / "resumed", checkpoint=str(directory / f"checkpoint-{run.save_steps}"))


def _resumed_in_a_later_epoch(by_name: dict[str, Run], directory: Path) -> Outcomes:
    outcomes: Outcomes = {}
    for name, run in by_name.items():
        own = directory / f"{name}-later"
        outcomes |= {f"{name}-later": train(run, own), f"{name}-resumed-later": _resume(run, own)}
    return outcomes


def _forget_launch() -> None:
    # Else the DeepSpeed config of the run before, with its "auto" values filled in, is used again
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()


def main() -> None:
    torch.set_num_threads(1)
    # Each end of a training collects garbage; this leaves out what the imports made, which takes 0.4 s to look through
    gc.freeze()
    launch, directory = sys.argv[1], Path(sys.argv[2])
    outcomes = LAUNCHES[launch](directory)
    if dist.get_rank() == 0:
        torch.save(outcomes, directory / f"{launch}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
