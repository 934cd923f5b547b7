"""The distance from the base told to be concise: an oracle in float64, exact zeros, an undisturbed training, the same after a kill."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.helpers import make_trainer, parameters_of, rows
from tests.tiny_models import tiny_model, tiny_tokenizer
from trl_crisp.health.attach import attach_health
from trl_crisp.health.distance import ConciseBaseDistance, adapter_path, answer_log_probs, teacher_prompts_of
from trl_crisp.health.monitor_prompts import load_monitor_file
from trl_crisp.rows.arguments import CRISPScriptArguments
from trl_crisp.run.identity import run_id_of, start_run

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is",
    "ignore:teacher_sync_steps=",
    "ignore:.* of the base.s answers to the monitor prompts",
)

FIELDS = {
    **{"monitor_prompts": 8, "monitor_samples": 2, "monitor_steps": 2, "monitor_distance": True},
    **{"max_steps": 3, "learning_rate": 1e-2, "teacher_sync_steps": 2, "temperature": 0.7},
}
NAME = "eval_agreement_distance_nats"


def no_answer(text: str) -> str | None:
    """No prompt gets a reference, so all are asked at each measurement."""
    return None


def told_rows(count: int = 24) -> Dataset:
    """Return rows whose teacher's prompts are their own."""
    return Dataset.from_list([{**row, "teacher_prompt": told(row["prompt"])} for row in rows(count)])


def told(prompt):
    return [{"role": "user", "content": f"Be brief. {prompt[0]['content']}"}]


def lora(seed: int = 0, kind: str = "llama", dropout: float = 0.0):
    """Return a model with an adapter that changes its outputs from the start."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(tiny_model(kind), config)


def attached(output_dir, answer_of=no_answer, **fields):
    trainer = make_trainer(output_dir, **{"dataset": rows(24), **FIELDS, **fields})
    return trainer, attach_health(trainer, answer_of).monitor


def distances(trainer) -> dict[int, float]:
    return {log["step"]: log[NAME] for log in trainer.state.log_history if NAME in log}


def oracle(model, prompt_ids, answer_ids, temperature) -> float:
    """Return an answer's log-probability from the own logits of a model in float64."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0] / temperature
    log_probs_TV = torch.log_softmax(logits_TV, dim=-1)
    return sum(log_probs_TV[len(prompt_ids) - 1 + t, token].item() for t, token in enumerate(answer_ids))


def in_float64(model):
    return copy.deepcopy(model).double().eval()


@pytest.mark.parametrize(("kind", "adapter"), [("llama", False), ("gemma", False), ("qwen3", True)])
def test_the_distance_is_that_of_the_oracle(tmp_path, kind, adapter):
    model = lora(kind=kind) if adapter else tiny_model(kind)
    # The trainer adds the teacher's adapter to the model
    first = copy.deepcopy(model)
    trainer, monitor = attached(tmp_path, kind=kind, model=model, dataset=told_rows(), learning_rate=3e-2)
    trainer.train()
    found = distances(trainer)
    # No prompt has a reference, and the distance is still measured
    assert not monitor.is_on
    assert list(found) == [0, 1, 3]
    last = copy.deepcopy(trainer.model)
    for step, student in ((3, last), (0, first)):
        trainer.model.load_state_dict(student.state_dict(), strict=False)
        _, answers = monitor._sample(range(8), trainer.args.seed + step, 2)
        expected = []
        exact_student, exact_base = in_float64(student), in_float64(first)
        for problem, own in zip(monitor._problems, answers, strict=True):
            ids, told_ids = (
                tiny_tokenizer(kind).apply_chat_template(one, add_generation_prompt=True, return_dict=False)
                for one in (problem.prompt, told(problem.prompt))
            )
            nats = [oracle(exact_student, ids, one, 0.7) - oracle(exact_base, told_ids, one, 0.7) for one in own]
            expected.append(sum(nats) / len(nats))
        mean = sum(expected) / 8
        assert found[step] == pytest.approx(mean, abs=2e-4)
        standard_error = (sum((one - mean) ** 2 for one in expected) / 7 / 8) ** 0.5
        log = next(log for log in trainer.state.log_history if log["step"] == step and NAME in log)
        assert log["eval_agreement_distance_standard_error_nats"] == pytest.approx(standard_error, abs=2e-4)
    assert abs(found[3] - found[0]) > 0.1, "this run should move the model"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_an_untrained_student_that_is_told_nothing_has_no_distance(tmp_path, adapter, bf16):
    """The two passes are the same, so the zero is exact."""
    trainer, _ = attached(tmp_path, model=lora() if adapter else None, instruction="", bf16=bf16, max_steps=1)
    trainer.train()
    assert distances(trainer)[0] == 0.0
    assert distances(trainer)[1] != 0.0


