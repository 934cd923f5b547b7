"""
Compares time and memory of the loss with TRL's kernel, with full logits, and with the authors' scheme.

    python -m benchmarks.speed              # the cases of this machine: minutes on a CPU
    python -m benchmarks.speed --quick      # one small case, to see that it runs

Each case is a forward and a backward from hidden states and heads to the gradients of the student's. All contestants get the same
inputs, in the same process, in turns that start with another one each round. Their losses and gradients are compared first. The peak
memory is measured apart, each contestant in a process of its own: what the pass adds to the process on a CPU (Linux's `VmHWM` minus
what the process held before, after a small pass), what torch allocates above the inputs on a GPU. The output is a table, and a JSON
with the protocol and every measurement, in which cases that were not measured again stay.

Contestants:

- `crisp`: `trl_crisp.loss.kernel.fused_loss`. It also gives both entropies, the reverse KL and both log-probabilities of each token.
- `trl`: TRL's `ChunkedDivergenceFunction` on all tokens at once, as TRL's `DistillationTrainer` calls it. It also gives the student's
  entropy.
- `trl_slices`: the same in slices of 256 tokens on a CPU (`trl_crisp.loss.divergence.per_token_divergence`), which needs less memory.
- `naive`: both models' full logits in float32, and torch's log-softmax and KL of all of them at once.
- `authors`: both models' full logits in the dtype of the inputs, and the KL in chunks of 64 rows in float32. From the description of the
  authors' code, not from the code.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.environment import (
    MIB,
    REPOSITORY,
    RESULTS,
    environment,
    forget_peak_rss,
    peak_rss_mib,
    quantiles,
    rss_mib,
)
from trl_crisp._upstream import ChunkedDivergenceFunction
from trl_crisp.loss.divergence import OutputHead, per_token_divergence
from trl_crisp.loss.kernel import fused_loss

RESULT = RESULTS / "loss.json"
AUTHORS_ROWS = 64


class Case(NamedTuple):
    """A size of the loss. `beta` is 1 for the reverse KL, 0 for the forward KL, and in between the JSD."""

    device: str
    tokens: int
    hidden: int
    vocabulary: int
    dtype: str = "float32"
    frozen_head: bool = False
    beta: float = 1.0


# The sizes of SmolLM2-135M and of Qwen3-8B
SMOLLM2 = Case("cpu", 2048, 576, 49_152)
QWEN3 = Case("cuda", 8192, 4096, 151_936, "bfloat16")
CASES = {
    "smollm2": SMOLLM2,
    "smollm2-frozen_head": SMOLLM2._replace(frozen_head=True),
    "smollm2-jsd": SMOLLM2._replace(tokens=512, beta=0.5),
    "smollm2-forward_kl": SMOLLM2._replace(tokens=512, beta=0.0),
    "smollm2-bf16": SMOLLM2._replace(tokens=512, dtype="bfloat16"),
    "smollm2-32_tokens": SMOLLM2._replace(tokens=32),
    "qwen3-0.6b": Case("cpu", 256, 1024, 151_936),
    "qwen3-8b": QWEN3,
    "qwen3-8b-frozen_head": QWEN3._replace(frozen_head=True),
}
QUICK = {"quick": Case("cpu", 300, 64, 4096)}


class Inputs(NamedTuple):
    """What a contestant gets."""

    student_hidden_NH: torch.Tensor
    student_weight_VH: torch.Tensor
    teacher_hidden_NH: torch.Tensor
    teacher_weight_VH: torch.Tensor
    token_ids_N: torch.Tensor
    weights_N: torch.Tensor


def make_inputs(case: Case) -> Inputs:
    """Return random inputs whose teacher is near the student, as in self-distillation."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> torch.Tensor:
        values = scale * torch.randn(*shape, generator=generator)
        return values.to(case.device, getattr(torch, case.dtype))

    student_hidden_NH = draw(case.tokens, case.hidden, scale=1.0)
    student_weight_VH = draw(case.vocabulary, case.hidden, scale=2 / case.hidden**0.5)
    return Inputs(
        student_hidden_NH,
        student_weight_VH,
        student_hidden_NH + draw(case.tokens, case.hidden, scale=0.1),
        student_weight_VH + draw(case.vocabulary, case.hidden, scale=0.1 / case.hidden**0.5),
        torch.randint(0, case.vocabulary, (case.tokens,), generator=generator).to(case.device),
        torch.full((case.tokens,), 1 / case.tokens, device=case.device),
    )


