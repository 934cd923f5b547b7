"""The training script: every shipped config runs, and what is said where something is missing."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Qwen3Config

from tests.tiny_models import save_tiny
from trl_crisp.models.memory import estimate_memory
from trl_crisp.models.source import check_model, check_tokenizer
from trl_crisp.run.identity import resolve_checkpoint
from trl_crisp.train import main, make_parser, next_steps, parse_args, run, warn_of_no_effect

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))
LAUNCH_CONFIGS = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
DAPO_OPENING = "Solve the following math problem step by step."


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("datasets_cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # Of the launched processes
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function from a model's family to the directory of a tiny one."""
    directory = tmp_path_factory.mktemp("models")

    def saved(kind="llama"):
        path = directory / kind
        return str(path) if path.exists() else save_tiny(path, kind)

    return saved


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return a file of 20 prompts in DAPO's wording, each twice."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    prompts = [[{"role": "user", "content": f"{DAPO_OPENING} What is {i % 20} + 1?"}] for i in range(40)]
    path.write_text(
        "".join(json.dumps({"prompt": prompt, "question": prompt[0]["content"]}) + "\n" for prompt in prompts)
    )
    return str(path)


def small(model, rows, output_dir, *flags):
    """Return flags that make any config's run take a second."""
    return [
        *("--model_name_or_path", model),
        *("--dataset_name", rows),
        *("--output_dir", str(output_dir)),
        *("--max_steps", "2"),
        *("--max_completion_length", "8"),
        *("--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "1"),
        *("--logging_steps", "1"),
        *("--report_to", "none"),
        *("--use_cpu", "--use_vllm", "false", "--disable_tqdm", "true"),
        *flags,
    ]


def logged(checkpoint):
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return [entry["step"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_trains(path, models, rows, tmp_path, capsys):
    kind = "qwen3" if "qwen3" in path.stem else "deepseek" if "deepseek" in path.stem else "llama"
    args = parse_args(["--config", str(path), *small(models(kind), rows, tmp_path, "--save_steps", "2")])
    script_args, training_args, model_args, _ = args
    main(*args)

    written = yaml.safe_load(path.read_text())
    assert training_args.instruction == written["instruction"]
    assert training_args.learning_rate == float(written["learning_rate"])
    adapter = "adapter_model.safetensors"
    assert (tmp_path / (adapter if model_args.use_peft else "model.safetensors")).is_file()
    assert (tmp_path / adapter).is_file() == model_args.use_peft
    output = capsys.readouterr().out
    kept = 16 if script_args.dataset_train_fraction else 20
    assert f"{kept} of {kept} rows kept" in output
    replaced = kept if written.get("instruction_replaces", True) else 0
    assert f"In {replaced} of them the teacher's instruction replaces the student's own" in output
    assert f"is in {tmp_path}" in output
    assert "python -c" in output


def test_the_papers_configs_are_the_papers(capsys):
    papers = [path for path in CONFIGS if not path.stem.endswith(("-lora-1gpu", "-cpu"))]
    assert len(papers) == 5
    for path in papers:
        script_args, training_args, *_ = parse_args(["--config", str(path), "--use_cpu"])
        assert script_args.dataset_name == "BytedTsinghua-SIA/DAPO-Math-17k"
        assert script_args.deduplicate_prompts
        assert (script_args.dataset_train_fraction, script_args.dataset_split_seed) == (0.8, 42)
        assert training_args.learning_rate == 1e-6
        assert (training_args.lr_scheduler_type, training_args.weight_decay) == ("constant", 0.01)
        assert (training_args.max_grad_norm, training_args.temperature, training_args.top_p) == (1.0, 1.0, 1.0)
        assert (training_args.max_prompt_length, training_args.max_completion_length) == (1024, 8192)
        assert (training_args.teacher_model_kind, training_args.teacher_sync_steps) == ("periodic", 50)
        assert (training_args.beta, training_args.loss_normalization) == (1.0, "sequence")
        assert 8 * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 32
        assert training_args.instruction == path.stem.rsplit("-", 1)[1]


def test_every_value_of_a_config_has_its_source():
    for path in CONFIGS:
        if path.stem == "smollm2-cpu":
            continue  # says once that all of its values are ours
        for line in path.read_text().splitlines():
            assert not re.match(r"\w+:", line) or re.search(r" # (paper|Table|code|TRL|ours|the dataset's)", line), (
                line
            )


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem.endswith("-lora-1gpu")], ids=lambda p: p.stem)
def test_rollouts_of_a_lora_config_fit_into_vllms_share(path):
    """80 GiB of a GPU; the shapes are those of the model's config."""
    _, args, model_args, _ = parse_args(["--config", str(path), "--use_cpu"])
    hidden, intermediate, is_tied = {"qwen3-8b": (4096, 12288, False), "qwen3-4b": (2560, 9728, True)}[path.stem[:8]]
    sizes = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape = Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, head_dim=128, tie_word_embeddings=is_tied, **sizes
    )
    memory = estimate_memory(
        shape,
        prompt_tokens=args.max_prompt_length,
        completion_tokens=args.max_completion_length,
        lora_r=model_args.lora_r,
        dtype=getattr(torch, model_args.dtype),
    )
    stated = float(re.search(r"an update takes (\d+) GiB", path.read_text())[1])
    assert memory.update_gib == pytest.approx(stated, abs=1)
    share = 80 * args.vllm_gpu_memory_utilization
    assert memory.weights_gib + memory.rollout_cache_gib < share
    assert memory.update_gib + share < 75


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem.endswith("-lora-1gpu")], ids=lambda p: p.stem)
def test_the_monitor_of_a_lora_config_can_be_turned_on(path, tmp_path):
    """As its comment says: the lines without their mark, and one line above dropped."""
    above, block = path.read_text().split("# Accuracy without labels")
    written = re.sub(r"(?m)^# (?=\w+: )", "", block)
    assert re.search(r"(?m)^monitor_prompts: 128", written)
    config = tmp_path / "config.yaml"
    config.write_text(re.sub(r"(?m)^vllm_max_model_length: .*\n", "", above) + "# " + written)
    _, args, *_ = parse_args(["--config", str(config), "--use_cpu"])
    assert (args.monitor_prompts, args.monitor_base_samples, args.stop_at_sweet_spot) == (128, 16, True)
    assert args.teacher_refresh_gate == "agreement"
    assert args.vllm_max_model_length == args.max_prompt_length + args.monitor_max_new_tokens
    measured = [step for step in range(1, 100) if (step + 1) % args.monitor_steps == 0 or step == args.max_steps]
    assert "after steps 24, 49, 74 and 99" in written
    assert measured == [24, 49, 74, 99]