def test_the_passes_have_the_weights_of_their_own_in_bfloat16(tmp_path):
    """Autocast keeps casts of the weights, and those of the student are not the base's."""
    first = tiny_model()
    trainer, monitor = attached(tmp_path, bf16=True, instruction="")
    trainer.train()
    _, answers = monitor._sample(range(8), 5, 2)
    prompts = [ids for ids, own in zip(monitor._token_ids, answers, strict=True) for _ in own]
    flat = [answer for own in answers for answer in own]
    tokens = 4 * max(len(ids) + len(answer) for ids, answer in zip(prompts, flat, strict=True))
    with trainer.accelerator.autocast():
        student = answer_log_probs(trainer.model.eval(), prompts, flat, 0.7, tokens)
    with trainer.accelerator.autocast():
        base = answer_log_probs(first, prompts, flat, 0.7, tokens)
    expected = (torch.tensor(student).double() - torch.tensor(base).double()).mean().item()
    assert monitor._distance.measure(range(8), answers)[0] == pytest.approx(expected, abs=1e-6)


def test_batches_and_slices_do_not_change_the_numbers():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high: torch.randint(0, 256, (int(torch.randint(low, high, (), generator=generator)),)).tolist()  # noqa: E731
    prompts, answers = [draw(1, 9) for _ in range(9)], [draw(1, 40) for _ in range(8)] + [draw(600, 601)]
    exact = in_float64(model)
    expected = [oracle(exact, prompt, answer, 1.3) for prompt, answer in zip(prompts, answers, strict=True)]
    # An engine may give an empty answer
    prompts, answers, expected = [*prompts, [3, 4]], [*answers, []], [*expected, 0.0]
    for tokens_at_once in (1, 100, 10_000):
        found = answer_log_probs(model, prompts, answers, 1.3, tokens_at_once)
        assert found == pytest.approx(expected, rel=1e-5)
    assert answer_log_probs(model, [[3, 4]], [[]], 1.3, 100) == [0.0]


@pytest.mark.parametrize("adapter", [False, True])
def test_measuring_leaves_the_training_alone(tmp_path, adapter):
    """Dropout makes each random number of the training count."""

    def run(name, distance):
        model = lora(dropout=0.3) if adapter else tiny_model(attention_dropout=0.3)
        trainer, _ = attached(tmp_path / name, model=model, monitor_distance=distance)
        trainer.train()
        keys = ("loss", "grad_norm", "entropy", "reverse_kl", "completions/mean_length")
        logs = [[log[key] for key in keys] for log in trainer.state.log_history if "loss" in log]
        return trainer, logs

    (measured, logs), (plain, plain_logs) = run("measured", True), run("plain", False)
    assert len(distances(measured)) == 3
    assert not distances(plain)
    assert len(logs) == 3
    assert logs == plain_logs
    for name, value in parameters_of(measured.model).items():
        assert torch.equal(value, parameters_of(plain.model)[name]), name
    teachers = [one.teacher.state_dict()["weights"] for one in (measured, plain)]
    assert teachers[0].keys() == teachers[1].keys() != set()
    assert all(torch.equal(value, teachers[1][name]) for name, value in teachers[0].items())
    for states in zip(*(states_of(trainer.model) for trainer in (measured, plain)), strict=True):
        assert states[0] == states[1]


def states_of(model) -> list:
    return [module.training for module in model.modules()] + [p.requires_grad for p in model.parameters()]


