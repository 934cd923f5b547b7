"""Agreement with the base's majority: the prompts are left out, training is left alone, the gate follows the log, runs resume."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.helpers import make_trainer, parameters_of, rows
from tests.tiny_models import save_tiny, tiny_tokenizer
from trl_crisp.health.attach import attach_health
from trl_crisp.health.base_answers import base_path
from trl_crisp.health.monitor import AgreementMonitor
from trl_crisp.health.signals import EVENTS_FILE
from trl_crisp.run.identity import run_id_of, start_run
from trl_crisp.train import main, parse_args

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is",
    "ignore:teacher_sync_steps=",
    "ignore:.* of the base.s answers to the monitor prompts",
)

# At this temperature the tiny model repeats itself, so its answers have majorities
FIELDS = {"monitor_prompts": 8, "monitor_samples": 3, "teacher_sync_steps": 2, "max_steps": 6, "temperature": 0.02}


def first_characters(text: str) -> str | None:
    return text[:2] or None


def train(output_dir, resume=None, answer_of=first_characters, **fields):
    trainer = make_trainer(output_dir, dataset=rows(24), **{**FIELDS, "learning_rate": 1e-2, **fields})
    monitor = attach_health(trainer, answer_of).monitor
    trainer.train(resume_from_checkpoint=resume)
    return trainer, monitor


def measured(trainer) -> dict[int, dict]:
    return {log["step"]: log for log in trainer.state.log_history if "eval_agreement" in log}


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gated")
    fields = {"teacher_refresh_gate": "agreement", "save_strategy": "steps", "save_steps": 3}
    return directory, fields, *train(directory, **fields)


def test_the_base_is_asked_once_and_its_level_is_logged(gated):
    directory, _, trainer, _ = gated
    lines = [json.loads(line) for line in (directory / "agreement" / "reference.jsonl").read_text().splitlines()]
    assert 4 <= len(lines) <= 8
    log = measured(trainer)
    # Just before each refresh is due, and after the last step
    assert list(log) == [0, 1, 3, 5, 6]
    assert log[0]["eval_agreement"] == pytest.approx(sum(line["base_agreement"] for line in lines) / len(lines))
    for step in (1, 3, 5, 6):
        change = log[step]["eval_agreement"] - log[0]["eval_agreement"]
        assert log[step]["eval_agreement_change"] == pytest.approx(change)
        assert log[step]["eval_agreement_change_low"] <= log[step]["eval_agreement_change"]
        reduction = 1 - log[step]["eval_agreement_mean_tokens"] / log[0]["eval_agreement_mean_tokens"]
        assert log[step]["eval_agreement_reduction"] == pytest.approx(reduction)


def test_monitor_prompts_are_not_trained_on(gated):
    directory, _, trainer, _ = gated
    lines = (directory / "agreement" / "reference.jsonl").read_text().splitlines()
    asked = [json.dumps(json.loads(line)["prompt"]) for line in lines]
    trained = [json.dumps(prompt) for prompt in trainer.train_dataset["prompt"]]
    assert len(trained) == 24 - 8
    assert not set(asked) & set(trained)


def test_the_gate_follows_the_last_measurement(gated):
    _, _, trainer, _ = gated
    log = measured(trainer)
    fallen = [log[step - 1]["eval_agreement_change"] < -trainer.args.monitor_margin for step in (2, 4, 6)]
    assert any(fallen), "this run should break the model"
    assert (trainer.teacher.postponed, trainer.teacher.refreshes) == (sum(fallen), 3 - sum(fallen))
    assert [entry["teacher/postponed"] for entry in trainer.state.log_history if "loss" in entry][-1] == sum(fallen)


def test_a_cap_that_cuts_the_bases_answers_warns(tmp_path):
    # The tiny model ends no answer of 8 tokens
    told = r"\d+% of the base's answers .* were cut at monitor_max_new_tokens=8 tokens.* so agreement and accuracy rise as answers get shorter"
    with pytest.warns(UserWarning, match=told):
        train(tmp_path, max_steps=1)


def test_the_base_gives_its_own_number_of_answers_under_the_monitors_own_cap(tmp_path):
    fields = {"monitor_base_samples": 6, "monitor_max_new_tokens": 12}
    with pytest.warns(UserWarning, match="were cut at monitor_max_new_tokens=12 tokens"):
        trainer, monitor = train(tmp_path, max_steps=1, **fields)
    lines = [json.loads(line) for line in (tmp_path / "agreement" / "reference.jsonl").read_text().splitlines()]
    assert 3 < max(line["votes"] for line in lines) <= 6
    # Of 6 samples each agrees with the majority of the other 5, or does not; a tie among these shares it
    assert all((6 * line["base_agreement"] * 6) == pytest.approx(round(36 * line["base_agreement"])) for line in lines)
    log = measured(trainer)
    assert [log[step]["eval_agreement_mean_tokens"] for step in (0, 1)] == [12, 12]
    answers = len(monitor.references) * trainer.args.monitor_samples
    assert log[1]["eval_agreement"] * answers == pytest.approx(round(log[1]["eval_agreement"] * answers))
    assert trainer.args.max_completion_length == 8


@pytest.mark.parametrize(
    ("fields", "at_once"),
    [
        ({}, 4),
        # Answers of three times the rollouts' length
        ({"monitor_max_new_tokens": 24}, 1),
        ({"gradient_accumulation_steps": 3, "monitor_max_new_tokens": 24}, 4),
        ({"gradient_accumulation_steps": 16}, 32),
    ],
)
def test_no_more_answers_at_once_than_a_step_has_rollouts(tmp_path, fields, at_once):
    trainer = make_trainer(tmp_path, dataset=rows(80), **FIELDS, **fields)
    assert AgreementMonitor(trainer, first_characters).settings.batch_size == at_once


def fails_after_the_base():
    """Return a function that fails at the first answer of the student: the base has 24 answers, and each is read once."""
    texts = iter(range(24))

    def fails_later(text: str) -> str | None:
        if next(texts, None) is None:
            raise KeyError("no such text")
        return first_characters(text)

    return fails_later


def test_a_measurement_that_fails_leaves_a_checkpoint(tmp_path):
    with pytest.raises(KeyError, match="no such text") as failed:
        train(tmp_path, answer_of=fails_after_the_base())
    assert "Its checkpoint was saved: once the cause is gone" in failed.value.__notes__[0]
    resumed, _ = train(tmp_path, resume=True)
    assert resumed.state.global_step == 6
    # The gate has what it decides by: what failed is measured first, with the weights and the random numbers of then
    whole, _ = train(tmp_path / "whole")
    assert list(measured(resumed)) == [0, 1, 3, 5, 6]
    for step, log in measured(whole).items():
        assert {k: v for k, v in log.items() if "runtime" not in k} == {
            k: v for k, v in measured(resumed)[step].items() if "runtime" not in k
        }


def test_an_error_is_forgotten_if_its_checkpoint_could_not_be_saved(tmp_path, monkeypatch):
    fields = {**FIELDS, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, dataset=rows(24), **fields, learning_rate=1e-2)
    monitor = attach_health(trainer, fails_after_the_base()).monitor
    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer._save_checkpoint", lambda *args: exec("raise OSError('disk')"))
        with pytest.raises(OSError, match="disk"):
            trainer.train()
    monitor.answer_of = first_characters
    trainer.train()
    assert trainer.state.global_step == 6
    assert (tmp_path / "checkpoint-6").is_dir()


def test_a_measurement_that_fails_again_at_the_resume_says_that_nothing_is_lost(tmp_path):
    with pytest.raises(KeyError):
        train(tmp_path, answer_of=fails_after_the_base())
    before = sorted(tmp_path.glob("checkpoint-*"))

    def fails(text: str) -> str | None:
        raise KeyError("no such text")

    with pytest.raises(KeyError, match="no such text") as failed:
        train(tmp_path, resume=True, answer_of=fails)
    assert failed.value.__notes__[0].startswith(
        "Step 1 is due to be measured and was not, so a resumed run measures it first."
    )
    assert sorted(tmp_path.glob("checkpoint-*")) == before
    resumed, _ = train(tmp_path, resume=True)
    assert resumed.state.global_step == 6


def test_vllms_top_k_that_is_off_is_off(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), **FIELDS)
    trainer.args.top_k = -1
    assert AgreementMonitor(trainer, first_characters).settings.top_k == 0


def test_a_model_that_is_saved_alone_is_not_said_to_be_resumable(tmp_path):
    with pytest.raises(KeyError, match="no such text") as failed:
        train(tmp_path, answer_of=fails_after_the_base(), save_only_model=True)
    (note,) = failed.value.__notes__
    assert f"Its model was saved in {tmp_path}/checkpoint-1, which cannot be resumed from: " in note
    assert note.endswith("No other checkpoint can be resumed from, so the run has to start again.")


def test_unset_samples_and_cap_are_the_students_and_the_rollouts(tmp_path):
    args = make_trainer(tmp_path, dataset=rows(24), **FIELDS).args
    assert (args.monitor_base_samples, args.monitor_max_new_tokens) == (3, 8)


def test_a_cap_beyond_the_models_positions_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), **FIELDS, monitor_max_new_tokens=100_000)
    with pytest.raises(ValueError, match="monitor_max_new_tokens"):
        AgreementMonitor(trainer, first_characters)


def test_a_killed_gated_run_ends_with_the_same_bits(gated):
    directory, fields, whole, _ = gated
    resumed, _ = train(directory, resume=str(directory / "checkpoint-3"), **fields)
    assert all(
        torch.equal(value, parameters_of(whole.model)[name]) for name, value in parameters_of(resumed.model).items()
    )
    assert (resumed.teacher.postponed, resumed.teacher.refreshes) == (whole.teacher.postponed, whole.teacher.refreshes)
    for step, log in measured(whole).items():
        assert {k: v for k, v in log.items() if "runtime" not in k} == {
            k: v for k, v in measured(resumed)[step].items() if "runtime" not in k
        }


@pytest.mark.parametrize(
    ("field", "before", "now"),
    [
        ("monitor_samples", 3, 4),
        ("temperature", 0.02, 1.0),
        ("top_p", 1.0, 0.9),
        ("top_k", 0, 5),
        ("chat_template_kwargs", None, {"enable_thinking": False}),
        ("seed", 42, 7),
    ],
)
def test_a_run_whose_answers_are_sampled_otherwise_is_not_resumed(gated, field, before, now):
    directory, fields, _, _ = gated
    told = rf"monitor: .*'{field}': {before}.*'{field}': {re.escape(str(now))}"
    with pytest.raises(ValueError, match=told):
        train(directory, resume=str(directory / "checkpoint-3"), **{**fields, field: now})


class _Killed(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_a_run_that_resumes_has_the_answers_of_its_own_base(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    whole, monitor = train(tmp_path, **fields)
    # Another run begins in the same directory
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, answer_of=lambda text: "x", callbacks=[_Killed()], **fields)
    references = (tmp_path / "agreement" / "reference.jsonl").read_text().splitlines()
    assert {json.loads(line)["answer"] for line in references} == {"x"}
    resumed, again = train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **fields)
    assert again.references == monitor.references
    assert measured(resumed)[3]["eval_agreement"] == measured(whole)[3]["eval_agreement"]


def test_a_run_whose_right_answers_have_changed_is_not_resumed(tmp_path):
    def run(gold, resume=None):
        asked = [{"prompt": row["prompt"], "answer": gold} for row in rows(8, "Now: ")]
        fields = {
            "monitor_file": "own.jsonl",
            "monitor_samples": 2,
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        trainer = make_trainer(tmp_path, dataset=rows(16), **fields)
        attach_health(trainer, monitor_dataset=Dataset.from_list(asked))
        trainer.train(resume_from_checkpoint=resume)

    run("12")
    with pytest.raises(
        ValueError, match="the right answer of prompt 0 was '12' when this run began, and now it is '13'"
    ):
        run("13", str(tmp_path / "checkpoint-1"))


def test_a_resume_that_is_refused_leaves_the_directory_as_it_is(gated, tmp_path):
    directory, fields, whole, _ = gated
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    owner, events = start_run(run), run / EVENTS_FILE
    events.write_text("of the other run\n")
    base_path(run / "agreement", whole.run_id).unlink()
    with pytest.raises(FileNotFoundError, match="the base's answers are not there"):
        train(run, resume=str(run / "checkpoint-3"), **fields)
    assert run_id_of(run) == owner
    assert events.read_text() == "of the other run\n"


def test_measuring_leaves_the_training_alone(tmp_path):
    trainer, _ = train(tmp_path / "measured")
    plain = make_trainer(
        tmp_path / "plain",
        dataset=trainer.train_dataset.select_columns(["prompt"]),
        **{name: value for name, value in FIELDS.items() if not name.startswith("monitor")},
        learning_rate=1e-2,
    )
    plain.train()
    assert all(
        torch.equal(value, parameters_of(plain.model)[name]) for name, value in parameters_of(trainer.model).items()
    )


def test_without_majorities_nothing_is_measured_and_each_refresh_happens(tmp_path, capsys):
    trainer, monitor = train(
        tmp_path, answer_of=lambda text: None, teacher_refresh_gate="agreement", max_steps=3, teacher_sync_steps=1
    )
    assert "only 0 of 8 monitor prompts" in capsys.readouterr().out
    assert not monitor.is_on
    assert measured(trainer) == {}
    assert (trainer.teacher.refreshes, trainer.teacher.postponed) == (3, 0)


def test_a_gate_that_is_not_attached_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), **FIELDS, teacher_refresh_gate="agreement")
    with pytest.raises(ValueError, match=r"(?s)teacher_refresh_gate='agreement'.*nothing measures.*attach_health"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"monitor_prompts": 7}, "Give at least 8"),
        ({"monitor_samples": 1}, "at least 2 answers"),
        ({"monitor_base_samples": 1}, "monitor_base_samples=1: a majority needs at least 2"),
        ({"monitor_max_new_tokens": 0}, "monitor_max_new_tokens=0 must be at least 1"),
        ({"monitor_margin": 3.0}, "a number from 0 to below 1"),
        ({"monitor_steps": 0}, "at least 1"),
        ({"monitor_prompts": 8.5}, r"monitor_prompts=8\.5 must be a whole number, such as 128"),
        ({"monitor_samples": 2.5}, r"monitor_samples=2\.5 must be a whole number"),
        ({"monitor_base_samples": 2.5}, r"monitor_base_samples=2\.5 must be a whole number"),
        ({"monitor_max_new_tokens": 2.5}, r"monitor_max_new_tokens=2\.5 must be a whole number"),
        ({"monitor_steps": 2.5}, r"monitor_steps=2\.5 must be a whole number"),
        ({"monitor_steps": float("nan")}, "monitor_steps=nan must be a whole number"),
        ({"monitor_grader": "essay"}, "'math', 'choice', 'text'"),
        ({"teacher_refresh_gate": "length"}, "Set 'agreement'"),
        ({"teacher_refresh_gate": "agreement", "monitor_prompts": None}, "Set monitor_prompts"),
        ({"teacher_refresh_gate": "agreement", "monitor_steps": 3}, "not a multiple of monitor_steps=3"),
        (
            {"teacher_refresh_gate": "agreement", "teacher_model_kind": "base", "teacher_sync_steps": None},
            "no refreshes",
        ),
    ],
)
def test_bad_fields_are_refused(tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, **{**FIELDS, **fields})


def test_fields_without_monitor_prompts_warn(tmp_path):
    with pytest.warns(
        UserWarning, match="monitor_samples, monitor_base_samples, monitor_margin has no effect without"
    ):
        make_trainer(tmp_path, monitor_samples=3, monitor_base_samples=16, monitor_margin=0.1)


def test_too_few_rows_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(8), **FIELDS)
    with pytest.raises(ValueError, match="have 8 different prompts, so none would be left"):
        AgreementMonitor(trainer, first_characters)


def test_rows_that_do_not_fill_a_step_without_the_monitor_prompts_are_refused(tmp_path):
    for steps in (4, -1):
        trainer = make_trainer(tmp_path, dataset=rows(11), **{**FIELDS, "max_steps": steps})
        with pytest.raises(
            ValueError,
            match=r"monitor_prompts=8 leaves 3 of the 11 rows to train on, and a step needs 4\. Give more rows",
        ):
            attach_health(trainer, first_characters)
    trainer = make_trainer(tmp_path, dataset=rows(12), **FIELDS)
    assert attach_health(trainer, first_characters).monitor is not None


def test_a_refused_monitor_leaves_the_trainer_as_it_was(tmp_path):
    fields = {"teacher_refresh_gate": "agreement", "monitor_max_new_tokens": 100_000}
    trainer = make_trainer(tmp_path, dataset=rows(24), **FIELDS, **fields)
    with pytest.raises(ValueError, match="monitor_max_new_tokens"):
        attach_health(trainer, first_characters)
    assert len(trainer.train_dataset) == 24
    assert trainer.teacher.refresh_gate is None
    trainer.args.monitor_max_new_tokens = 8
    attach_health(trainer, first_characters)
    assert len(trainer.train_dataset) == 16


@pytest.mark.parametrize("system", [False, True])
def test_a_row_that_differs_from_a_monitor_prompt_only_around_it_is_left_out(tmp_path, system):
    def again(row) -> dict:
        message = {**row["prompt"][0], "content": f" {row['prompt'][0]['content']}\n"}
        return {"prompt": [{"role": "system", "content": "Answer."}, message] if system else [message]}

    once = list(rows(24))
    # A system message counts if some rows differ in nothing else
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list([*once, *map(again, once)]), **FIELDS)
    monitor = AgreementMonitor(trainer, first_characters)
    asked = [problem.prompt[-1]["content"].strip() for problem in monitor._problems]
    trained = [(len(prompt), prompt[-1]["content"].strip()) for prompt in trainer.train_dataset["prompt"]]
    assert len(set(asked)) == 8
    if system:
        assert len(trained) == 40
        assert len({tuple(map(str, problem.prompt)) for problem in monitor._problems}) == 8
    else:
        assert len(trained) == 32
        assert not {text for _, text in trained} & set(asked)


def held_out(tmp_path, asked, trained):
    fields = {name: value for name, value in FIELDS.items() if name != "monitor_prompts"}
    trainer = make_trainer(tmp_path, dataset=trained, **fields, monitor_file="own.jsonl")
    return attach_health(trainer, first_characters, monitor_dataset=asked)


def with_prompts(change) -> Dataset:
    return Dataset.from_list([{"prompt": change(row["prompt"][0])} for row in rows(8)])


@pytest.mark.parametrize(
    "change",
    [
        lambda message: [{**message, "content": f" {message['content']}\n"}],
        lambda message: [{"role": "system", "content": "Answer."}, message],
        lambda message: [{**message, "content": [{"type": "text", "text": message["content"]}]}],
    ],
)
def test_a_training_prompt_is_found_whatever_is_around_it(tmp_path, change):
    with pytest.raises(ValueError, match="8 of its prompts are training prompts, such as the file's prompt 0"):
        held_out(tmp_path, with_prompts(change), rows(24))


def test_rows_that_differ_in_the_system_message_alone_are_different_prompts(tmp_path):
    def told(name: str, count: int) -> Dataset:
        user = {"role": "user", "content": "Sum it up."}
        return Dataset.from_list(
            [{"prompt": [{"role": "system", "content": f"{name} {i}"}, user]} for i in range(count)]
        )

    assert held_out(tmp_path, told("held out", 8), told("trained", 24)).monitor is not None
    with pytest.raises(ValueError, match="8 of its prompts are training prompts"):
        held_out(tmp_path, told("trained", 8), told("trained", 24))


def test_prompts_of_another_type_than_the_rows_are_refused(tmp_path):
    texts = Dataset.from_dict({"prompt": [f"Now: {i}" for i in range(8)]})
    with pytest.raises(ValueError, match="its prompts are texts, and the training prompts are lists of messages"):
        held_out(tmp_path, texts, rows(24))


def test_a_stream_is_said_not_to_be_checked(tmp_path, capsys):
    held_out(tmp_path, rows(8), rows(24).to_iterable_dataset())
    assert "The training rows are a stream, so whether one of these prompts is trained on was not checked" in (
        capsys.readouterr().out
    )


def test_the_script_attaches_the_monitor(tmp_path, capsys):
    save_tiny(tmp_path / "model", "qwen3")
    lines = [json.dumps({"prompt": [{"role": "user", "content": f"What is {i} + 1?"}]}) for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    argv = [
        *("--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--max_completion_length", "8"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--report_to", "none"),
        *("--use_cpu", "--monitor_prompts", "8", "--monitor_samples", "2", "--teacher_refresh_gate", "agreement"),
    ]
    main(*parse_args(argv))
    said = capsys.readouterr()
    assert (
        "is measured: 8 prompts, left out of the training rows, 2 answers of the base to each, 2 at each" in said.out
    )
    assert "sampling: 16/16" in said.err
    # The answers of this untrained model are no math
    assert "only 0 of 8 monitor prompts" in said.out


def test_tools_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), **FIELDS)
    trainer.tools = [len]
    with pytest.raises(ValueError, match="call tools cannot be sampled"):
        AgreementMonitor(trainer, first_characters)


def test_sampling_fields_that_the_monitor_lacks_warn(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), **FIELDS, min_p=0.1, repetition_penalty=1.2)
    with pytest.warns(UserWarning, match="min_p, repetition_penalty has no effect on the answers to monitor prompts"):
        AgreementMonitor(trainer, first_characters)


@pytest.mark.parametrize("template_opens", [True, False])
def test_an_answer_that_is_cut_in_the_thinking_that_its_prompt_opened_does_not_vote(tmp_path, template_opens):
    dataset = rows(24)
    if template_opens:
        # As templates of reasoning models end
        dataset = Dataset.from_dict({"prompt": [f"{row['prompt'][0]['content']}\n<think>\n" for row in dataset]})
    trainer = make_trainer(tmp_path, kind="qwen3", dataset=dataset, **FIELDS)
    monitor = attach_health(trainer).monitor
    texts = [["First \\boxed{3}, but wait", "So.</think>\\boxed{4}"]]
    answers = [[tiny_tokenizer("qwen3")(text)["input_ids"] for text in row] for row in texts]
    expected = [["" if template_opens else texts[0][0], "\\boxed{4}"]]
    assert monitor._final_texts([0], texts, answers) == expected


def test_each_measurement_draws_its_own_random_numbers(tmp_path, monkeypatch):
    """An unchanged student must not draw the very answers that made the majority."""
    drawn, sample = {}, AgreementMonitor._sample

    def kept(self, *args):
        found = sample(self, *args)
        drawn[self.trainer.state.global_step] = found[1]
        return found

    monkeypatch.setattr(AgreementMonitor, "_sample", kept)
    fields = {"learning_rate": 0.0, "temperature": 1.0, "monitor_steps": 1, "max_steps": 3}
    train(tmp_path, answer_of=lambda text: "a", **fields)
    assert list(drawn) == [0, 1, 2, 3]
    assert all(len(answers) == 8 for answers in drawn.values())
    assert len({str(answers) for answers in drawn.values()}) == 4


def test_a_final_answer_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match=r"answer_of returned \(1, 2\), of type tuple\. Return the final answer as a str"
    ):
        train(tmp_path, answer_of=lambda text: (1, 2))


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([None, "7"], None),
        ([["7", None], ["7"]], "column 'answer' has no final answers: "),
        (["Long thoughts. " * 20, "7"], "column 'answer' has solutions without a marked final answer"),
    ],
)
def test_a_column_of_right_answers_that_is_not_used_is_told(tmp_path, capsys, answers, why):
    asked = Dataset.from_list([{**row, "answer": answers[i % 2]} for i, row in enumerate(rows(8, "Now: "))])
    fields = {name: value for name, value in FIELDS.items() if name != "monitor_prompts"}
    trainer = make_trainer(tmp_path, dataset=rows(24), **fields, monitor_file="own.jsonl")
    attach_health(trainer, first_characters, monitor_dataset=asked)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Accuracy is not measured")]
    assert len(told) == (why is not None)
    assert why is None or why in told[0]


@pytest.mark.parametrize(("samples", "warns"), [(2, True), (3, True), (4, False), (16, False)])
def test_few_answers_of_the_base_warn(tmp_path, recwarn, samples, warns):
    make_trainer(tmp_path, dataset=rows(24), **{**FIELDS, "monitor_base_samples": samples})
    told = [one for one in recwarn if "of the base its own level is wrong" in str(one.message)]
    assert bool(told) == warns


def test_with_a_function_of_the_users_any_of_several_right_answers_is_right(tmp_path, capsys):
    right = [["12", "a dozen"] if i % 2 else ["7", "x"] for i in range(8)]
    asked = Dataset.from_list([{**row, "answer": one} for row, one in zip(rows(8, "Now: "), right, strict=True)])
    fields = {name: value for name, value in FIELDS.items() if name != "monitor_prompts"} | {"max_steps": 1}
    trainer = make_trainer(tmp_path, dataset=rows(24), **fields, monitor_file="own.jsonl")
    attach_health(trainer, lambda text: "a dozen", monitor_dataset=asked)
    trainer.train()
    assert "cannot be graded" not in capsys.readouterr().out
    assert [
        log["eval_agreement_accuracy"] for log in trainer.state.log_history if "eval_agreement_accuracy" in log
    ] == [
        0.5,
        0.5,
    ]
