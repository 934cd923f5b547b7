"""The paper's defaults, what is refused, what warns, and the way through TrlParser."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
import yaml
from trl import DistillationConfig, TrlParser

from trl_crisp import CRISPConfig

SENTENCE = "Solve the following math problem step by step."


NAN, INF = float("nan"), float("inf")


def config(output_dir="out", **fields) -> CRISPConfig:
    """Return a config on the CPU, whose global batch is the paper's unless told."""
    return CRISPConfig(str(output_dir), **{"use_cpu": True, "report_to": "none", **fields})


def messages_of(**fields) -> list[str]:
    """Return the warnings that a config gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config(**fields)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


# Field, value, where it comes from
DEFAULTS = [
    ("learning_rate", 1e-6, "Table Hyperparameters"),
    ("lr_scheduler_type", "constant", "Table Hyperparameters"),
    ("warmup_steps", 0, "the schedule is constant from the first step"),
    ("weight_decay", 0.01, "Table Hyperparameters"),
    ("max_grad_norm", 1.0, "Table Hyperparameters"),
    ("num_train_epochs", 1, "Table Hyperparameters"),
    ("bf16", True, "Table Hyperparameters"),
    ("gradient_checkpointing", True, "Table Hyperparameters"),
    ("per_device_train_batch_size", 2, "Table Hyperparameters: micro-batch"),
    ("gradient_accumulation_steps", 16, "Table Hyperparameters: global batch 32 on one process"),
    ("temperature", 1.0, "Table Hyperparameters: rollouts"),
    ("top_p", 1.0, "Table Hyperparameters: rollouts"),
    ("top_k", 0, "the rollouts are samples of the whole distribution"),
    ("min_p", None, "the rollouts are samples of the whole distribution"),
    ("repetition_penalty", 1.0, "the rollouts are samples of the whole distribution"),
    ("max_completion_length", 8192, "Table Hyperparameters"),
    ("max_prompt_length", 1024, "Table Hyperparameters"),
    ("profile_steps", False, "ours, because measuring costs some speed"),
    ("resume_from_checkpoint", None, "TRL's"),
    ("allow_changed_resume", False, "ours, because a silent change trains toward something else"),
    ("collapse_guard", True, "ours, because a lost model should not be saved as the result"),
    ("beta", 1.0, "Eq. 1: reverse KL"),
    ("instruction", "v2", "the paper's default"),
    ("instruction_replaces", SENTENCE, "Figure 2"),
    ("instruction_role", "user", "Figure 2"),
    ("teacher_model_kind", "periodic", "Eq. 2"),
    ("teacher_sync_steps", 50, "M = 50"),
    ("teacher_update_rate", None, "Eq. 2 copies"),
    ("teacher_offload", False, "ours, because the copies cost time"),
    ("monitor_prompts", None, "ours: off, as in the paper"),
    ("monitor_samples", 5, "ours, as in the trials of the rule"),
    ("monitor_base_samples", None, "ours: as many as the student's"),
    ("monitor_max_new_tokens", None, "ours: the rollouts' cap"),
    ("monitor_steps", None, "without monitor prompts nothing is measured"),
    ("monitor_grader", "math", "the paper's task"),
    ("monitor_margin", 0.03, "ours, as in the trials of the rule"),
    ("monitor_distance", False, "ours, because it costs two passes over the answers"),
    ("teacher_refresh_gate", None, "Algorithm 1 has no gate"),
    ("monitor_file", None, "ours: off, as in the paper"),
    ("stop_at_sweet_spot", False, "the paper trains for a number of steps"),
    ("target_reduction", None, "the paper trains for a number of steps"),
    ("loss_normalization", "sequence", "Algorithm 1"),
    ("loss_temperature", 1.0, "authors' code"),
]


@pytest.mark.parametrize(("field", "value", "source"), DEFAULTS, ids=[row[0] for row in DEFAULTS])
def test_defaults_are_the_papers(field, value, source):
    assert getattr(config(), field) == value, source


def test_the_optimizer_is_adamw():
    assert config().optim.startswith("adamw_torch")


def test_every_field_that_crisp_sets_is_in_the_table_of_defaults():
    ours = set(CRISPConfig.__annotations__) & {f.name for f in dataclasses.fields(CRISPConfig)}
    assert ours <= {row[0] for row in DEFAULTS}
    new = {f.name for f in dataclasses.fields(CRISPConfig)} - {f.name for f in dataclasses.fields(DistillationConfig)}
    assert new == {
        "instruction",
        "instruction_replaces",
        "instruction_role",
        "teacher_model_kind",
        "teacher_sync_steps",
        "teacher_update_rate",
        "teacher_offload",
        "monitor_prompts",
        "monitor_samples",
        "monitor_base_samples",
        "monitor_max_new_tokens",
        "monitor_steps",
        "monitor_grader",
        "monitor_margin",
        "monitor_distance",
        "teacher_refresh_gate",
        "monitor_file",
        "stop_at_sweet_spot",
        "target_reduction",
        "loss_normalization",
        "loss_temperature",
        "profile_steps",
        "max_prompt_length",
        "allow_changed_resume",
        "collapse_guard",
    }


def test_every_field_of_ours_has_a_help_text_and_is_in_the_docstring():
    for field in dataclasses.fields(CRISPConfig):
        if field.name in CRISPConfig.__annotations__:
            assert field.metadata["help"].strip().endswith("."), field.name
            assert f"{field.name} (`" in CRISPConfig.__doc__, field.name


def test_the_defaults_do_not_warn():
    assert messages_of() == []


# Resolution


@pytest.mark.parametrize(
    ("fields", "sync_steps", "update_rate"),
    [
        ({}, 50, None),
        ({"teacher_sync_steps": 20}, 20, None),
        ({"teacher_model_kind": "ema"}, 1, 0.005),
        ({"teacher_model_kind": "ema", "teacher_sync_steps": 5}, 5, 0.005),
        ({"teacher_model_kind": "ema", "teacher_update_rate": 0.1}, 1, 0.1),
        ({"teacher_model_kind": "ema", "teacher_update_rate": 1.0}, 1, 1.0),
        ({"teacher_model_kind": "base"}, None, None),
        ({"teacher_model_kind": "live"}, None, None),
    ],
)
def test_the_schedule_is_resolved(fields, sync_steps, update_rate):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolved = config(**fields)
    assert (resolved.teacher_sync_steps, resolved.teacher_update_rate) == (sync_steps, update_rate)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [(None, None), ("", None), (" \n", None), ("Think.", "Think."), ("Think.\n", "Think."), (" Think.", "Think.")],
)
def test_instruction_replaces_is_bare_text_or_none(given, resolved):
    assert config(instruction_replaces=given).instruction_replaces == resolved


def test_the_rollouts_temperature_is_not_the_losss():
    assert config(temperature=0.7).loss_temperature == 1.0
    assert config(loss_temperature=2.0).temperature == 1.0


@pytest.mark.parametrize("value", [None, 1, 7])
def test_max_prompt_length_may_be_any_count_or_none(value):
    assert config(max_prompt_length=value).max_prompt_length == value


# Errors: the fields, and what their message has to say: the value, the reason or the way out
ERRORS = [
    ({"instruction_role": "assistant"}, ["'assistant'", "'user', 'system'"]),
    ({"teacher_model_kind": "frozen"}, ["'frozen'", "'periodic', 'base', 'ema', 'live'"]),
    ({"loss_normalization": "batch"}, ["'batch'", "'sequence', 'token'"]),
    ({"loss_temperature": 0.0}, ["loss_temperature=0.0", "above 0"]),
    ({"loss_temperature": -1.0}, ["loss_temperature=-1.0"]),
    ({"max_prompt_length": 0}, ["max_prompt_length=0", "None to keep all"]),
    ({"max_prompt_length": -5}, ["max_prompt_length=-5"]),
    ({"instruction": None}, ["instruction=None", "give ''"]),
    ({"instruction": 50}, ["instruction=50"]),
    ({"teacher_model_name_or_path": "gpt2"}, ["'gpt2'", "the student itself", "trl.DistillationTrainer"]),
    ({"teacher_model_revision": "main"}, ["teacher_model_revision='main'", "the student itself"]),
    ({"teacher_model_init_kwargs": {"device_map": "auto", "attn": 1}}, ["attn, device_map", "only 'dtype'"]),
    ({"teacher_model_init_kwargs": '{"revision": "main"}'}, ["revision", "only 'dtype'"]),
    ({"teacher_model_init_kwargs": {"dtype": "float99"}}, ["'float99'", "'bfloat16'"]),
    ({"teacher_model_init_kwargs": {"dtype": "nn"}}, ["'nn'"]),
    ({"teacher_sync_steps": 0}, ["teacher_sync_steps=0", "teacher_model_kind='base'"]),
    ({"teacher_sync_steps": -1}, ["teacher_sync_steps=-1"]),
    ({"teacher_model_kind": "ema", "teacher_sync_steps": 0}, ["teacher_sync_steps=0"]),
    ({"teacher_model_kind": "ema", "teacher_update_rate": 0.0}, ["teacher_update_rate=0.0", "at most 1"]),
    ({"teacher_model_kind": "ema", "teacher_update_rate": 1.5}, ["teacher_update_rate=1.5", "above 0"]),
    (
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        ["add_generation_prompt", "not a flag of a chat template"],
    ),
    ({"chat_template_kwargs": '{"tools": [], "messages": []}'}, ["messages, tools", "such as enable_thinking"]),
    ({"chat_template_kwargs": {"truncation": True, "enable_thinking": False}}, ["has truncation, which"]),
    ({"beta": 1.5}, ["beta", "1.5"]),
    ({"beta": -0.5}, ["beta", "-0.5"]),
]


@pytest.mark.parametrize(("fields", "phrases"), ERRORS, ids=[str(row[0]) for row in ERRORS])
def test_bad_fields_are_refused_with_value_and_reason(fields, phrases):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r".+") as error:
            config(**fields)
    for phrase in phrases:
        assert phrase in str(error.value)


EMA_1 = {"teacher_model_kind": "ema", "teacher_sync_steps": 1}
# The fields, and the key phrases of each warning in order
WARNINGS = [
    (
        {"per_device_train_batch_size": 1},
        [["16 rollouts", "1 per device x 16 accumulation steps x 1", "the paper's is 32"]],
    ),
    ({"gradient_accumulation_steps": 32}, [["64 rollouts"]]),
    ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, []),
    (
        {"teacher_model_kind": "live"},
        [["follows the student at every step", "60.8 instead of 95.7", "6.7 instead of 76.2"]],
    ),
    ({"teacher_sync_steps": 1}, [["follows the student at every step"]]),
    (
        {"teacher_sync_steps": 2},
        [["teacher_sync_steps=2", "76.2 before training", "49.6 with M = 10", "6.7 with M = 1"]],
    ),
    ({"teacher_sync_steps": 9}, [["teacher_sync_steps=9"]]),
    ({"teacher_sync_steps": 10}, []),
    (EMA_1, []),
    ({"teacher_model_kind": "base"}, []),
    ({"teacher_model_kind": "base", "teacher_sync_steps": 50}, [["teacher_sync_steps has no effect", "'base'"]]),
    (
        {"teacher_model_kind": "live", "teacher_offload": True},
        [["teacher_offload has no effect", "'live'"], ["follows the student"]],
    ),
    (
        {"teacher_model_kind": "live", "teacher_sync_steps": 50},
        [["teacher_sync_steps has no effect", "'live'"], ["follows the student"]],
    ),
    ({"teacher_update_rate": 0.1}, [["teacher_update_rate has no effect", "'periodic'", "only with 'ema'"]]),
    ({"teacher_model_kind": "base", "teacher_update_rate": 0.1}, [["teacher_update_rate has no effect", "'base'"]]),
    ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, []),
    ({"teacher_model_init_kwargs": {"dtype": "auto"}}, []),
    (
        {"teacher_model_kind": "live", "teacher_model_init_kwargs": {"dtype": "bfloat16"}},
        [["teacher_model_init_kwargs has no effect"], ["follows the student"]],
    ),
    ({"instruction": ""}, []),
    ({"instruction": "", "instruction_replaces": None}, []),
    ({"instruction": "", "instruction_replaces": "Think."}, [["instruction_replaces='Think.' has no effect"]]),
    ({"instruction": "", "instruction_role": "system"}, [["instruction_role='system' has no effect"]]),
]


@pytest.mark.parametrize(("fields", "expected"), WARNINGS, ids=[str(row[0]) for row in WARNINGS])
def test_fields_without_effect_warn_and_others_do_not(fields, expected):
    messages = messages_of(**fields)
    assert len(messages) == len(expected), messages
    for message, phrases in zip(messages, expected, strict=True):
        for phrase in phrases:
            assert phrase in message


@pytest.mark.parametrize("fields", [{"gradient_accumulation_steps": 1}, {"teacher_update_rate": 0.1}])
def test_warnings_point_to_who_made_the_config(fields):
    with pytest.warns(UserWarning, match=r"The global batch|has no effect") as caught:
        CRISPConfig("out", use_cpu=True, report_to="none", **fields)
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]


# Round trips

EVERY_FIELD = {
    "instruction": "percent:50",
    "instruction_replaces": "Think: step by step.",
    "instruction_role": "system",
    "teacher_model_kind": "ema",
    "teacher_sync_steps": 3,
    "teacher_update_rate": 0.01,
    "teacher_offload": True,
    "loss_normalization": "token",
    "loss_temperature": 0.5,
    "max_prompt_length": 77,
    "learning_rate": 2e-5,
    "beta": 0.5,
    "max_completion_length": 99,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
}


def parse(arguments: list[str]) -> CRISPConfig:
    (parsed,) = TrlParser([CRISPConfig]).parse_args_and_config(
        ["--output_dir", "out", "--use_cpu", "--report_to", "none", *arguments]
    )
    return parsed


def write_yaml(tmp_path, text: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_every_field_is_read_from_yaml(tmp_path):
    parsed = parse(write_yaml(tmp_path, yaml.safe_dump(EVERY_FIELD)))
    for name, value in EVERY_FIELD.items():
        assert getattr(parsed, name) == value, name
        assert getattr(parsed, name) != getattr(config(), name), f"{name}: the default would pass too"


def test_every_field_is_read_from_flags():
    parsed = parse([part for name, value in EVERY_FIELD.items() for part in (f"--{name}", str(value))])
    for name, value in EVERY_FIELD.items():
        assert getattr(parsed, name) == value, name


def test_flags_win_over_yaml(tmp_path):
    arguments = write_yaml(tmp_path, "instruction: v1\nteacher_sync_steps: 20\n")
    parsed = parse([*arguments, "--instruction", "v3"])
    assert (parsed.instruction, parsed.teacher_sync_steps) == ("v3", 20)


def test_yaml_as_people_write_it_is_read(tmp_path):
    text = """\