def test_an_error_while_the_base_runs_leaves_the_students_weights(tmp_path):
    trainer, monitor = attached(tmp_path)
    trainer.train()
    before = parameters_of(trainer.model)
    answers = [[[5, 6]] * 2] * 8
    # A token that the model does not know ends the base's pass only
    monitor._distance._teacher_prompts = [[10_000]] * 8
    with pytest.raises(IndexError):
        monitor._distance.measure(range(8), answers)
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(trainer.model).items())


@pytest.mark.parametrize("adapter", [False, True])
def test_a_killed_run_measures_from_the_same_weights(tmp_path, adapter):
    def run(seed, resume=None):
        # A new process draws other initial values of the adapter
        model = lora(seed) if adapter else None
        trainer, _ = attached(tmp_path, model=model, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(1)
    resumed = run(2, str(tmp_path / "checkpoint-2"))
    assert list(distances(whole)) == [0, 1, 3]
    assert distances(resumed) == distances(whole)
    if adapter:
        read = load_file(adapter_path(tmp_path / "agreement", whole.run_id))
        first = {name: value for name, value in parameters_of(lora(1)).items() if "lora_" in name}
        assert read.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in read.items())
    else:
        assert not list(tmp_path.glob("agreement/*.safetensors"))


def test_without_the_first_adapter_a_run_is_not_resumed(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    trainer, _ = attached(tmp_path, model=lora(), **fields)
    trainer.train()
    path, resume = adapter_path(tmp_path / "agreement", trainer.run_id), str(tmp_path / "checkpoint-2")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"start_adapter-\w+\.safetensors: .* is damaged \(.*Put the file back"):
        attached(tmp_path, model=lora(), **fields)[0].train(resume_from_checkpoint=resume)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"start_adapter-\w+\.safetensors: .*leave monitor_distance unset"):
        attached(tmp_path, model=lora(), **fields)[0].train(resume_from_checkpoint=resume)
    # A run that began without it, where a run with it was before
    attached(tmp_path, model=lora(), **{**fields, "monitor_distance": False})[0].train()
    with pytest.raises(FileNotFoundError, match="the run began without monitor_distance"):
        attached(tmp_path, model=lora(), **fields)[0].train(resume_from_checkpoint=resume)


