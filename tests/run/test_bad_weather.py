"""What goes wrong in real runs: odd rows and tokenizers, NaN, a full disk, a Hub that refuses, Ctrl-C."""

import http.server
import json
import multiprocessing
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.helpers import make_trainer, parameters_of, rows
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp import CRISPTrainer
from trl_crisp.run.identity import last_own_checkpoint
from trl_crisp.run.interruption import SaveOnInterrupt, ending_with_words

TRAIN = str(Path(__file__).parents[2] / "examples" / "train.py")
DDP = str(Path(__file__).parents[2] / "examples" / "accelerate" / "ddp-cpu.yaml")
GREEDY = {"generation_kwargs": {"do_sample": False}, "shuffle_dataset": False}


def logs_of(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


class Masked(CRISPTrainer):
    """Leaves the rollouts of given rows out of the loss, as tool turns without a word of the model's own would be."""

    masked_prompts: set[str]

    def get_loss_mask(self, inputs):
        prompts = self._tokenizer.batch_decode(inputs["prompt_ids"])
        kept = torch.tensor([not any(masked in prompt for masked in self.masked_prompts) for prompt in prompts])
        return super().get_loss_mask(inputs) * kept[:, None]


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_rows_whose_loss_mask_is_all_zero_change_nothing(tmp_path, normalization):
    """They count for nothing: the step is that of the other rows alone."""

    def run(masked: set[str], dataset, batch: int):
        trainer = make_trainer(
            tmp_path,
            dataset=dataset,
            max_steps=1,
            per_device_train_batch_size=batch,
            loss_normalization=normalization,
            **GREEDY,
        )
        trainer.__class__, trainer.masked_prompts = Masked, masked
        trainer.train()
        return trainer

    some = run({"+ 2?", "+ 3?"}, rows(4), 4)
    alone = run(set(), rows(2), 2)
    assert logs_of(some)[0]["loss"] == pytest.approx(logs_of(alone)[0]["loss"], rel=1e-5)
    for name, value in parameters_of(alone.model).items():
        torch.testing.assert_close(parameters_of(some.model)[name], value, rtol=1e-3, atol=1e-4)

    none = run({"What is"}, rows(4), 4)
    assert logs_of(none)[0]["loss"] == logs_of(none)[0]["grad_norm"] == 0.0


def test_rollouts_that_are_all_truncated_train(tmp_path):
    trainer = make_trainer(tmp_path, max_completion_length=2)
    before = parameters_of(trainer.model)
    trainer.train()
    for log in logs_of(trainer):
        assert log["completions/clipped_ratio"] == 1.0
        assert log["reverse_kl"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in parameters_of(trainer.model).items())


def test_a_prompt_of_special_tokens_alone_trains(tmp_path):
    dataset = Dataset.from_list([{"prompt": "<|begin_of_text|><|eot_id|>"}, {"prompt": "<|eot_id|>"}] * 4)
    trainer = make_trainer(tmp_path, dataset=dataset)
    trainer.train()
    assert all(log["reverse_kl"] > 0 for log in logs_of(trainer))


def test_pad_equal_to_eos_keeps_the_end_in_the_loss(tmp_path):
    """The token that ends a rollout is in the loss though padding has the same id."""

    def run(tokenizer):
        # An id that the model often gives at once ends some rollouts early, so that there is padding
        model = tiny_model("llama")
        trainer = CRISPTrainer(
            model=model,
            args=make_trainer(tmp_path, max_steps=2, **GREEDY).args,
            train_dataset=rows(),
            processing_class=tokenizer,
        )
        trainer.train()
        return logs_of(trainer)

    ends = tiny_tokenizer("llama")
    ends.eos_token = _common_token(tmp_path)
    same = tiny_tokenizer("llama")
    same.eos_token = same.pad_token = ends.eos_token
    one, other = run(ends), run(same)
    assert 0 < one[0]["completions/clipped_ratio"] < 1
    for a, b in zip(one, other, strict=True):
        for key in ("completions/mean_length", "completions/clipped_ratio", "num_tokens"):
            assert a[key] == b[key], key
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def _common_token(tmp_path) -> str:
    """Return a token that ends some of the greedy rollouts of the tiny model early, and not all."""
    trainer = make_trainer(tmp_path, max_steps=1, **GREEDY)
    seen: list[torch.Tensor] = []
    generate = trainer._generate_and_score_completions

    def watched(inputs):
        output = generate(inputs)
        seen.append(output["completion_ids"])
        return output

    trainer._generate_and_score_completions = watched
    trainer.train()
    completions = seen[0].tolist()
    for token in {token for row in completions for token in row}:
        if 0 < sum(token in row[:-1] for row in completions) < len(completions):
            return trainer.processing_class.convert_ids_to_tokens(token)
    raise AssertionError("all rollouts have the same tokens; change the seed")


def test_each_of_several_eos_ids_ends_a_rollout(tmp_path):
    model = tiny_model("llama")
    ends = list(range(0, 200, 2))
    model.generation_config.eos_token_id = [model.config.eos_token_id, *ends]
    trainer = make_trainer(tmp_path, model=model, max_steps=1, max_completion_length=32)
    seen = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(generate(inputs)) or seen[-1]
    trainer.train()
    (output,) = seen
    lengths = output["completion_mask"].sum(dim=1).tolist()
    assert min(lengths) < 32
    for row, length in zip(output["completion_ids"].tolist(), lengths, strict=True):
        kept = row[:length]
        assert not set(kept[:-1]) & set(ends)
        assert kept[-1] in ends or length == 32
    # Ended by one of them is not cut off
    assert logs_of(trainer)[0]["completions/clipped_ratio"] == sum(n == 32 for n in lengths) / len(lengths)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_beyond_the_tokenizers_vocabulary_train_and_save(tmp_path, tied):
    model = tiny_model("llama", tie_word_embeddings=tied, vocab_size=len(tiny_tokenizer()) + 64)
    trainer = make_trainer(tmp_path, model=model, save_strategy="steps", save_steps=2, teacher_sync_steps=2)
    trainer.train()
    resumed = make_trainer(
        tmp_path,
        model=tiny_model("llama", tie_word_embeddings=tied, vocab_size=len(tiny_tokenizer()) + 64),
        save_strategy="steps",
        save_steps=2,
        teacher_sync_steps=2,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in parameters_of(trainer.model).items():
        assert torch.equal(parameters_of(resumed.model)[name], value), name
    teacher, other = (t.teacher.state_dict()["weights"] for t in (trainer, resumed))
    assert all(torch.equal(other[name], value) for name, value in teacher.items())


class Poison(TrainerCallback):
    """Makes the gradient of one micro-batch NaN in given steps, as an overflow in the backward would."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.now = steps, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def poison(gradient):
            return gradient * float("nan") if self.now in self.steps else gradient

        next(p for p in model.parameters() if p.requires_grad).register_hook(poison)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1


def test_a_step_with_a_nan_is_skipped_counted_and_logged(tmp_path, capsys):
    before: dict = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            before[state.global_step + 1] = (parameters_of(model), len(optimizer.state))

    trainer = make_trainer(
        tmp_path, max_steps=4, gradient_accumulation_steps=2, callbacks=[Poison({2}), Watch()], weight_decay=0.1
    )
    trainer.train()
    # Neither the gradient nor weight decay moved anything in step 2, and step 3 goes on
    assert all(torch.equal(before[3][0][name], value) for name, value in before[2][0].items())
    assert any(not torch.equal(before[4][0][name], value) for name, value in before[3][0].items())
    assert all(torch.isfinite(value).all() for value in parameters_of(trainer.model).values())
    assert [log["skipped_steps"] for log in logs_of(trainer)] == [0, 0, 1, 1]
    assert "Step 2 is skipped: its gradient is not finite (1 so far)" in capsys.readouterr().out


def test_three_skipped_steps_in_a_row_stop_the_run(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=9, save_strategy="steps", save_steps=2, callbacks=[Poison({1, 2, 4, 5, 6})]
    )
    with pytest.raises(
        FloatingPointError, match=r"steps 4 to 6 are not finite.*last good checkpoint is .*checkpoint-4"
    ):
        trainer.train()
    # Two skipped, one fine, three skipped: the fine one began the count anew
    assert trainer.state.global_step == 5
    assert last_own_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def _train_on_a_small_disk(directory: Path, message: Path) -> None:
    """In a process of its own: no file may have more than some bytes once the first checkpoint is there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))

    trainer = make_trainer(directory, save_strategy="steps", save_steps=1, callbacks=[FillDisk()])
    try:
        trainer.train()
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        message.write_text("\n".join([str(error), *error.__notes__]))


