"""The tables of computed memory and time in benchmarks/README.md, and the numbers of the LoRA configs, are what the formulas give."""

import math
import re

import pytest
import torch

from benchmarks import cost_table
from benchmarks.cost_table import PROMPT_TOKENS, SHAPES, TRAININGS, config_of, memory_row, time_row
from benchmarks.environment import REPOSITORY
from benchmarks.marked import put_between_marks
from benchmarks.step_time import A100, H100, SHARE_OF_PEAK, estimate_step_time
from trl_crisp.models.memory import estimate_memory

README = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")


def shown(name: str) -> list[str]:
    return README.split(f"<!-- {name}:computed -->")[1].split(f"<!-- /{name}:computed -->")[0].strip().splitlines()


# As the model cards print them
@pytest.mark.parametrize(("size", "billions"), [("0.6B", 0.6), ("4B", 4.0), ("8B", 8.2), ("14B", 14.8), ("32B", 32.8)])
def test_the_shapes_are_those_of_the_released_models(size, billions):
    memory = estimate_memory(config_of(size), prompt_tokens=1, completion_tokens=1)
    assert round(memory.parameters / 1e9, 1) == billions


@pytest.mark.parametrize("size", SHAPES)
def test_every_row_is_computed_anew(size):
    rows = [row for row in shown("memory")[2:] if row.startswith(f"| {size} |")]
    assert rows == [memory_row(size, training) for training in TRAININGS]
    assert [row for row in shown("time")[2:] if row.startswith(f"| {size} |")] == [time_row(size)]


def test_the_tables_have_these_rows_only(monkeypatch):
    monkeypatch.setattr(cost_table, "memory_row", lambda size, training: f"| {size} | {training} |")
    monkeypatch.setattr(cost_table, "time_row", lambda size: f"| {size} |")
    for name, table in (("memory", cost_table.memory_table()), ("time", cost_table.time_table())):
        rendered, rows = table.splitlines(), shown(name)
        assert rows[:2] == rendered[:2]
        names = 2 if name == "memory" else 1
        assert [row.split("|")[1 : 1 + names] for row in rows[2:]] == [
            row.split("|")[1 : 1 + names] for row in rendered[2:]
        ]


def test_a_table_replaces_the_one_between_its_markers():
    text = "before <!-- time -->\nold\n<!-- /time --> after"
    assert put_between_marks(text, "time", "new\n") == "before <!-- time -->\nnew\n<!-- /time --> after"
    with pytest.raises(ValueError, match="the text has no <!-- memory --> with a <!-- /memory --> behind it"):
        put_between_marks(text, "memory", "new\n")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_time_of_a_step_by_hand(lora):
    """Qwen3-8B with 32 rollouts of 1,024 and 2,048 tokens."""
    time = estimate_step_time(config_of("8B"), prompt_tokens=1024, completion_tokens=2048, lora=lora)
    body = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    head, tokens = 151_936 * 4096, 32 * 3072
    # Student, what is computed again, teacher
    body_flops = body * tokens * ((4 if lora else 6) + 2 + 2)
    head_flops = head * 32 * 2048 * ((4 if lora else 6) + 2)
    scores = 5 * 36 * 32 * 3072 * 1536 * 4096 * 4
    assert time.flops == body_flops + head_flops + scores
    assert time.training_s == pytest.approx(time.flops / (0.4 * 989e12))
    cached = sum(32 * (1024 + i) * 36 * 2 * 1024 * 2 for i in range(2048))
    assert time.sampling_s == pytest.approx((2048 * 2 * (body + head) + cached) / 3.35e12)


@pytest.mark.parametrize("size", ["4B", "8B"])
def test_the_numbers_of_a_lora_config_are_computed_anew(size):
    path = REPOSITORY / "examples" / "configs" / f"qwen3-{size.lower()}-lora-1gpu.yaml"
    words = " ".join(path.read_text(encoding="utf-8").replace("\n#", "\n").split())
    for tokens, update in ((2048, "an update takes {} GiB"), (8192, "and {} GiB: set max_completion_length to 8192")):
        memory = estimate_memory(
            config_of(size), prompt_tokens=PROMPT_TOKENS, completion_tokens=tokens, lora_r=32, dtype=torch.bfloat16
        )
        assert update.format(f"{memory.update_gib:.0f}") in words
    one, other, longer, longer_other = (
        estimate_step_time(config_of(size), prompt_tokens=PROMPT_TOKENS, completion_tokens=tokens, lora=True, gpu=gpu)
        for tokens in (2048, 8192)
        for gpu in (H100, A100)
    )
    assert (
        f"takes {one.training_s:.0f} s of training on an H100 ({one.flops:.1e} FLOPs at {SHARE_OF_PEAK:.0%} of its peak) and at least "
        f"{one.sampling_s:.0f} s of sampling, {other.training_s:.0f} and {other.sampling_s:.0f} s on an A100"
    ) in words.replace("e15", "e+15")
    assert (
        f"Rollouts of 8,192 tokens take at least {longer.step_s / 60:.1f} minutes on an H100, {longer_other.step_s / 60:.1f} on an A100"
        in words
    )


def test_the_readmes_recipe_is_that_of_the_config():
    """Qwen3-8B with LoRA: GiB, and seconds of a step to five."""
    words = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    memory = estimate_memory(
        config_of("8B"), prompt_tokens=1024, completion_tokens=2048, lora_r=32, dtype=torch.bfloat16
    )
    assert f"Computed, not measured: an update takes {memory.update_gib:.0f} GiB, vLLM {0.45 * 80:.0f} GiB" in words
    found = re.search(r"a step at least (\d+) seconds on an H100, (\d+) on an A100", words)
    for stated, gpu in zip(found.groups(), (H100, A100), strict=True):
        time = estimate_step_time(config_of("8B"), prompt_tokens=1024, completion_tokens=2048, lora=True, gpu=gpu)
        assert int(stated) == 5 * round(time.step_s / 5)


@pytest.mark.parametrize(("size", "share"), [("4B", 0.3), ("8B", 0.45)])
def test_the_monitors_minutes_in_a_lora_config_are_computed_anew(size, share):
    """Answers of 5,000 tokens, as many at once as vLLM's share of 80 GiB has room for halfway through them."""
    path = REPOSITORY / "examples" / "configs" / f"qwen3-{size.lower()}-lora-1gpu.yaml"
    text = path.read_text(encoding="utf-8")
    assert f"vllm_gpu_memory_utilization: {share}" in text
    config = config_of(size)
    weights = estimate_memory(
        config, prompt_tokens=1, completion_tokens=1, lora_r=32, dtype=torch.bfloat16
    ).weights_gib
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    at_once = int((80 * share - weights) * 2**30 / (token_bytes * (PROMPT_TOKENS + 2500)))
    wave = estimate_step_time(config, prompt_tokens=PROMPT_TOKENS, completion_tokens=5000, lora=True, rollouts=at_once)
    # 128 prompts: 16 answers of the base, then 5 at each measurement
    minutes = [math.floor(128 * answers / at_once * wave.sampling_s / 60) for answers in (16, 5)]
    words = " ".join(text.replace("\n#", "\n").split())
    assert (
        f"at least {minutes[0]} minutes before the first step and {minutes[1]} at each measurement (computed" in words
    )