class _Killed(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_a_later_run_that_is_killed_leaves_the_first_adapter_of_the_run_before(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = attached(tmp_path, model=lora(1), **fields)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        attached(tmp_path, model=lora(2), callbacks=[_Killed()], **fields)[0].train()
    resumed, _ = attached(tmp_path, model=lora(3), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert distances(resumed) == distances(whole)
    # A resume that is refused does not take over the directory
    owner = start_run(tmp_path)
    adapter_path(tmp_path / "agreement", whole.run_id).unlink()
    with pytest.raises(FileNotFoundError, match="its first adapter is not there"):
        attached(tmp_path, model=lora(), **fields)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run_id_of(tmp_path) == owner


def test_a_resumed_run_may_begin_to_measure(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = attached(tmp_path / "whole", **fields)
    whole.train()
    attached(tmp_path / "late", monitor_distance=False, **fields)[0].train()
    late, _ = attached(tmp_path / "late", **fields)
    late.train(resume_from_checkpoint=str(tmp_path / "late" / "checkpoint-2"))
    assert distances(late) == {3: distances(whole)[3]}


def test_a_second_run_of_a_trainer_begins_with_the_weights_that_it_has(tmp_path):
    trainer, _ = attached(tmp_path, instruction="")
    trainer.train()
    trainer.train()
    assert distances(trainer)[0] == 0.0


# The teacher's prompts


def decoded(trainer, prompts) -> list[str]:
    return [trainer.processing_class.decode(ids) for ids in prompts]


def test_training_rows_have_their_teachers_prompts(tmp_path):
    trainer, monitor = attached(tmp_path)
    for told, problem in zip(decoded(trainer, monitor._distance._teacher_prompts), monitor._problems, strict=True):
        assert trainer.prompt_pairs.instruction in told
        assert problem.prompt[0]["content"] in told


def monitor_file(tmp_path, count=8, **columns) -> str:
    lines = [
        {"prompt": [{"role": "user", "content": f"Why {i}?"}], **{k: v(i) for k, v in columns.items()}}
        for i in range(count)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "own.jsonl")


def brief(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Why {i}? Be brief."}]


def test_a_file_gets_the_instruction_and_no_prompt_is_left_out(tmp_path):
    fields = {"monitor_file": monitor_file(tmp_path), "monitor_prompts": None}
    # Training prompts of 25 tokens are dropped, monitor prompts are not
    trainer = make_trainer(tmp_path, dataset=rows(24), **{**FIELDS, **fields})
    trainer.prompt_pairs.max_prompt_tokens = 1
    told = decoded(trainer, teacher_prompts_of(trainer, load_monitor_file(fields["monitor_file"])))
    assert [f"Why {i}?" in text and trainer.prompt_pairs.instruction in text for i, text in enumerate(told)] == [
        True
    ] * 8
    assert trainer.prompt_pairs.max_prompt_tokens == 1


@pytest.mark.parametrize("column", ["teacher_prompt", "concise"])
def test_a_file_may_have_teacher_prompts_of_its_own(tmp_path, column):
    path = monitor_file(tmp_path, **{column: brief})
    script_args = CRISPScriptArguments(teacher_prompt_column=None if column == "teacher_prompt" else column)
    trainer = make_trainer(tmp_path, dataset=told_rows(), **{**FIELDS, "monitor_file": path, "monitor_prompts": None})
    told = decoded(trainer, teacher_prompts_of(trainer, load_monitor_file(path, script_args)))
    assert [f"Why {i}? Be brief." in text for i, text in enumerate(told)] == [True] * 8
    assert not any(trainer.prompt_pairs.instruction in text for text in told)


def test_a_file_without_the_training_rows_teacher_prompts_is_refused(tmp_path):
    fields = {**FIELDS, "monitor_file": monitor_file(tmp_path), "monitor_prompts": None}
    trainer = make_trainer(tmp_path, dataset=told_rows(), **fields)
    with pytest.raises(
        ValueError, match=r"the training rows have teacher prompts of their own, and monitor_file='.*'"
    ):
        attach_health(trainer, no_answer)
    script_args = CRISPScriptArguments(teacher_prompt_column="concise")
    assert "teacher_prompt" not in load_monitor_file(fields["monitor_file"], script_args).column_names


def test_a_file_whose_teacher_prompt_is_the_students_is_refused(tmp_path):
    path = monitor_file(tmp_path, teacher_prompt=lambda i: [{"role": "user", "content": f"Why {i}?"}])
    trainer = make_trainer(tmp_path, dataset=told_rows(), **{**FIELDS, "monitor_file": path, "monitor_prompts": None})
    with pytest.raises(ValueError, match=r"monitor_file='.*': row 0: the teacher's prompt equals the student's"):
        attach_health(trainer, no_answer)


# What is refused, and what warns


@pytest.mark.parametrize(("is_fsdp", "zero_stage", "by"), [(False, 3, "DeepSpeed ZeRO-3"), (True, None, "FSDP")])
def test_partitioned_weights_are_refused(is_fsdp, zero_stage, by):
    plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=rf"{by} partitions the weights.*Use ZeRO-2"):
        ConciseBaseDistance(SimpleNamespace(accelerator=accelerator, is_fsdp_enabled=is_fsdp), [], [])


def test_it_warns_without_monitor_prompts(tmp_path):
    with pytest.warns(UserWarning, match="monitor_distance has no effect without monitor_prompts or monitor_file"):
        make_trainer(tmp_path, monitor_distance=True)


def test_a_teachers_prompt_needs_positions_too(tmp_path):
    model = tiny_model(max_position_embeddings=100)
    fields = {"max_completion_length": 8, "instruction": "Be brief. " * 5}
    trainer = make_trainer(tmp_path, model=model, dataset=rows(24), **{**FIELDS, **fields})
    # The student's prompts alone would fit
    with pytest.raises(ValueError, match=r"after a prompt of 93 tokens.*the model was made for 100"):
        attach_health(trainer, no_answer)