def crisp(x: Inputs, case: Case) -> torch.Tensor:
    """The loss of this package."""
    student = x.student_hidden_NH, OutputHead(x.student_weight_VH)
    teacher = x.teacher_hidden_NH, OutputHead(x.teacher_weight_VH)
    loss, _ = fused_loss(*student, *teacher, x.token_ids_N, x.weights_N, case.beta, 1.0)
    return loss


def trl(x: Inputs, case: Case) -> torch.Tensor:
    """TRL's kernel as TRL calls it."""
    divergence_N, _ = ChunkedDivergenceFunction.apply(
        x.student_hidden_NH,
        x.student_weight_VH,
        None,
        x.teacher_hidden_NH,
        x.teacher_weight_VH,
        None,
        case.beta,
    )
    return (x.weights_N * divergence_N).sum()


def trl_slices(x: Inputs, case: Case) -> torch.Tensor:
    """TRL's kernel in slices of tokens."""
    divergence_BT, _ = per_token_divergence(
        x.student_hidden_NH[None],
        OutputHead(x.student_weight_VH),
        x.teacher_hidden_NH[None],
        OutputHead(x.teacher_weight_VH),
        torch.ones_like(x.weights_N)[None],
        case.beta,
        1.0,
    )
    return (x.weights_N * divergence_BT[0]).sum()


def divergence_of_logits(student_NV: torch.Tensor, teacher_NV: torch.Tensor, beta: float) -> torch.Tensor:
    """The divergence of each row by torch's own functions."""
    log_q, log_p = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    kl = torch.nn.functional.kl_div  # kl_div(a, b) is KL(b || a)
    if beta == 1.0:
        return kl(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if beta == 0.0:
        return kl(log_q, log_p, reduction="none", log_target=True).sum(-1)
    log_m = torch.logaddexp(log_q + np.log(1 - beta), log_p + np.log(beta))
    to_teacher = kl(log_m, log_p, reduction="none", log_target=True).sum(-1)
    return beta * to_teacher + (1 - beta) * kl(log_m, log_q, reduction="none", log_target=True).sum(-1)


def naive(x: Inputs, case: Case) -> torch.Tensor:
    """Full logits of both models in float32."""
    with torch.no_grad():
        teacher_NV = (x.teacher_hidden_NH @ x.teacher_weight_VH.T).float()
    student_NV = (x.student_hidden_NH @ x.student_weight_VH.T).float()
    return (x.weights_N * divergence_of_logits(student_NV, teacher_NV, case.beta)).sum()


def authors(x: Inputs, case: Case) -> torch.Tensor:
    """Full logits of both models in the dtype of the inputs, and float32 in chunks of rows."""
    with torch.no_grad():
        teacher_NV = x.teacher_hidden_NH @ x.teacher_weight_VH.T
    student_NV = x.student_hidden_NH @ x.student_weight_VH.T
    chunks = zip(*(t.split(AUTHORS_ROWS) for t in (student_NV, teacher_NV)), strict=True)
    divergence_N = torch.cat([divergence_of_logits(q.float(), p.float(), case.beta) for q, p in chunks])
    return (x.weights_N * divergence_N).sum()


CONTESTANTS: dict[str, Callable[[Inputs, Case], torch.Tensor]] = {
    function.__name__: function for function in (crisp, trl, trl_slices, naive, authors)
}


def contestants_of(case: Case) -> list[str]:
    """Return who runs: on a GPU, slices are not used."""
    return [name for name in CONTESTANTS if name != "trl_slices" or case.device == "cpu"]


class Pass(NamedTuple):
    """One forward and backward."""

    seconds: float
    cpu_seconds: float
    loss: torch.Tensor
    gradients: list[torch.Tensor]


def run_once(name: str, inputs: Inputs, case: Case) -> Pass:
    """Time a forward and a backward."""
    # New leaves of the same memory, so that each pass makes gradients of its own
    leaves = [inputs.student_hidden_NH.detach().requires_grad_()]
    leaves.append(inputs.student_weight_VH.detach().requires_grad_(not case.frozen_head))
    mine = inputs._replace(student_hidden_NH=leaves[0], student_weight_VH=leaves[1])
    wait(case)
    start, start_cpu = time.perf_counter(), time.process_time()
    loss = CONTESTANTS[name](mine, case)
    loss.backward()
    wait(case)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return Pass(seconds, cpu_seconds, loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None])


