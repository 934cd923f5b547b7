"""The seconds of a step's parts, and the share of the hardware's limit."""

import time

import pytest
import torch
from peft import LoraConfig

from tests.helpers import make_trainer, parameters_of, rows
from trl_crisp.run import profile
from trl_crisp.run.flops import count_matrix_weights
from trl_crisp.run.profile import PARTS, PartTimes

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def trained(path, **overrides):
    """Train three steps of two micro-batches, and return the trainer and the logs of the steps."""
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **overrides}
    trainer = make_trainer(path, **fields)
    trainer.train()
    return trainer, [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    # More tokens than elsewhere, so that the parts outweigh the rest of the step
    return trained(
        tmp_path_factory.mktemp("profiled"), profile_steps=True, max_completion_length=48, teacher_sync_steps=2
    )


def test_parts_inside_others_interrupt_them(monkeypatch):
    """With a clock that a test sets."""
    now_s, waits = [0.0], []
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now_s[0])
    times = PartTimes(lambda: waits.append(now_s[0]))
    now_s[0] = 1.0
    with times.part("outer"):
        now_s[0] = 3.0
        with times.part("inner"):
            now_s[0] = 7.0
        now_s[0] = 15.0
    now_s[0] = 31.0
    with times.part("outer"):
        now_s[0] = 32.0
    assert dict(times.seconds) == {"outer": 2.0 + 8.0 + 1.0, "inner": 4.0}
    assert waits == [1.0, 3.0, 7.0, 15.0, 31.0, 32.0], "the device is not waited for at each end of a part"
    with pytest.raises(KeyError), times.part("failing"):
        raise KeyError
    times.reset()
    assert not times.seconds


def test_the_parts_add_up_to_the_step(profiled):
    _, logs = profiled
    assert len(logs) == 3
    rare = ("weight_sync", "teacher_refresh")
    for log in logs:
        parts = {part: log[f"profile/{part}_s"] for part in PARTS}
        assert all(seconds > 0 for part, seconds in parts.items() if part not in rare), parts
        assert sum(parts.values()) <= log["profile/step_s"]
    # The first step also loads code
    for log in logs[1:]:
        assert sum(log[f"profile/{part}_s"] for part in PARTS) >= 0.8 * log["profile/step_s"]
    # The teacher is refreshed at the start of step 2
    assert [log["profile/teacher_refresh_s"] > 0 for log in logs] == [False, True, False]
    # There is no vLLM
    assert [log["profile/weight_sync_s"] for log in logs] == [0, 0, 0]


@pytest.mark.parametrize(("tuning", "checkpointing"), [("full", False), ("lora", False), ("full", True)])
def test_the_share_of_the_limit_by_hand(tmp_path, monkeypatch, tuning, checkpointing):
    """From the tokens of the inputs, at a limit that is known."""
    monkeypatch.setattr(profile, "measure_limit", lambda device, dtype: 3e9)
    trainer = make_trainer(
        tmp_path,
        profile_steps=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        gradient_checkpointing=checkpointing,
        peft_config=LoraConfig(**LORA) if tuning == "lora" else None,
    )
    seen, compute = [], trainer._compute_loss

    def recorded(model, inputs, num_items):
        seen.append(inputs)
        return compute(model, inputs, num_items)

    trainer._compute_loss = recorded
    trainer.train()
    log = trainer.state.log_history[0]

    base = trainer.model.get_base_model() if tuning == "lora" else trainer.model
    weights = count_matrix_weights(base)
    student = teacher = loss = computed = 0
    for inputs in seen:
        for i in range(2):
            own = inputs["completion_mask"][i].sum().item()
            student += inputs["prompt_mask"][i].sum().item() + own
            teacher += inputs["teacher_prompt_mask"][i].sum().item() + own
            loss += own
        for prompt in ("prompt", "teacher_prompt"):
            rows = torch.cat([inputs[f"{prompt}_mask"], inputs["completion_mask"]], dim=1)
            computed += 2 * max(sum(row) for row in rows.tolist())
    factor = 4 if tuning == "lora" else 6
    needed = weights.body * (factor * student + 2 * teacher) + weights.head * (factor + 2) * loss
    seconds = sum(log[f"profile/{part}_s"] for part in ("teacher", "student_forward", "backward", "optimizer"))
    assert log["profile/limit_tflops"] == pytest.approx(3e-3)
    assert log["profile/limit_share"] == pytest.approx(needed / seconds / 3e9)
    recomputed = 2 * weights.body * student if checkpointing else 0
    assert log["profile/recomputed_limit_share"] == pytest.approx(recomputed / seconds / 3e9)
    assert log["profile/computed_to_real_tokens"] == pytest.approx(computed / (student + teacher))


@pytest.mark.parametrize(
    ("overrides", "dtype"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16)], ids=["float32", "bf16"]
)
def test_the_limit_is_measured_once_in_the_training_dtype(tmp_path, monkeypatch, overrides, dtype):
    measured = []
    monkeypatch.setattr(profile, "measure_limit", lambda *arguments: measured.append(arguments) or 1e12)
    trainer = make_trainer(tmp_path, profile_steps=True, max_steps=1, **overrides)
    trainer.train()
    trainer.train()
    assert measured == [(torch.device("cpu"), dtype)]


def test_profiling_changes_no_bit_and_off_adds_nothing(tmp_path):
    outcomes = {}
    for name, on in (("off", False), ("on", True)):
        trainer, logs = trained(tmp_path / name, profile_steps=on)
        kept = [{k: v for k, v in log.items() if not k.startswith("profile/") and "time" not in k} for log in logs]
        outcomes[on] = (parameters_of(trainer.model), kept)
        assert any(key.startswith("profile/") for key in logs[0]) == on
        timed = {"compute_loss", "training_step", "_generate_and_score_completions"}
        assert (vars(trainer).keys() & timed) == (timed if on else set())
    assert outcomes[False][1] == outcomes[True][1]
    assert all(torch.equal(outcomes[True][0][name], weight) for name, weight in outcomes[False][0].items())


def test_evaluations_and_other_callbacks_are_in_no_step(tmp_path):
    """Between two steps, of whose parts they have some."""
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(0.5)

    _, logs = trained(
        tmp_path,
        profile_steps=True,
        callbacks=[Slow()],
        eval_dataset=rows(8),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=1,
        max_steps=2,
    )
    for log in logs:
        parts = sum(log[f"profile/{part}_s"] for part in PARTS)
        assert parts <= log["profile/step_s"]
        assert log["profile/optimizer_s"] < 0.5


def test_a_model_whose_experts_are_unknown_has_no_share_and_a_warning(tmp_path, monkeypatch):
    def refuse(model):
        raise ValueError("the model has experts (model.layers.0.mlp)")

    monkeypatch.setattr(profile, "count_matrix_weights", refuse)
    with pytest.warns(UserWarning, match="profile_steps logs no profile/limit_share: the model has experts"):
        _, logs = trained(tmp_path, profile_steps=True, max_steps=1)
    assert "profile/step_s" in logs[0]
    assert "profile/limit_share" not in logs[0]