learning_rate: 1e-6  # YAML reads this as text
instruction: |
  Be brief.
  And right.
instruction_replaces: null
max_prompt_length: null
teacher_model_init_kwargs:
  dtype: bfloat16
"""
    parsed = parse(write_yaml(tmp_path, text))
    assert parsed.learning_rate == 1e-6
    assert parsed.instruction.strip() == "Be brief.\nAnd right."
    assert parsed.instruction_replaces is None
    assert parsed.max_prompt_length is None
    assert parsed.teacher_model_init_kwargs == {"dtype": "bfloat16"}


def test_empty_texts_are_read_from_flags():
    parsed = parse(["--instruction", "", "--instruction_replaces", ""])
    assert (parsed.instruction, parsed.instruction_replaces) == ("", None)


def test_a_choice_that_is_none_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        parse(["--teacher_model_kind", "frozen"])
    assert "periodic" in capsys.readouterr().err


def test_the_help_renders(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    assert "--teacher_sync_steps" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["periodic", "base", "ema"])
def test_to_dict_is_json_and_comes_back(kind):
    given = {**EVERY_FIELD, "teacher_model_kind": kind, "teacher_sync_steps": None, "teacher_update_rate": None}
    first = config(**given)
    fields = json.loads(json.dumps(first.to_dict()))
    assert json.loads(first.to_json_string())["instruction"] == "percent:50"
    names = {f.name for f in dataclasses.fields(CRISPConfig) if f.init}
    with warnings.catch_warnings():
        # What the first resolved is no setting without effect for the second
        warnings.simplefilter("error", category=UserWarning)
        second = CRISPConfig(**{name: value for name, value in fields.items() if name in names})
    assert second.to_dict() == first.to_dict()


def test_it_can_be_saved_and_loaded_as_the_trainer_does(tmp_path):
    first = config(**EVERY_FIELD)
    torch.save(first, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).to_dict() == first.to_dict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"warmup_steps": 2}, ["warmup_steps=2 has no effect", "'constant_with_warmup'"]),
        ({"warmup_steps": 0.1}, ["warmup_steps=0.1 has no effect", "'constant_with_warmup'"]),
        ({"lr_scheduler_kwargs": {"num_cycles": 1}}, ["lr_scheduler_kwargs={'num_cycles': 1} has no effect"]),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 1}},
            ["lr_scheduler_kwargs={'num_cycles': 1} has no effect with 'constant_with_warmup'"],
        ),
        ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor=0.1 has no effect"]),
        ({"train_sampling_strategy": "group_by_length"}, ["train_sampling_strategy='group_by_length' has no effect"]),
        ({"vllm_mode": "server"}, ["vllm_mode has no effect without use_vllm=True"]),
    ],
)
def test_a_setting_of_the_parents_without_effect_warns(fields, words):
    (message,) = messages_of(**fields)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("fields", [{"torch_compile": True}, {"torch_compile_backend": "eager"}])
def test_torch_compile_warns(monkeypatch, fields):
    # transformers sets them, and the next test must not find them
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
    (message,) = messages_of(**fields)
    assert "torch_compile=True has no effect" in message


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_warmup_that_works_does_not_warn(schedule):
    assert messages_of(lr_scheduler_type=schedule, warmup_steps=2) == []


def test_auto_find_batch_size_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"auto_find_batch_size=True .*per_device_train_batch_size lower"):
        config(auto_find_batch_size=True)


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"bf16": False, "bf16_full_eval": True}])
def test_bf16_without_a_gpu_says_what_to_add(monkeypatch, fields):
    monkeypatch.setattr("trl_crisp.config.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="`--bf16 false --use_cpu true`"):
        config(use_cpu=False, **fields)


@pytest.mark.parametrize("report_to", ["wandb", ["tensorboard", "wandb"]])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch, report_to):
    monkeypatch.setattr("trl_crisp.config.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"report_to='wandb': the package wandb is not installed.*pip install wandb"):
        config(report_to=report_to)


def test_a_tracker_that_there_is_not_lists_those_there_are():
    with pytest.raises(ValueError, match=r"report_to='wandbb' .*tensorboard, trackio, wandb"):
        config(report_to="wandbb")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("temperature", "loss_temperature")
            for value in (float("nan"), float("inf"), 0.0)
        ),
        ("beta", float("nan")),
        ("top_p", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("teacher_sync_steps", float("nan")),
        ("teacher_sync_steps", 1.5),
        *((name, value) for name in ("learning_rate", "weight_decay", "max_grad_norm") for value in (NAN, INF, -1.0)),
        *((name, value) for name in ("adam_beta1", "adam_beta2") for value in (NAN, 1.0, -0.1)),
        ("adam_epsilon", -1e-8),
        *(
            (name, value)
            for name in ("gradient_accumulation_steps", "max_completion_length")
            for value in (0, -3, 1.5)
        ),
        *((f"per_device_{name}_batch_size", value) for name in ("train", "eval") for value in (0, -1)),
        *(("top_k", value) for value in (-1, 1.5)),
        *(("min_p", value) for value in (-0.1, 1.1, NAN)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, NAN, INF)),
        *((name, value) for name in ("seed", "data_seed") for value in (-1, 2**32, 0.5)),
        *(("max_steps", value) for value in (0, -2, 1.5)),
        *(("num_train_epochs", value) for value in (0, -1.0, NAN, INF)),
    ],
)
def test_numbers_that_no_run_could_use_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}.* must be "):
        config(bf16=False, **{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0},
        {"adam_beta1": 0.0, "top_k": 5, "min_p": 1.0, "repetition_penalty": 1.1, "seed": 2**32 - 1, "data_seed": 0},
        {"max_steps": 3, "num_train_epochs": 0},
        {"num_train_epochs": 0.5},
        {"use_vllm": True, "top_k": -1},
        {"generation_kwargs": {"num_return_sequences": 1, "suppress_tokens": [3], "do_sample": False}},
        {"use_vllm": True, "generation_kwargs": {"stop": ["###"]}},
        {"accelerator_config": {"even_batches": False}},
    ],
    ids=str,
)
def test_numbers_at_the_ends_of_their_ranges_are_taken(fields):
    made = config(bf16=False, **fields)
    assert all(getattr(made, name) == value for name, value in fields.items() if name != "accelerator_config")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"generation_kwargs": {"num_return_sequences": 2}},
            "num_return_sequences=2, but each row of a batch has one",
        ),
        ({"use_vllm": True, "generation_kwargs": {"n": 4}}, "n=4, but each row of a batch has one"),
        ({"generation_kwargs": {"return_dict_in_generate": True}}, "the trainer reads the tokens alone"),
        ({"generation_kwargs": {"temprature": 1.0, "seed": 2}}, "has seed, temprature, which transformers' Gen"),
        ({"accelerator_config": {"dispatch_batches": True}}, "rows have texts, which cannot be sent"),
        ({"accelerator_config": {"split_batches": True}}, "divide the batch size yourself"),
    ],
    ids=str,
)
def test_settings_that_would_change_the_rows_of_a_batch_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(bf16=False, **fields)