def test_a_full_disk_while_saving_is_named_and_the_checkpoint_before_it_stays(tmp_path):
    directory, message = tmp_path / "run", tmp_path / "message.txt"
    torch.set_num_threads(1)
    process = multiprocessing.get_context("fork").Process(target=_train_on_a_small_disk, args=(directory, message))
    process.start()
    process.join(timeout=120)
    said = (tmp_path / "message.txt").read_text() if message.is_file() else ""
    assert f"Saving {directory}/checkpoint-2 failed" in said, said
    assert f"resume from {directory}/checkpoint-1 with resume_from_checkpoint true" in said
    # What was written of it makes room again, and the one before is whole
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-1"]
    trainer = make_trainer(directory, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


class RefusingHub(http.server.BaseHTTPRequestHandler):
    """A Hub that makes the repository and then takes no file."""

    def _answer(self, status: int, body: dict) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        if self.path == "/api/repos/create":
            self._answer(200, {"url": f"http://{self.headers['Host']}/me/model", "id": "me/model"})
        else:
            self._answer(403, {"error": "You have no write access to this repository."})

    def do_GET(self):
        self._answer(404, {"error": "not found"})

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    save_tiny(directory / "model")
    rows(16).to_json(directory / "rows.jsonl")
    return directory


def flags(files: Path, output_dir: Path, *more: str) -> list[str]:
    text = (
        f"--model_name_or_path {files}/model --dataset_name {files}/rows.jsonl --output_dir '{output_dir}' --use_cpu true "
        "--bf16 false --gradient_checkpointing false --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
        "--max_completion_length 4 --logging_steps 1 --report_to none --deduplicate_prompts false"
    )
    return [*shlex.split(text), *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def test_a_push_that_the_hub_refuses_loses_no_model(files, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefusingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = flags(files, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    try:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "trl_crisp.train",
                *arguments,
                "--push_to_hub",
                "true",
                "--hub_model_id",
                "me/model",
            ],
            env=environment(
                HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}", HF_TOKEN="hf_of_nobody"
            ),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        server.shutdown()
    assert result.returncode == 1, result.stderr
    assert "The push to me/model failed" in result.stderr
    assert f"Nothing is lost: the trained model is in {tmp_path}/out" in result.stderr
    assert f"trl-crisp push {tmp_path}/out --repo me/model" in result.stderr
    assert (tmp_path / "out" / "_push" / "README.md").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()


TWO = ["--accelerate_config", DDP, "--main_process_port", "0"]


def stop(command: list[str], signum: int, to_all: bool) -> tuple[int, str]:
    """
    Run a training, send a signal after its first step, and return its status and what it said.

    Args:
        command: Of the training.
        signum: What to send.
        to_all: To the whole group of processes, as a terminal does, or to the launcher alone.
    """
    process = subprocess.Popen(
        command,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # As under nohup, or in the background of a script
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step "):
            (os.killpg if to_all else os.kill)(process.pid, signum)
            break
    said += list(process.stdout)
    return process.wait(timeout=120), "".join(said)


@pytest.mark.parametrize(
    ("command", "signum", "status"),
    [
        ([sys.executable, "-m", "trl_crisp.train"], signal.SIGTERM, 143),
        # Its launcher dies of the signal and passes it on to nobody
        (
            [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", TRAIN],
            signal.SIGTERM,
            -signal.SIGTERM,
        ),
        ([sys.executable, "-m", "trl_crisp.cli", "train", *TWO], signal.SIGINT, 130),
    ],
    ids=["module", "accelerate", "two"],
)
def test_a_signal_to_the_first_process_alone_saves_a_checkpoint(files, tmp_path, command, signum, status):
    got, text = stop([*command, *flags(files, tmp_path / "out", "--max_steps", "500")], signum, to_all=False)
    assert got == status, text
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert last_own_checkpoint(tmp_path / "out") == checkpoint
    assert f"Stopped after step {checkpoint.name.removeprefix('checkpoint-')};" in text
    assert "--resume_from_checkpoint true" in text.split("Resume with:\n")[1]
    assert f"The page of this run, to open in a browser: {tmp_path / 'out' / 'report.html'}" in text


@pytest.mark.parametrize(
    ("launch", "signum", "to_all", "status"),
    [([], signal.SIGINT, True, 130), (TWO, signal.SIGTERM, False, 143)],
    ids=["one", "two"],
)
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(files, tmp_path, launch, signum, to_all, status):
    """From a terminal the signal goes to all processes, from a supervisor to the launcher alone."""
    output_dir = tmp_path / "out dir"
    arguments = [*launch, *flags(files, output_dir, "--max_steps", "500", "--save_strategy", "no")]
    got, text = stop([sys.executable, "-m", "trl_crisp.cli", "train", *arguments], signum, to_all)
    assert got == status, text
    assert "then saving a checkpoint. Send it again to stop at once" in text, text
    assert "failed" not in text
    assert "Traceback" not in text
    # What a user can do nothing about
    assert "values were not passed" not in text
    assert "deprecated and will be removed in v6" not in text
    (checkpoint,) = output_dir.glob("checkpoint-*")
    assert last_own_checkpoint(output_dir) == checkpoint
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"Stopped after step {step}" in text
    printed = text.split("Resume with:\n")[1].splitlines()[0].strip()
    assert printed == shlex.join(["trl-crisp", "train", *arguments]) + " --resume_from_checkpoint true"

    # That two processes resume is seen in test_distributed.py
    if not launch:
        # It runs as printed, but for the number of steps
        going_on = shlex.split(printed.replace("--max_steps 500", f"--max_steps {step + 1}"))[1:]
        result = subprocess.run(
            [sys.executable, "-m", "trl_crisp.cli", *going_on],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert f"resuming from {checkpoint}" in result.stdout
        assert (output_dir / "model.safetensors").is_file()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(tmp_path, signum):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signum)
            time.sleep(0.1)
            os.kill(os.getpid(), signum)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[SaveOnInterrupt(), Press()]).train()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_signal_from_two_senders_is_one_request(tmp_path, signum, exit_code):
    """A terminal signals the launcher and the training, and the launcher hands on; the second may come while C code runs."""

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            threading.Timer(0.5, os.kill, (os.getpid(), signum)).start()
            os.kill(os.getpid(), signum)

    interrupt = SaveOnInterrupt()
    trainer = make_trainer(tmp_path, callbacks=[interrupt, Press()])
    trainer.train()
    assert (interrupt.stopped_at_step, interrupt.exit_code) == (1, exit_code)
    assert last_own_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_ends_with_words(capsys, signum, status):
    def wait():
        with ending_with_words():
            os.kill(os.getpid(), signum)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        wait()
    assert ended.value.code == status
    assert "stopped at once" in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_stream_resumes(tmp_path, tuning):
    """Rows of a local file, read as they come, shuffled; the resumed run is the uninterrupted one."""
    rows(32).to_json(tmp_path / "rows.jsonl")

    def trainer(name: str):
        return make_trainer(
            tmp_path / name,
            dataset=load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if tuning == "lora" else None,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            gradient_accumulation_steps=2,
            teacher_sync_steps=3,
        )

    whole = trainer("whole")
    whole.train()
    for step in (2, 4):
        resumed = trainer("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, value in parameters_of(whole.model).items():
            assert torch.equal(parameters_of(resumed.model)[name], value), (step, name)
        assert [log["loss"] for log in logs_of(resumed)] == [log["loss"] for log in logs_of(whole)]


def test_a_stream_without_a_row_that_fits_is_an_error(tmp_path):
    stream = rows(8).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=r"rows ended before the first step: of 8 rows read, 8 were dropped .*=3 tokens"
    ):
        make_trainer(tmp_path, dataset=stream, max_prompt_length=3).train()


def test_fewer_rows_than_a_step_needs_are_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"rows ended before the first step: of 3 rows read, 0 were dropped .* needs 4 rows\."
    ):
        make_trainer(tmp_path, dataset=rows(3)).train()


def test_a_checkpoint_of_an_earlier_run_is_not_half_overwritten(tmp_path, monkeypatch):
    """The second run dies in its first save, to the place of a whole checkpoint with files of the same sizes."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, **options).train()
    assert last_own_checkpoint(tmp_path) == tmp_path / "checkpoint-2"

    def die(self, output_dir):
        raise SystemExit("killed")

    monkeypatch.setattr(CRISPTrainer, "_save_rng_state", die)
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, learning_rate=1e-2, **options).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert last_own_checkpoint(tmp_path) is None


def test_unlogged_steps_come_back_on_resuming(tmp_path):
    """A checkpoint between two lines of the log: the next line is the mean over all its steps."""

    def trainer(name: str):
        return make_trainer(tmp_path / name, max_steps=4, logging_steps=4, save_strategy="steps", save_steps=3)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    (one,), (other,) = logs_of(whole), logs_of(resumed)
    for key in ("loss", "reverse_kl", "entropy", "completions/mean_length", "completions/relative_length"):
        assert one[key] == other[key], key


def test_limits_and_the_best_model_are_honoured(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=1.0,
        eval_dataset=rows(4),
    )
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(losses, key=lambda step: losses[step])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    # With a limit of one, transformers leaves the best alone at the end
    assert kept == {f"checkpoint-{best}"}
    teacher = json.loads((tmp_path / f"checkpoint-{best}" / "teacher_state.json").read_text())
    assert teacher["completed_steps"] == best - 1


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_is_pushed_while_training(tmp_path, monkeypatch, tuning, strategy):
    """The student with tokenizer and card, and nothing of the user's; with "checkpoint" also all that a resume needs."""
    pushed: dict[str, set[str]] = {}
    of_the_run = {"agreement/reference.jsonl", "evaluation/own/step-0/samples.jsonl"}
    of_another_run = {"agreement/base-other.json", "evaluation/own/step-0-other/samples.jsonl"}

    def write(names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("my prompts")

    write({*of_the_run, *of_another_run, "evaluation/own/step-2/samples.jsonl", "mine.txt", "health_events.jsonl"})

    def upload_folder(self, folder_path, path_in_repo=".", allow_patterns=None, ignore_patterns=(), **kwargs):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = {name for name in files if not any(fnmatch(name, f"{p}*") for p in ignore_patterns or ())}
        if allow_patterns is not None:
            kept = {name for name in kept if any(fnmatch(name, p) for p in allow_patterns)}
        pushed[path_in_repo or "."] = kept
        upload: Future = Future()
        upload.set_result(None)
        return upload

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)

    def init_hf_repo(self, token=None):
        self.hub_model_id, self.push_in_progress = "me/model", None

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", init_hf_repo)
    trainer = make_trainer(
        tmp_path,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if tuning == "lora" else None,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        teacher_sync_steps=2,
    )
    of_the_run |= {"agreement/base-{}.json", "agreement/start_adapter-{}.safetensors"}

    class Begins(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            write({name.format(trainer.run_id) for name in of_the_run})

    trainer.add_callback(Begins())
    trainer.train()
    of_the_run = {name.format(trainer.run_id) for name in of_the_run}
    top = pushed["."]
    assert not [name for name in top if "teacher" in name]
    weights = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}[tuning]
    assert {weights, "README.md", "crisp_training.json", "tokenizer.json"} <= top
    assert not {"mine.txt", "training_args.bin", "health_events.jsonl", *of_another_run} & top
    assert "evaluation/own/step-2/samples.jsonl" not in top
    if strategy == "every_save":
        assert set(pushed) == {"."}
        assert not of_the_run & top
        return
    assert of_the_run <= top
    checkpoint = pushed["last-checkpoint"]
    assert {"teacher_state.json", "teacher.safetensors", "crisp_run.json", "checkpoint_files.json"} <= checkpoint
    assert weights in checkpoint


def test_a_failure_after_the_checkpoint_is_whole_says_so(tmp_path, monkeypatch):
    def fail(self, folder):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", fail)
    trainer = make_trainer(tmp_path, push_to_hub=True, save_strategy="steps", save_steps=2)
    with pytest.raises(ConnectionError, match="no route") as raised:
        trainer.train()
    assert f"{tmp_path}/checkpoint-2 is whole; the error came after it" in raised.value.__notes__[0]
    assert last_own_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


class OneRunAtATime:
    """As trackio: a line outside of a run is an error."""

    def __init__(self) -> None:
        self.running, self.lines = False, 0
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, **kwargs):
        self.running = True

    def log(self, metrics, step=None):
        if not self.running:
            raise RuntimeError("Call trackio.init() before trackio.log().")
        self.lines += 1

    def finish(self):
        self.running = False


def test_an_evaluation_after_the_training_reopens_trackios_run(tmp_path, monkeypatch):
    """TRL's profiling writes to it inside the evaluation, where transformers reopens it only for the log after it."""
    trackio = OneRunAtATime()
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)
    monkeypatch.setattr("trl.extras.profiling.is_trackio_available", lambda: True)
    monkeypatch.setattr("trl.extras.profiling.trackio", trackio, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    trackio.config = type("Config", (dict,), {"update": lambda self, *args, **kwargs: None})()
    trainer = make_trainer(tmp_path, report_to="trackio", max_steps=1, eval_dataset=rows(4))
    trainer.train()
    assert not trackio.running
    lines = trackio.lines
    assert trainer.evaluate()["eval_loss"] > 0
    assert trackio.lines > lines