def test_lora_config_has_a_learning_rate_of_its_own(recwarn, models, rows, tmp_path):
    """At the paper's rate for full fine-tuning the trainer warns."""
    path = EXAMPLES / "configs" / "qwen3-8b-lora-1gpu.yaml"
    flags = small(models("qwen3"), rows, tmp_path)
    main(*parse_args(["--config", str(path), *flags]))
    assert not [w for w in recwarn if "adapter hardly moves" in str(w.message)]
    main(*parse_args(["--config", str(path), *flags, "--learning_rate", "1e-6"]))
    assert [w for w in recwarn if "adapter hardly moves" in str(w.message)]


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_launch_config_is_one_of_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"single": 1, "ddp-cpu": 2, "zero2-cpu": 2}.get(path.stem, 8)
    assert path.read_text().startswith("# ")


def test_model_arguments_reach_the_trainer(monkeypatch, models, rows, tmp_path):
    """Without a train step: what the trainer is made of."""
    made = {}

    class Recorder:
        def __init__(self, **kwargs):
            made.update(kwargs)
            raise StopIteration

    monkeypatch.setattr("trl_crisp.trainer.CRISPTrainer", Recorder)
    flags = ["--use_peft", "--lora_r", "4", "--model_revision", "abc", "--attn_implementation", "sdpa"]
    flags += ["--dtype", "bfloat16", "--model_init_kwargs", '{"use_cache": false}', "--eval_strategy", "steps"]
    with pytest.raises(StopIteration):
        main(*parse_args(small(models(), rows, tmp_path, *flags, "--dataset_train_fraction", "0.8")))
    assert made["model"] == models()
    assert made["args"].model_init_kwargs == {
        "revision": "abc",
        "trust_remote_code": False,
        "attn_implementation": "sdpa",
        "dtype": "bfloat16",
        "use_cache": False,
    }
    assert made["peft_config"].r == 4
    assert made["quantization_config"] is None
    assert (len(made["train_dataset"]), len(made["eval_dataset"])) == (16, 4)