def wait(case: Case) -> None:
    """Wait for a GPU."""
    if case.device == "cuda":
        torch.cuda.synchronize()


def check_same_work(case: Case, inputs: Inputs) -> dict[str, float]:
    """
    Return how far each contestant's gradients are from those of the first one, relative to their norm.

    Raises:
        RuntimeError: If somebody computes something else.
    """
    first = run_once("crisp", inputs, case)
    # Rounded logits cost the contestants with full logits a share of their gradients in half precision
    tolerance = 1e-3 if case.dtype == "float32" else 0.3
    distances = {}
    for name in contestants_of(case)[1:]:
        other = run_once(name, inputs, case)
        distance = max(
            float((mine.float() - theirs.float()).norm() / mine.float().norm())
            for mine, theirs in zip(first.gradients, other.gradients, strict=True)
        )
        # So that NaN is a difference
        if not (distance <= tolerance and abs(first.loss - other.loss) <= tolerance * first.loss):
            raise RuntimeError(f"{name} computes something else: gradients differ by {distance:.2g}")
        distances[name] = distance
    return distances


def measure_times(case: Case, rounds: int) -> dict[str, Any]:
    """Return quantiles of each contestant's seconds, and the ratios of `crisp` to the others."""
    inputs = make_inputs(case)
    # A warm-up, too
    distances = check_same_work(case, inputs)
    names = contestants_of(case)
    passes: dict[str, list[Pass]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            passes[name].append(run_once(name, inputs, case)._replace(gradients=[]))
    results: dict[str, Any] = {
        name: {
            "seconds": quantiles([p.seconds for p in passes[name]]),
            "cpu_seconds": quantiles([p.cpu_seconds for p in passes[name]]),
            "all_seconds": [p.seconds for p in passes[name]],
            "all_cpu_seconds": [p.cpu_seconds for p in passes[name]],
        }
        for name in names
    }
    for name in names[1:]:
        ratios = [mine.seconds / theirs.seconds for mine, theirs in zip(passes["crisp"], passes[name], strict=True)]
        results[name]["gradient_distance_to_crisp"] = distances[name]
        results[name]["crisp_ratio"] = {
            **{q: results["crisp"]["seconds"][q] / results[name]["seconds"][q] for q in ("p20", "p50", "p80")},
            "median_of_rounds": median(ratios),
            "cpu_p20": results["crisp"]["cpu_seconds"]["p20"] / results[name]["cpu_seconds"]["p20"],
            "cpu_p50": results["crisp"]["cpu_seconds"]["p50"] / results[name]["cpu_seconds"]["p50"],
        }
    return results


def measure_peak_mib(name: str, case: Case) -> float:
    """Return the memory that one pass adds to this process, which has run no other."""
    inputs = make_inputs(case)
    few = inputs._replace(
        student_hidden_NH=inputs.student_hidden_NH[:2],
        teacher_hidden_NH=inputs.teacher_hidden_NH[:2],
        token_ids_N=inputs.token_ids_N[:2],
        weights_N=inputs.weights_N[:2],
    )
    if case.device == "cuda":
        run_once(name, few, case)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(name, inputs, case)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # Libraries are loaded by a pass over a small case
    small = case._replace(tokens=2, hidden=8, vocabulary=16)
    run_once(name, make_inputs(small), small)
    # Not that of the temporaries that made the inputs
    forget_peak_rss()
    before = rss_mib()
    run_once(name, inputs, case)
    return peak_rss_mib() - before


def peak_in_child(name: str, case_name: str, threads: int) -> float:
    """Measure the peak memory in a new process."""
    command = [sys.executable, "-m", "benchmarks.speed", "--peak_of", name, case_name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode != 0:
        raise RuntimeError(f"{name} in {case_name} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def table_of(cases: dict[str, Any]) -> str:
    """Return a Markdown table: medians, and the ratio of `crisp` to each other contestant."""
    lines = [
        "| case | contestant | s, p50 (p20 to p80) | peak MiB | crisp / it: time | crisp / it: CPU time | crisp / it: memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for case_name, case in cases.items():
        if "skipped" in case:
            lines.append(f"| {case_name} | skipped: {case['skipped']} | | | | | |")
            continue
        for name, one in case["contestants"].items():
            s, ratio = one["seconds"], one.get("crisp_ratio")
            ratios = ["", "", ""]
            if ratio is not None:
                memory = case["contestants"]["crisp"]["peak_mib"] / one["peak_mib"]
                ratios = [f"{ratio['p50']:.2f}", f"{ratio['cpu_p50']:.2f}", f"{memory:.2f}"]
            lines.append(
                f"| {case_name} | {name} | {s['p50']:.3g} ({s['p20']:.3g} to {s['p80']:.3g}) | {one['peak_mib']:.0f} | "
                + " | ".join(ratios)
                + " |"
            )
    return "\n".join(lines)


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """Return how the numbers were measured."""
    return {
        "measured": "a forward and a backward, from hidden states and heads to the gradients of the student's",
        "rounds": args.rounds,
        "order": "in turns in one process, each round starts with another contestant; the first pass of each is not counted",
        "peak_mib": "one pass in a process of its own: VmHWM minus the memory before (CPU), max_memory_allocated minus that (GPU)",
        **environment(),
    }


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="one small case instead")
    parser.add_argument("--rounds", type=int, default=7, help="measured passes of each contestant (7)")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (0: torch's default)")
    parser.add_argument("--output", help=f"default: {RESULT.relative_to(REPOSITORY)}; with --quick no file is written")
    parser.add_argument("--peak_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of is not None:
        name, case_name = args.peak_of
        print(measure_peak_mib(name, (CASES | QUICK)[case_name]))
        return
    cases = QUICK if args.quick else {name: CASES[name] for name in args.cases}
    output = Path(args.output) if args.output else None if args.quick else RESULT
    record: dict[str, Any] = {"contestants": __doc__.split("Contestants:\n\n")[1], "cases": {}}
    if output is not None and output.exists():
        record["cases"] = json.loads(output.read_text(encoding="utf-8"))["cases"]
    for case_name, case in cases.items():
        record["cases"][case_name] = entry = {"size": case._asdict(), "protocol": protocol(args)}
        if case.device == "cuda" and not torch.cuda.is_available():
            entry["skipped"] = "no GPU"
        else:
            entry["contestants"] = measure_times(case, args.rounds)
            for name, one in entry["contestants"].items():
                one["peak_mib"] = peak_in_child(name, case_name, args.threads)
        print(table_of({case_name: entry}), flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["cases"] = {name: record["cases"][name] for name in (CASES | QUICK) if name in record["cases"]}
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table_of(record["cases"]))


if __name__ == "__main__":
    main()
