"""The command `trl-crisp`: what it launches, and what it says where the arguments are wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import trl_crisp
from tests.tiny_models import save_tiny
from trl_crisp.cli import COMMANDS, launch_config_names, main

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
REQUIRED = ["--model_name_or_path", "owner/model", "--dataset_name", "owner/rows"]
ACCELERATE = Path(__file__).parents[1] / "examples" / "accelerate"


@pytest.fixture
def launched(monkeypatch):
    """Return the list of what accelerate was asked to launch, instead of launching it."""
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    return calls


def test_help_lists_the_commands_with_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.split("commands:\n")[1].split("\n\n")[0].splitlines()] == list(COMMANDS)
    assert "example:\n  trl-crisp train --config" in text


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    assert "example:\n  trl-crisp train" in capsys.readouterr().out


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"trl-crisp {trl_crisp.__version__}\n"


def test_unknown_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert (
        "invalid choice: 'trian' (choose from 'train', 'preflight', 'eval', 'report', 'merge', 'push')"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_train_lists_both_kinds_of_options(capsys, launched, flag):
    assert main(["train", flag]) == 0
    text = capsys.readouterr().out
    assert "example:\n  trl-crisp train --model_name_or_path" in text
    for part in (
        "--accelerate_config NAME|FILE",
        "single_gpu, zero1, zero2, zero3",
        "--instruction",
        "--dataset_name",
    ):
        assert part in text
    assert not launched


def test_arguments_are_split_between_launcher_and_training(launched):
    config = str(CONFIGS / "qwen3-8b-v2.yaml")
    argv = [
        "--max_steps",
        "2",
        "--num_processes",
        "2",
        f"--config={config}",
        "--learning_rate",
        "2",
        "--main_process_port",
    ]
    assert main(["train", *argv, "29501", "--use_cpu"]) == 0
    (args,) = launched
    assert (args.num_processes, args.main_process_port) == (2, 29501)
    assert (args.module, args.training_script) == (True, "trl_crisp.train")
    expected = ["--max_steps", "2", "--config", config, "--learning_rate", "2", "--use_cpu"]
    assert args.training_script_args == expected


@pytest.mark.parametrize("form", [["--accelerate_config", "zero3"], ["--accelerate_config=zero3"]])
def test_named_launch_config_is_the_one_of_trl(launched, form):
    assert main(["train", *REQUIRED, *form, "--num_processes", "4"]) == 0
    assert launched[0].config_file.endswith("accelerate_configs/zero3.yaml")
    assert Path(launched[0].config_file).is_file()
    assert launched[0].num_processes == 4


def test_a_launch_config_can_be_given_by_its_path(launched):
    path = str(ACCELERATE / "ddp-cpu.yaml")
    assert main(["train", *REQUIRED, "--accelerate_config", path]) == 0
    assert launched[0].config_file == path


def test_launch_configs_that_trl_ships_are_listed():
    assert launch_config_names() == ["fsdp2", "multi_gpu", "single_gpu", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        (["--accelerate_config", "zero4"], ["zero4: there is no such file", "fsdp2", "zero3"]),
        (["--accelerate_config"], ["needs a file or a name", "zero3"]),
        (["--lr", "2"], ["--lr is not an option of", "Did you mean --learning_rate?"]),
        (["--max_step", "2"], ["--max_step is not an option of", "--max_steps"]),
        (["--num_proceses=2"], ["--num_proceses is not an option of", "--num_processes"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--config", "UNKNOWN_KEY"], ["instructon. Did you mean instruction"]),
    ],
)
def test_wrong_arguments_are_named_with_the_way_out(capsys, launched, tmp_path, argv, phrases):
    if argv[-1] == "UNKNOWN_KEY":
        (tmp_path / "config.yaml").write_text("instructon: v1\n")
        argv = [argv[0], str(tmp_path / "config.yaml")]
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trl-crisp train: error: ")
    assert all(phrase in error for phrase in phrases), error
    assert not launched


def test_a_value_of_the_wrong_type_is_named(capsys, launched):
    with pytest.raises(SystemExit) as caught:
        main(["train", *REQUIRED, "--max_steps", "two"])
    assert caught.value.code == 2
    assert "argument --max_steps/--max-steps: invalid int value: 'two'" in capsys.readouterr().err


def test_train_launches_two_processes(tmp_path, monkeypatch):
    """As a user types it, with reasoning-gym's rows and the launch file for two CPU processes."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = save_tiny(tmp_path / "model")
    flags = ["--model_name_or_path", model, "--dataset_name", "reasoning-gym:gsm_symbolic", "--dataset_size", "8"]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--max_completion_length", "8"]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--use_cpu"]
    flags += ["--report_to", "none", "--max_prompt_length", "4000"]
    command = [sys.executable, "-m", "trl_crisp.cli", "train", "--accelerate_config", str(ACCELERATE / "ddp-cpu.yaml")]
    run = subprocess.run([*command, "--main_process_port", "0", *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "8 of 8 rows kept" in run.stdout
    assert run.stdout.count(f"The model is in {tmp_path / 'out'}") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_error_of_the_training_is_the_last_line(tmp_path):
    command = [sys.executable, "-m", "trl_crisp.cli", "train", "--model_name_or_path", "./nowhere", "--use_cpu"]
    command += ["--bf16", "false", "--dataset_name", "rows.jsonl"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("error: model_name_or_path='./nowhere'")
    assert "Traceback" not in run.stderr


def test_an_error_in_one_of_many_processes_is_pointed_at(monkeypatch, capsys):
    def fail(args):
        raise ChildFailedError(
            "trl_crisp.train", {3: ProcessFailure(local_rank=3, pid=1, exitcode=1, error_file="none")}
        )

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert main(["train", *REQUIRED]) == 1
    assert "process 3 failed first (exit status 1); its error is above" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        ([], ["no model and no dataset", "--model_name_or_path", "--dataset_name"]),
        (["--model_name_or_path=owner/model"], ["no dataset", "--dataset_name"]),
        (["--dataset-name", "rows.jsonl", "--use_cpu", "true"], ["no model", "--model_name_or_path"]),
        (["--config", "CONFIG"], ["no dataset", "--dataset_name"]),
        # One that is no everyday flag is looked up first
        (["--seed", "3"], ["no model and no dataset"]),
    ],
)
def test_what_a_run_cannot_do_without_is_asked_for(capsys, launched, tmp_path, argv, missing):
    (tmp_path / "config.yaml").write_text("model_name_or_path: owner/model\n")
    argv = [str(tmp_path / "config.yaml") if item == "CONFIG" else item for item in argv]
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert all(phrase in error for phrase in missing), error
    assert not launched


@pytest.mark.parametrize("command", ["trl_crisp.cli train", "trl_crisp.train"])
def test_nothing_heavy_is_imported_to_ask_for_it(command):
    code = (
        f"import runpy, sys; sys.argv = {command.split()!r}\ntry: runpy.run_module({command.split()[0]!r}, run_name='__main__')\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["2", "False", "False"], run.stderr
    assert "no model and no dataset" in run.stderr


@pytest.mark.parametrize(
    ("returned", "status"), [(2, 2), (1, 1), (3, 3), (130, 130), (143, 143), (-9, 137), (-2, 130)]
)
def test_the_exit_status_is_that_of_the_training(monkeypatch, returned, status):
    def fail(args):
        raise subprocess.CalledProcessError(returned, "train")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert main(["train", *REQUIRED]) == status