def test_flags_win_over_the_file_and_env_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("CRISP_TEST", raising=False)
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-5\nmax_steps: 7\nuse_cpu: true\nenv:\n  CRISP_TEST: 3\n")
    _, training_args, *_ = parse_args([f"--config={path}", "--max_steps", "9"])
    assert (training_args.learning_rate, training_args.max_steps) == (1e-5, 9)
    assert os.environ.pop("CRISP_TEST") == "3"


@pytest.mark.parametrize(
    ("content", "error", "phrases"),
    [
        ("max_step: 3\n", ValueError, ["config.yaml", "max_step.", "Did you mean max_steps"]),
        (
            "instructon: v1\nlr: 1\n",
            ValueError,
            ["instructon. Did you mean instruction", "\n  lr. Did you mean learning_rate?"],
        ),
        ("num_processes: 2\n", ValueError, ["num_processes", "on the command line"]),
        ("a: [\n", ValueError, ["config.yaml", "not valid YAML"]),
        ("- a\n", ValueError, ["config.yaml", "field: value"]),
        ("", ValueError, ["config.yaml", "field: value"]),
        (None, FileNotFoundError, ["config.yaml", "no such file"]),
    ],
)
def test_config_files_that_cannot_be_read_are_named(tmp_path, content, error, phrases):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as caught:
        parse_args(["--config", str(path)])
    assert all(phrase in str(caught.value) for phrase in phrases), str(caught.value)


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        (["--max_step", "3"], ["'--max_step'", "Did you mean --max_steps"]),
        (["--lr", "3"], ["'--lr'", "Did you mean --learning_rate?"]),
        (["--batch-size=3"], ["Did you mean --per_device_train_batch_size?"]),
        (["--epochs", "3"], ["Did you mean --num_train_epochs?"]),
        (["stray"], ["'stray'"]),
        (["--config"], ["--config needs the path"]),
    ],
)
def test_flags_that_cannot_be_used_are_named(argv, phrases):
    with pytest.raises(ValueError, match=re.escape(phrases[0])) as caught:
        parse_args(argv)
    assert all(phrase in str(caught.value) for phrase in phrases), str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "phrases"),
    [
        (None, ValueError, ["no model", "model_name_or_path", "local directory"]),
        ("./nowhere", FileNotFoundError, ["'./nowhere'", "no such directory", "OWNER/NAME"]),
        ("a/b/c", FileNotFoundError, ["no such directory"]),
        ("EMPTY", FileNotFoundError, ["no config.json", "save_pretrained", "merge an adapter"]),
        ("owner/name", ConnectionError, ["'owner/name'", "HF_HUB_OFFLINE is set", "local directory"]),
    ],
)
def test_models_that_cannot_be_found_are_named(tmp_path, name, error, phrases):
    with pytest.raises(error) as caught:
        check_model(str(tmp_path) if name == "EMPTY" else name, "main", False)
    assert all(phrase in str(caught.value) for phrase in phrases), str(caught.value)


