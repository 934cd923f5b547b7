"""Prints a preflight's numbers and verdicts on the terminal."""

from typing import Any

from trl_crisp.report.console import make_console, make_table

_PARTS = {
    "weights_gib": "weights",
    "teacher_gib": "teacher",
    "optimizer_gib": "AdamW",
    "gradients_gib": "gradients",
    "checkpoints_gib": "checkpoints",
    "layer_gib": "a layer",
    "autocast_gib": "autocast",
    "loss_gib": "loss",
    "logits_gib": "logits",
    "rollout_cache_gib": "rollouts' cache",
    "update_gib": "update",
    "peak_gib": "peak",
}


def print_preflight_start(about: dict[str, Any]) -> None:
    """
    Print what is asked, and the first prompt of each kind.

    Args:
        about: What [`~trl_crisp.preflight.running.run_preflight`] passes before it samples.
    """
    labels, prompts = about["labels"], about["prompts"]
    right = "without right answers" if labels["column"] is None else f"with right answers in {labels['column']!r}"
    print(
        f"{prompts['asked']} prompts of {about['rows']:,} rows, {right}; final answers are compared as {labels['kind']} ({labels['reason']})."
    )
    for name, prompt in about["first_prompts"].items():
        print(f"--- the first prompt, {name} ---\n{prompt}")
    print("---", flush=True)


def print_preflight(results: dict[str, Any]) -> None:
    """
    Print the tables, the verdicts and the recommendation.

    Args:
        results: As in preflight.json ([`~trl_crisp.preflight.results`]).
    """
    console = make_console()
    settings = results["settings"]
    counted = {"plain": results["plain"], **{one["name"]: one["counted"] for one in results["instructions"]}}
    effects = {one["name"]: one for one in results["instructions"]}
    rows = []
    for name, values in counted.items():
        one = effects.get(name)
        changes = ["", "", "", ""]
        if one is not None:
            effect, kl_nats = one["effect"], one["reverse_kl_nats"]
            changes = [
                _reduction(effect["reduction"]),
                _change(effect["agreement_change"]),
                _change(effect["accuracy_change"]),
                "" if kl_nats is None else f"{kl_nats:.4f}",
            ]
        shares = [_share(values["agreement"]), _share(values["accuracy"])]
        rows.append([name, f"{values['mean_tokens']:,.0f}", *shares, *changes])
    headers = ["", "mean tokens", "agreement", "accuracy", "tokens, change", "agreement, points", "accuracy, points"]
    title = f"{settings['model']} on {settings['dataset']}: {results['prompts']['asked']} prompts, 95% intervals"
    console.print(make_table(title, [*headers, "reverse KL, nats"], rows))
    thinks = results["plain"]["thinking"] is not None
    rows = []
    for name, values in counted.items():
        row = [name, *(_share(values[key]) for key in ("ended_by_eos", "truncated", "final_answer", "boxed"))]
        if thinks:
            thinking = values["thinking"]
            row += [_share(thinking[key]) for key in ("prompts_open", "prompts_close", "opened", "closed")] + [
                f"{thinking['mean_tokens']:,.0f}"
            ]
        rows.append(row)
    headers = ["", "ended", "cut", "final answer", "box"]
    if thinks:
        headers += ["prompt opens <think>", "prompt closes it", "answer thinks", "closes it", "thinking tokens"]
    console.print(make_table("How the answers end", headers, rows))
    endings = results["endings"]
    if endings["generation_prompt_tokens"]:
        console.print(
            f"Both prompts end alike, in {endings['common_tokens']} tokens or more; the model's turn opens with {endings['generation_prompt']!r}.",
            markup=False,
        )
    run = results["run"]
    if sides := [(title, run[key]) for title, key in (("full", "full"), ("LoRA", "lora")) if run[key] is not None]:
        rows = [[title, *(f"{memory[key]:,.1f}" for key in _PARTS)] for title, memory in sides]
        title = f"GPU memory of a run, GiB, estimated ({settings['dtype']} weights, cap {settings['max_completion_length']:,} tokens)"
        console.print(make_table(title, ["", *_PARTS.values()], rows))
        console.print(
            f"It is for prompts of up to {run['prompt_tokens']:,} tokens, the longest of those asked; a longer row needs more. If vLLM samples the "
            "rollouts, its share comes on top of `update`, and the rollouts' cache is vLLM's.",
            markup=False,
        )
    lines = [
        f"A run of {run['steps']:,} steps of {run['rollouts_per_step']} rollouts samples about {run['rollout_tokens']:,} tokens at the plain prompt's "
        "length.",
        *([] if run["memory_reason"] is None else [run["memory_reason"]]),
        *([] if results["reverse_kl_reason"] is None else [f"No reverse KL: {results['reverse_kl_reason']}."]),
        *results["notes"],
        *(one["verdict"]["words"] for one in results["instructions"]),
        results["recommendation"]["words"],
    ]
    for line in lines:
        # Brackets are intervals here, not rich's markup
        console.print(line, markup=False, highlight=False)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _reduction(interval: dict[str, float]) -> str:
    # Adding 0 makes 0 of -0
    estimate, low, high = (f"{round(-100 * interval[end]) + 0.0:+.0f}%" for end in ("estimate", "high", "low"))
    return f"{estimate} [{low}, {high}]"


def _change(interval: dict[str, float] | None) -> str:
    if interval is None:
        return ""
    estimate, low, high = (f"{round(100 * interval[end], 1) + 0.0:+.1f}" for end in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