@pytest.mark.parametrize("content", ["half", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_torn_file_of_the_model_is_named(models, tmp_path, name, content):
    model = shutil.copytree(models(), tmp_path / "model")
    data = (model / name).read_bytes()
    (model / name).write_bytes(data[: len(data) // 2] if content == "half" else b"")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is torn or damaged"):
        check_model(str(model), "main", False)


@pytest.mark.parametrize(
    ("name", "error", "phrase"),
    [
        ("model.safetensors", FileNotFoundError, "no weights"),
        ("tokenizer.json", ValueError, "its tokenizer cannot be loaded"),
    ],
)
def test_a_model_that_lacks_a_file_is_refused(models, tmp_path, name, error, phrase):
    model = shutil.copytree(models(), tmp_path / "model")
    (model / name).unlink()
    check = check_tokenizer if name == "tokenizer.json" else lambda path, trust: check_model(path, "main", trust)
    with pytest.raises(error, match=phrase):
        check(str(model), False)


def test_a_missing_shard_is_named(models, tmp_path):
    model = shutil.copytree(models(), tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"names model-00002\.safetensors, which does not exist"):
        check_model(str(model), "main", False)


def test_the_model_is_checked_before_the_rows(rows, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_name_or_path"):
        main(*parse_args(small("./nowhere", "./nowhere.jsonl", tmp_path)))


def test_missing_rows_end_the_script(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset_name='\./nowhere\.jsonl': there is no such file"):
        main(*parse_args(small(models(), "./nowhere.jsonl", tmp_path)))


def test_as_a_program_an_error_of_ours_is_one_message(models, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(small(models(), "./nowhere.jsonl", tmp_path))
    assert ended.value.code == 2
    said = "\n" + capsys.readouterr().err
    assert "\nerror: dataset_name='./nowhere.jsonl': there is no such file" in said
    assert "Traceback" not in said
    with pytest.raises(SystemExit):
        run(small(models(), "./nowhere.jsonl", tmp_path, "--instruction", "v9"))
    assert "'v9' is not a name in the catalogue" in capsys.readouterr().err

    # By a function of the standard library: its place in the code says more than its message
    monkeypatch.setattr("trl_crisp.train.main", lambda *args: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        run(small(models(), "./nowhere.jsonl", tmp_path))


def test_help_begins_with_what_crisp_adds(capsys):
    help_text = make_parser().format_help()
    place = {flag: help_text.index(flag) for flag in ("--dataset_name", "--instruction ", "--adam_beta1", "--lora_r ")}
    assert sorted(place, key=lambda flag: place[flag]) == [
        "--dataset_name",
        "--instruction ",
        "--adam_beta1",
        "--lora_r ",
    ]
    assert place["--lora_r "] > 0
    # Refused by the config, so not offered
    assert "--teacher_model_name_or_path" not in help_text


def test_the_held_out_rows_are_evaluated(models, rows, tmp_path, caplog):
    flags = ["--dataset_train_fraction", "0.8", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    with caplog.at_level("INFO", "trl_crisp"):
        main(*parse_args(small(models(), rows, tmp_path, *flags)))
    assert "20 of 40 rows kept" in caplog.text
    assert "16 rows to train on, 4 held out" in caplog.text
    history = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2]


def test_streamed_rows_train_and_save(models, rows, tmp_path):
    main(*parse_args(small(models(), rows, tmp_path, "--dataset_streaming", "--no_deduplicate_prompts")))
    assert (tmp_path / "model.safetensors").is_file()


def test_a_run_killed_between_its_last_checkpoint_and_its_save_finishes_both(models, rows, tmp_path, monkeypatch):
    """And the push: nothing is trained, the trained model is saved."""
    flags = [*small(models(), rows, tmp_path), "--save_steps", "1"]
    with monkeypatch.context() as killed:
        killed.setattr("trl_crisp.trainer.CRISPTrainer.save_model", stop_the_last_save(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            main(*parse_args(flags))
    assert not (tmp_path / "model.safetensors").exists()
    pushed = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr("trl_crisp.trainer.CRISPTrainer.push_to_hub", lambda self, **kwargs: pushed.append(True))
    monkeypatch.setattr("trl_crisp.trainer.CRISPTrainer.training_step", None)
    main(*parse_args([*flags, "--push_to_hub", "true", "--resume_from_checkpoint", "true"]))
    assert pushed == [True]
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (tmp_path / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()


def stop_the_last_save(output_dir):
    from trl_crisp import CRISPTrainer

    save_model = CRISPTrainer.save_model

    def save_or_stop(self, path=None, _internal_call=False):
        if Path(path) == output_dir:
            raise KeyboardInterrupt
        return save_model(self, path, _internal_call=_internal_call)

    return save_or_stop


@pytest.mark.parametrize("value", ["true", "PATH"])
def test_the_script_resumes_the_last_checkpoint_or_a_path(models, rows, tmp_path, capsys, value):
    flags = [*small(models(), rows, tmp_path), "--save_steps", "1"]
    main(*parse_args([*flags, "--resume_from_checkpoint", "True"]))
    assert "no whole checkpoint of this run yet, so training starts afresh" in capsys.readouterr().out

    value = str(tmp_path / "checkpoint-1") if value == "PATH" else value
    # A run that starts afresh would write it again
    written = (tmp_path / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    main(*parse_args([*flags, "--max_steps", "3", "--resume_from_checkpoint", value]))
    assert logged(tmp_path / "checkpoint-3") == [1, 2, 3]
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == written
    is_last = value != str(tmp_path / "checkpoint-1")
    assert (f"resuming from {tmp_path}/checkpoint-2" in capsys.readouterr().out) is is_last


def test_resuming_can_be_set_in_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"resume_from_checkpoint: true\nuse_cpu: true\noutput_dir: {tmp_path}/none\n")
    _, training_args, *_ = parse_args(["--config", str(path)])
    assert resolve_checkpoint(training_args.resume_from_checkpoint, tmp_path / "none") is None


@pytest.mark.page
def test_a_run_ends_with_its_page_and_its_card(models, rows, tmp_path, capsys):
    main(*parse_args(small(models(), rows, tmp_path)))
    assert f"The page of this run, to open in a browser: {tmp_path}/report.html\n" in capsys.readouterr().out
    assert "reverse KL" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "# Model Card for" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.page
def test_a_run_that_cannot_have_a_page_says_why_and_is_saved(models, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="the model card gets no figure"):
        main(*parse_args(small(models(), rows, tmp_path)))
    assert "There is no page of this run: A report needs matplotlib" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.page
def test_a_lost_run_has_a_page_too(models, rows, tmp_path, capsys, monkeypatch):
    """And not that of an earlier run, which was finished in the same directory."""
    main(*parse_args(small(models(), rows, tmp_path)))
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("trl_crisp.health.ending.describe_lost", lambda trainer, health: "It is lost.")
    with pytest.raises(SystemExit) as ended:
        main(*parse_args([*small(models(), rows, tmp_path), "--save_steps", "1", "--max_steps", "5"]))
    assert ended.value.code == 3
    assert (
        f"It is lost.\nThe last step's checkpoint is in {tmp_path}.\nThe page of this run" in capsys.readouterr().out
    )
    assert "The run did 5 steps." in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "crisp_training.json").read_text())["planned_steps"] != 5


def test_a_finished_run_is_pushed_once(monkeypatch, models, rows, tmp_path, capsys):
    pushed = []
    monkeypatch.setattr("trl_crisp.trainer.CRISPTrainer.push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(
        "transformers.Trainer.init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/model")
    )
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", lambda self, folder: None)
    main(*parse_args(small(models(), rows, tmp_path, "--push_to_hub")))
    assert pushed == [{}]
    assert "https://huggingface.co/me/model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prompt", ["Is it 'so'?", [{"role": "user", "content": "Is \"it\" $HOME or 'so'?"}]], ids=["text", "chat"]
)
def test_next_command_asks_the_users_shortest_prompt(models, capsys, prompt):
    """With the directory of a trained model, as printed."""
    prompts = [[{"role": "user", "content": "Who is it? " * 9}], prompt]
    command = next_steps(Path(models()), False, prompts).splitlines()[-1].strip()
    python, flag, program = shlex.split(command)
    assert repr(prompt) in program
    assert (python, flag) == ("python", "-c")
    exec(program.replace("max_new_tokens=1024", "max_new_tokens=2"), {})
    assert capsys.readouterr().out


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        make_parser(prog="train.py").parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: train.py [--config FILE.yaml] [options]" in text
    assert "example:\n  train.py --model_name_or_path" in text
    for field in ("--dataset_name", "--prompt_template", "--instruction", "--teacher_sync_steps", "--use_peft"):
        assert field in text


def test_example_without_arguments_is_the_quickstart(monkeypatch):
    ran = []
    monkeypatch.setattr("trl_crisp.train.main", lambda *args: ran.append(args))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    script_args, training_args, model_args, _ = ran[0]
    assert script_args.dataset_name == "examples/facts/train.jsonl"
    assert training_args.use_cpu
    assert model_args.model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_accelerate_launches_the_example(models, rows, tmp_path):
    config = str(EXAMPLES / "configs" / "smollm2-cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command += [str(EXAMPLES / "train.py"), "--config", config, *small(models(), rows, tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"The model is in {tmp_path}" in run.stdout
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r", "64"], "lora_r has no effect without use_peft"),
        (["--lora_target_modules", "all-linear"], "lora_target_modules has no effect without use_peft"),
        (["--eval_benchmark_limit", "5"], "eval_benchmark_limit has no effect without eval_benchmark"),
        (["--dataset_size", "5"], "dataset_size has no effect without a reasoning-gym task"),
        (["--dataset_split_seed", "5"], "dataset_split_seed has no effect without dataset_train_fraction"),
        ([], None),
        (["--lora_r", "64", "--use_peft"], None),
    ],
)
def test_arguments_without_effect_warn(tmp_path, flags, message):
    script_args, _, model_args, benchmark_args = parse_args(small("owner/model", "rows.jsonl", tmp_path, *flags))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_no_effect(script_args, model_args, benchmark_args)
    assert [str(warning.message) for warning in caught] == ([f"{message}."] if message else [])
