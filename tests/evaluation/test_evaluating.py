"""`trl-crisp eval` on a tiny model: protocol, samples on disk, resuming after an interruption, numbers by hand."""

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp.cli import main, make_eval_parser
from trl_crisp.evaluation.comparison import compare
from trl_crisp.evaluation.engines import TransformersEngine
from trl_crisp.evaluation.evaluating import evaluate, load_asked
from trl_crisp.evaluation.grading import KINDS
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.prompts import prompt_token_ids
from trl_crisp.evaluation.protocol import describe_sampling
from trl_crisp.evaluation.records import Summary, problem_from_dict, problem_to_dict, summary_to_dict
from trl_crisp.evaluation.results import SCHEMA, SCHEMA_VERSION, SamplingPace, load_results, write_results
from trl_crisp.evaluation.sample_file import Sample, SampleFile
from trl_crisp.evaluation.settings import ENGINES, EvaluationSettings
from trl_crisp.evaluation.summary import summarize
from trl_crisp.report.console import print_evaluation


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    save_tiny(directory / "model", "qwen3")
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1), "level": ["even", "odd"][i % 2]} for i in range(6)]
    (directory / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def settings(files: Path, **overrides) -> EvaluationSettings:
    fields = {
        "model": str(files / "model"),
        "benchmark": str(files / "own.jsonl"),
        "samples": 2,
        "max_new_tokens": 24,
        "budgets": (8,),
        "batch_size": 4,
    }
    return EvaluationSettings(**{**fields, **overrides})


def flags(files: Path, output: Path, *more: str) -> list[str]:
    return [
        *("eval", "--model", str(files / "model"), "--benchmark", str(files / "own.jsonl"), "--samples", "2"),
        *("--max-new-tokens", "24", "--budgets", "8", "--output", str(output), *more),
    ]


def test_results_hold_the_protocol_and_every_sample(files, tmp_path):
    results = evaluate(settings(files), tmp_path)
    assert load_results(tmp_path) == json.loads((tmp_path / "results.json").read_text())
    protocol = results["protocol"]
    for name, value in {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 0, "instruction": ""}.items():
        assert protocol[name] == value
    assert protocol["benchmark_revision"].startswith("sha256:")
    assert set(protocol["versions"]) == {"trl-crisp", "transformers", "torch", "math-verify"}
    assert len(protocol["weights_sha256"]) == 64
    assert protocol["eos_token_ids"]
    assert len(results["problems"]) == 6
    assert set(results["summary"]) == {"8", "24"}
    assert set(results["summary"]["8"]) == {"all", "level even", "level odd"}
    summary = results["summary"]["24"]["all"]
    tokens = [sample["tokens"] for problem in results["problems"] for sample in problem["samples"]]
    assert summary["mean_tokens"] == pytest.approx(np.mean(tokens))
    assert results["summary"]["8"]["all"]["mean_tokens"] == pytest.approx(np.mean([min(n, 8) for n in tokens]))
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 12


def test_an_interrupted_evaluation_resumes_and_gives_the_same(files, tmp_path):
    whole = evaluate(settings(files), tmp_path / "whole")
    path = tmp_path / "part" / "samples.jsonl"
    path.parent.mkdir()
    lines = (tmp_path / "whole" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    # Killed in the middle of the sixth line
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    again = evaluate(settings(files), path.parent)
    assert again["problems"] == whole["problems"]
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    # All there: nothing is sampled again, and another number of problems or samples starts from it
    before = path.stat().st_mtime_ns
    evaluate(settings(files), path.parent)
    assert path.stat().st_mtime_ns == before
    fewer = evaluate(settings(files, limit=3, samples=1), path.parent)
    assert [len(problem["samples"]) for problem in fewer["problems"]] == [1, 1, 1]
    assert fewer["problems"][0]["samples"] == whole["problems"][0]["samples"][:1]


def test_a_killed_process_leaves_whole_lines_and_the_next_does_the_rest(files, tmp_path, capsys):
    """A process that dies while it samples leaves whole lines, and the second one does the rest."""
    command = [sys.executable, "-m", "trl_crisp.cli", *flags(files, tmp_path), "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = tmp_path / "samples.jsonl"
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = path.read_bytes().count(b"\n") - 1
    assert there >= 3
    assert main([*flags(files, tmp_path), "--batch-size", "1"]) == 0
    assert path.read_bytes().count(b"\n") == 13
    assert "sampling: 12/12" in capsys.readouterr().err or there == 12


@pytest.fixture(scope="module")
def stopped(files, tmp_path_factory):
    """Return what a second run beside a long one gave and said, what the first one did on Ctrl-C then, and where."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_crisp.cli", *flags(files, output), "--batch-size=1", "--samples=5000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As under nohup, or in the background of a script
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    path = output / "samples.jsonl"
    try:
        while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < 4):
            time.sleep(0.005)
        with contextlib.redirect_stderr(io.StringIO()) as refusal:
            second = main(flags(files, output))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    return (second, refusal.getvalue(), process.pid), (process.returncode, said), output


def test_ctrl_c_says_how_to_resume(stopped):
    _, (status, said), _ = stopped
    assert status == 130
    assert "The finished answers are kept: the same command resumes with the rest." in said
    assert "Traceback" not in said


def test_samples_of_another_run_are_refused(files, tmp_path):
    evaluate(settings(files, limit=1), tmp_path)
    with pytest.raises(ValueError, match=r"(?s)samples of another run:.*seed: 0 there, 1 now.*another --output"):
        evaluate(settings(files, limit=1, seed=1), tmp_path)


def test_samples_of_other_weights_or_prompts_are_refused(files, tmp_path):
    """What is at the path has changed: a model that was trained further, a template that was mended."""
    save_tiny(tmp_path / "model", "qwen3")
    evaluate(settings(files, model=str(tmp_path / "model"), limit=1), tmp_path / "out")
    save_tiny(tmp_path / "model", "qwen3", seed=1)
    with pytest.raises(ValueError, match="samples of another run:\n  weights_sha256: "):
        evaluate(settings(files, model=str(tmp_path / "model"), limit=1), tmp_path / "out")
    save_tiny(tmp_path / "model", "qwen3")
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = "Mended. " + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="an answer to problem '0' with another prompt"):
        evaluate(settings(files, model=str(tmp_path / "model"), limit=1), tmp_path / "out")


COMMITS = ["0" * 39 + "1", "0" * 39 + "2"]


def test_a_hub_model_that_was_pushed_again_is_another(files, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--tiny"

    def push(commit: str, seed: int) -> None:
        save_tiny(repository / "snapshots" / commit, "qwen3", seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    push(COMMITS[0], 0)
    first = evaluate(settings(files, model="org/tiny", limit=1), tmp_path / "out")
    assert (first["protocol"]["model_revision"], first["protocol"]["weights_sha256"]) == (COMMITS[0], None)
    before = (tmp_path / "out" / "samples.jsonl").stat().st_mtime_ns
    evaluate(settings(files, model="org/tiny", limit=1), tmp_path / "out")
    assert (tmp_path / "out" / "samples.jsonl").stat().st_mtime_ns == before
    push(COMMITS[1], 1)
    with pytest.raises(ValueError, match=f"model_revision: '{COMMITS[0]}' there, '{COMMITS[1]}' now"):
        evaluate(settings(files, model="org/tiny", limit=1), tmp_path / "out")


def test_samples_of_weights_that_nothing_names_are_not_reused(tmp_path):
    protocol = {"model": "m", "model_revision": None, "weights_sha256": None}
    SampleFile(tmp_path / "samples.jsonl", protocol)
    with pytest.raises(
        ValueError, match="neither a commit nor a digest tells whether the weights of 'm' are still those"
    ):
        SampleFile(tmp_path / "samples.jsonl", protocol)
    SampleFile(tmp_path / "known.jsonl", {**protocol, "weights_sha256": "ab"})
    SampleFile(tmp_path / "known.jsonl", {**protocol, "weights_sha256": "ab"})


LINE = json.dumps(dataclasses.asdict(Sample("0", 0, "1", [7, 1], 0, True, "ab")))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (LINE[:40].encode(), "Unterminated string"),
        (b"", "Expecting value"),
        (b"\0" * 30, "Expecting value"),
        (LINE.replace("1", "\xe9", 1).encode("latin-1"), "codec can't decode"),
        (LINE.replace('"number": 0, ', "").encode(), "missing 1 required positional argument: 'number'"),
        (LINE.replace('"number"', '"numbers"').encode(), "unexpected keyword argument 'numbers'"),
        (LINE.replace("[7, 1]", "null").encode(), "token_ids is a NoneType"),
        (LINE.replace("[7, 1]", '[7, "1"]').encode(), "token_ids has '1'"),
        (b"[1]", "it holds a list"),
    ],
)
def test_a_damaged_line_of_samples_is_named(tmp_path, line, reason):
    path = tmp_path / "samples.jsonl"
    SampleFile(path, {"seed": 0})
    path.write_bytes(path.read_bytes() + LINE.encode() + b"\n" + line + b"\n" + LINE.encode() + b"\n")
    with pytest.raises(
        ValueError, match=rf"samples.jsonl, line 3: this line does not hold a sample \(.*{reason}.*\). Remove the line"
    ):
        SampleFile(path, {"seed": 0})


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b'{"protocol": 1}', b"\xe9"])
def test_samples_without_a_protocol_are_refused(tmp_path, line):
    (tmp_path / "samples.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"samples.jsonl, line 1: .*protocol"):
        SampleFile(tmp_path / "samples.jsonl", {"seed": 0})


def test_the_second_run_in_a_directory_is_refused_until_the_first_ends(files, stopped):
    (status, said, pid), _, output = stopped
    assert status == 2
    assert f"'{output}' is in use by process {pid} on " in said
    assert main(flags(files, output, "--samples=1", "--limit=1")) == 0
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "samples.jsonl"]


def test_a_question_that_is_too_long_is_named(files, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"id": "short", "question": "1?", "answer": "1"}, {"id": "long", "question": "1 + " * 2000, "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"problem 'long' \(row 1\) has a prompt of \d+ tokens.*no room for an answer"
    ):
        evaluate(settings(files, benchmark=str(path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field", ["add_generation_prompt", "tokenize", "return_dict", "messages", "conversation", "tools"]
)
def test_template_flags_that_are_not_the_templates_are_refused(files, field):
    with pytest.raises(ValueError, match=rf"chat_template_kwargs has {field}, which is not a flag of a chat template"):
        settings(files, chat_template_kwargs={"enable_thinking": False, field: True})


def test_the_command_evaluates_a_file_of_questions(files, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {files / 'model'}\nbenchmark: {files / 'own.jsonl'}\nsamples: 2\nmax-new-tokens: 24\nbudgets: [8]\nseed: 3\n"
        f"limit:\ntemperature: 0.5\nexact: true\nchat_template_kwargs: {{enable_thinking: false}}\noutput: {tmp_path / 'file'}\n"
    )
    assert main(["eval", "--config", str(config)]) == 0
    protocol = load_results(tmp_path / "file")["protocol"]
    assert (protocol["seed"], protocol["temperature"], protocol["top_p"]) == (3, 0.5, 0.95)
    assert protocol["chat_template_kwargs"] == {"enable_thinking": False}
    assert protocol["grader"] == "the authors' rules"
    assert set(load_results(tmp_path / "file")["summary"]) == {"8", "24"}
    # Flags win
    assert (
        main(["eval", f"--config={config}", "--seed", "4", "--limit", "1", "--output", str(tmp_path / "flags")]) == 0
    )
    results = load_results(tmp_path / "flags")
    assert (results["protocol"]["seed"], len(results["problems"])) == (4, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_new_token: 8\n", "max_new_token. Did you mean max_new_tokens"),
        ("temprature: 1\nbudgets: [8]\n", "temprature. Did you mean temperature?"),
        ("num_processes: 2\n", "has keys that are not options of `trl-crisp eval`:\n  num_processes."),
        ("config: other.yaml\n", "has keys that are not options"),
        ("budgets: 8\n", "budgets is 8; give a list"),
        ("samples: [8]\n", "samples is [8]; give one value"),
        ("instruction: no\n", "instruction is False; give one value, in quotes"),
        ("exact: 1\n", "exact is 1; give true or false"),
        ("chat_template_kwargs: 1\n", "chat_template_kwargs is 1; give a mapping"),
        ("temperature: .nan\n", "temperature=nan has to be a finite number"),
        ("- model\n", "must hold `field: value` lines; it holds list"),
        ("a: [\n", "is not valid YAML"),
        ("samples: 2.5\n", "argument --samples: invalid int value: '2.5'"),
    ],
)
def test_a_file_that_the_command_cannot_use_ends_in_words(files, tmp_path, capsys, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    try:
        status = main([*flags(files, tmp_path / "out"), "--config", str(config)])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing_or_given_twice_ends_in_words(files, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    for more, message in (
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", str(tmp_path / "config.yaml")] * 2, "give one file"),
    ):
        assert main([*flags(files, tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--top-p", "0", "top_p=0.0 has to be above 0 and at most 1"),
        ("--top-p", "1.1", "top_p=1.1 has to be above 0 and at most 1"),
        ("--top-p", "nan", "top_p=nan has to be a finite number"),
        ("--temperature", "nan", "temperature=nan has to be a finite number"),
        ("--temperature", "inf", "temperature=inf has to be a finite number"),
        ("--temperature", "-1", "temperature=-1.0 has to be 0, for greedy answers, or more"),
        ("--top-k", "-1", "top_k=-1 has to be at least 0. 0 turns it off."),
        ("--seed", "-1", "seed=-1 has to be at least 0"),
        ("--samples", "0", "samples=0 has to be at least 1"),
        ("--limit", "0", "limit=0 has to be at least 1"),
        ("--limit", "-5", "limit=-5 has to be at least 1"),
        ("--batch-size", "0", "batch_size=0 has to be at least 1"),
        ("--budgets", "0", "budget 0 is not between 1 and max_new_tokens=24"),
        ("--chat-template-kwargs", '{"tokenize": false}', "chat_template_kwargs has tokenize"),
        ("--chat-template-kwargs", "[1]", "has to be a JSON object"),
        ("--benchmark", "maht500", "Did you mean math500?"),
    ],
)
def test_options_that_make_no_sense_end_in_words(files, tmp_path, capsys, option, value, message):
    try:
        status = main([*flags(files, tmp_path / "out"), option, value])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "part"),
    [("config.json", 0.5), ("tokenizer.json", 0.5), ("model.safetensors", 0.5), ("model.safetensors", 0)],
)
def test_a_torn_model_ends_in_words(files, tmp_path, capsys, file, part):
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[: int(len(content) * part)])
    assert main([*flags(files, tmp_path / "out"), "--model", str(model)]) == 2
    assert f"trl-crisp eval: error: model='{model}': {file} is torn or damaged" in capsys.readouterr().err


def test_an_output_below_a_file_is_refused(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(flags(files, output)) == 2
        assert f"{str(tmp_path / 'file')!r} is a file. Give a directory" in capsys.readouterr().err


def test_the_command_has_the_defaults_and_choices_of_the_settings():
    options = {action.dest: action for action in make_eval_parser()._actions}
    assert tuple(options["engine"].choices) == ENGINES
    assert tuple(options["grader"].choices) == KINDS
    spelled = {"budgets": [], "instruction": "none", "exact": False}
    for field in dataclasses.fields(EvaluationSettings):
        if field.name not in ("model", "benchmark"):
            assert options[field.name].default == spelled.get(field.name, field.default), field.name


def test_an_engine_that_does_not_exist_is_named(files):
    with pytest.raises(ValueError, match=r"engine='vlm' is unknown. Choose transformers or vllm."):
        settings(files, engine="vlm")


def test_budgets_can_be_added_to_samples_that_are_there(files, tmp_path):
    evaluate(settings(files, budgets=()), tmp_path)
    before = (tmp_path / "samples.jsonl").stat().st_mtime_ns
    added = evaluate(settings(files, budgets=(5, 8)), tmp_path)
    assert (tmp_path / "samples.jsonl").stat().st_mtime_ns == before
    assert set(added["summary"]) == {"5", "8", "24"}
    assert added["problems"] == evaluate(settings(files, budgets=(5, 8)), tmp_path / "anew")["problems"]


def test_an_answer_beyond_the_models_positions_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"max_new_tokens=4090 after a prompt of \d+ tokens.*made for 4096.*or less"):
        evaluate(settings(files, max_new_tokens=4090), tmp_path)


def test_instruction_and_template_flags_change_the_prompt(files, tmp_path):
    plain = evaluate(settings(files, limit=1), tmp_path / "plain")
    concise = evaluate(settings(files, limit=1, instruction="v1"), tmp_path / "concise")
    assert concise["protocol"]["instruction"].startswith("Solve the following math problem concisely")
    assert plain["problems"] != concise["problems"]
    flags = {"enable_thinking": False}
    unthinking = evaluate(settings(files, limit=1, chat_template_kwargs=flags), tmp_path / "unthinking")
    assert unthinking["protocol"]["chat_template_kwargs"] == flags
    assert plain["problems"] != unthinking["problems"]


def test_each_prompt_is_tokenized_once(files, tmp_path, monkeypatch):
    asked = []
    real = PreTrainedTokenizerBase.apply_chat_template

    def counted(self, messages, **kwargs):
        asked.append(messages[-1]["content"])
        return real(self, messages, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counted)
    evaluate(settings(files, limit=3), tmp_path)
    assert len(asked) == len(set(asked)) == 3


def test_what_describes_the_model_overwrites_nothing_in_the_protocol(files):
    engine = TransformersEngine(tiny_model("qwen3"), tiny_tokenizer("qwen3"))
    benchmark = load_asked(settings(files))
    protocol = describe_sampling(settings(files), "", benchmark, engine, "m at step 3", {"step": 3})
    assert (protocol["model"], protocol["step"], protocol["seed"]) == ("m at step 3", 3, 0)
    with pytest.raises(ValueError, match="about_model has model, seed, which the protocol has already"):
        describe_sampling(settings(files), "", benchmark, engine, "m", {"seed": 1, "model": "n", "step": 3})


def test_an_adapter_is_the_model_that_it_makes(files, tmp_path):
    model = get_peft_model(
        tiny_model("qwen3").from_pretrained(files / "model"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer("qwen3").save_pretrained(tmp_path / "merged")
    one = evaluate(settings(files, model=str(tmp_path / "adapter"), limit=2), tmp_path / "one")
    other = evaluate(settings(files, model=str(tmp_path / "merged"), limit=2), tmp_path / "other")
    assert one["problems"] == other["problems"]
    assert one["problems"] != evaluate(settings(files, limit=2), tmp_path / "base")["problems"]


def test_the_command_compares_with_a_baseline(files, tmp_path, capsys):
    assert main(flags(files, tmp_path / "base", "--temperature", "0")) == 0
    assert main(flags(files, tmp_path / "same", "--temperature", "0", "--baseline", str(tmp_path / "base"))) == 0
    printed = capsys.readouterr().out
    assert "Against the baseline" in printed
    assert "+0.0 [+0.0, +0.0]" in printed
    # Where there is no terminal, nothing is cut for want of room
    assert "…" not in printed
    comparison = load_results(tmp_path / "same")["comparison"]
    assert set(comparison) == {"8", "24"}
    assert comparison["24"]["reduction"]["estimate"] == 0.0
    # Before anything is sampled
    assert main(flags(files, tmp_path / "hot", "--temperature", "1", "--baseline", str(tmp_path / "base"))) == 2
    assert "temperature: 0.0 there, 1.0 here" in capsys.readouterr().err
    assert not (tmp_path / "hot").exists()
    assert main(flags(files, tmp_path / "none", "--instruction", "none", "--limit", "1")) == 0
    assert main(["eval", "--model", "m", "--benchmark", "math5000", "--output", str(tmp_path / "x")]) == 2
    assert "'math5000' is unknown" in capsys.readouterr().err
    assert main(flags(files, tmp_path / "x", "--baseline", str(tmp_path / "nowhere"))) == 2
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--help"])
    assert ended.value.code == 0
    assert "trl-crisp eval --model Qwen/Qwen3-0.6B --benchmark math500" in capsys.readouterr().out


@pytest.fixture(scope="module")
def facts(files):
    rows = [
        {"question": "Capital of Norway?", "answer": "Oslo", "hint": "a"},
        {"question": "Capital of the USA?", "answer": "Washington", "hint": "b"},
    ]
    path = files / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_facts_are_asked_as_they_are_and_graded_as_text(files, facts, tmp_path, capsys):
    command = flags(files, tmp_path / "base", "--benchmark", facts)
    assert main(command) == 0
    assert main([*flags(files, tmp_path / "same", "--benchmark", facts), "--baseline", str(tmp_path / "base")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "graded as text (the answer of row 0 is 'Oslo')" in printed
    assert "anywhere" in printed
    results = load_results(tmp_path / "same")
    prompt = tiny_tokenizer("qwen3").apply_chat_template(
        [{"role": "user", "content": "Capital of Norway?"}], add_generation_prompt=True, tokenize=False
    )
    assert results["first_prompt"] == prompt
    assert " ".join(prompt.split()) in printed
    assert results["protocol"]["kind"] == "text"
    assert "anywhere_accuracy" in results["summary"]["24"]["all"]
    change = results["comparison"]["24"]["anywhere_accuracy_change"]
    assert (change["estimate"], change["low"], change["high"]) == (0.0, 0.0, 0.0)
    assert all(
        "anywhere_correct" in sample["grades"]["24"] for row in results["problems"] for sample in row["samples"]
    )


def test_template_system_message_and_grader_can_be_given(files, facts, tmp_path):
    for number, dash in enumerate("-_"):
        output = tmp_path / str(number)
        more = (f"--prompt{dash}template", "{hint}? {question}", "--system", "Be brief.", "--grader", "math")
        assert main(flags(files, output, "--benchmark", str(files / "own.jsonl"), "--limit", "2", *more[2:])) == 0
        assert load_results(output)["protocol"]["kind_reason"] == "asked for"
        more = (*more[:4], "--grader", "text")
        assert main(flags(files, tmp_path / f"t{number}", "--benchmark", facts, *more)) == 0
        results = load_results(tmp_path / f"t{number}")
        assert "Be brief." in results["first_prompt"]
        assert "a? Capital of Norway?" in results["first_prompt"]
        assert results["protocol"]["system"] == "Be brief."
        assert results["protocol"]["prompt_template"] == "{hint}? {question}"


def test_exact_has_no_effect_on_texts(files, facts, tmp_path):
    with pytest.warns(UserWarning, match="exact has no effect"):
        results = evaluate(settings(files, benchmark=facts, exact=True), tmp_path)
    assert results["protocol"]["grader"].startswith("a right answer as whole words")


def test_a_system_message_that_the_template_refuses_ends_in_words(files, tmp_path):
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"system='Be brief.': the model's chat template refuses it"):
        prompt_token_ids([Problem("a", "1?", "1")], "", tokenizer, system="Be brief.")


def test_a_comparison_of_answers_that_were_not_read_leads_with_that(capsys):
    def measured(unread: int) -> dict:
        rows = [problem(str(i), (40 if i >= unread else 60, True)) for i in range(8)]
        return {"protocol": {**PROTOCOL, "model": "m", "benchmark": "b"}, "problems": rows}

    base, other = measured(3), measured(6)
    found = compare(base, other, 50)
    assert (found["unread_before"], found["unread_after"]) == (3 / 8, 6 / 8)
    assert found["unread_change"]["estimate"] == 3 / 8
    assert compare(base, other, 100)["unread_after"] == 0
    summary = {"50": {"all": summary_to_dict(summarized(other["problems"], 50, 1))}}
    for comparison, leads in ((found, True), (compare(base, base, 50), False)):
        print_evaluation({**other, "samples": 1, "summary": summary, "comparison": {"50": comparison}})
        printed = capsys.readouterr().out
        assert ("Most answers could not be read: 38% before, 75% after." in printed) is leads
        assert ("not read, points" in printed) is leads
        assert printed.find("Most answers") < printed.find("accuracy, points")


def problem(name: str, *samples: tuple[int, bool], level: str | None = None) -> dict:
    """A problem whose samples have so many tokens, and are right or not (at 50 tokens only where they are short)."""
    rows = []
    for tokens, correct in samples:
        grade = {"answer_correct": correct, "boxed_correct": False, "correct": correct, "status": "ok", "answer": None}
        grade |= {"compresses": False, "repeats": False, "epistemic_words": 2}
        cut = {**grade, "correct": correct and tokens <= 50, "status": "ok" if tokens <= 50 else "unparseable"}
        rows.append(
            {
                "tokens": tokens,
                "thinking_tokens": tokens // 2,
                "ended_by_eos": tokens < 100,
                "grades": {"50": cut, "100": grade},
            }
        )
    return {"id": name, "level": level, "answer": "1", "samples": rows}


PROTOCOL = {"benchmark_revision": "r", "temperature": 0.6, "max_new_tokens": 100, "grader": "g"}


def summarized(problems: list[dict], budget_tokens: int, k: int) -> Summary:
    return summarize([problem_from_dict(values) for values in problems], budget_tokens, k)


def test_a_summary_is_the_one_computed_by_hand():
    problems = [problem("a", (40, True), (60, True)), problem("b", (100, False), (20, True))]
    at_100, at_50 = summarized(problems, 100, 2), summarized(problems, 50, 2)
    assert (at_100.accuracy, at_100.pass_at, at_100.mean_tokens) == (0.75, {1: 0.75, 2: 1.0}, 55.0)
    assert (at_100.truncated, at_100.median_tokens) == (0.25, 50.0)
    assert at_100.epistemic_words_per_1000_tokens == pytest.approx(8 / 220 * 1000)
    # Longer answers count at the budget, and by what they say up to there
    assert (at_50.accuracy, at_50.mean_tokens, at_50.truncated) == (0.5, 40.0, 0.5)
    assert at_50.unparseable == 0.5
    five = [problem("a", *[(40, i < 2) for i in range(5)])]
    assert {k: round(value, 6) for k, value in summarized(five, 100, 5).pass_at.items()} == {
        1: 0.4,
        2: 0.7,
        4: 1.0,
        5: 1.0,
    }
    assert (at_100.p90_tokens, at_100.p99_tokens) == (pytest.approx(88.0), pytest.approx(98.8))
    assert (at_100.mean_thinking_tokens, at_100.mean_answer_tokens) == (27.5, 27.5)
    written = summary_to_dict(at_100)
    assert written["pass_at"] == {"1": 0.75, "2": 1.0}
    assert "anywhere_accuracy" not in written


def test_a_problem_is_written_and_read_back():
    for values in (problem("a", (40, True), (60, False), level="hard"), problem("b", (10, True))):
        assert problem_to_dict(problem_from_dict(values)) == values
    text = problem("c", (40, True))
    for grade in text["samples"][0]["grades"].values():
        grade["anywhere_correct"] = False
    assert problem_to_dict(problem_from_dict(text)) == text
    assert summarized([text], 100, 1).anywhere_accuracy == 0.0


COMMITTED = [
    path
    for path in sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json"))
    if f'"schema": "{SCHEMA}"' in path.read_text()[:200]
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read_back(path):
    """Their numbers follow from their problems."""
    results = load_results(path)
    problems = [problem_from_dict(values) for values in results["problems"]]
    assert [problem_to_dict(one) for one in problems] == results["problems"]
    for budget, groups in results["summary"].items():
        assert summary_to_dict(summarize(problems, int(budget), results["samples"])) == groups["all"]


def test_a_summary_counts_thinking_up_to_the_budget():
    row = problem("a", (100, False))
    row["samples"][0]["thinking_tokens"] = 80
    at_50 = summarized([row], 50, 1)
    assert (at_50.mean_thinking_tokens, at_50.mean_answer_tokens) == (50.0, 0.0)


def test_an_answer_that_ends_at_the_budget_is_not_truncated():
    assert summarized([problem("a", (50, True))], 50, 1).truncated == 0.0


def test_a_summary_tells_unparseable_from_not_graded():
    rows = [problem(status, (40, False)) for status in ("ok", "unparseable", "timeout", "error")]
    for row in rows:
        row["samples"][0]["grades"]["50"]["status"] = row["id"]
    found = summarized(rows, 50, 1)
    assert (found.unparseable, found.not_graded) == (1 / 4, 2 / 4)
    results = {"protocol": PROTOCOL, "problems": rows}
    assert compare(results, results, 50)["unread_before"] == 3 / 4


def test_a_comparison_is_the_one_computed_by_hand():
    base = {"protocol": PROTOCOL, "problems": [problem(str(i), (80, i % 2 == 0), (60, True)) for i in range(8)]}
    other = {"protocol": PROTOCOL, "problems": [problem(str(i), (40, i % 2 == 0), (20, i < 4)) for i in range(8)]}
    found = compare(base, other, 100)
    assert found["reduction"]["estimate"] == pytest.approx(1 - 30 / 70)
    assert found["accuracy_change"]["estimate"] == pytest.approx(np.mean([0] * 4 + [-0.5] * 4))
    assert found["answer_accuracy_change"] == found["accuracy_change"]
    assert found["boxed_accuracy_change"]["estimate"] == 0
    assert "anywhere_accuracy_change" not in found
    # Chosen by one sample and measured against the other: the first of an odd problem is wrong and the second right, so it is
    # in the lowest group, against the second, and in the highest, against the first; an even one is in the highest with both
    groups = found["by_pass_rate"]
    assert [group["problems"] for group in groups.values()] == [4, 0, 0, 8]
    assert groups["25% to 50%"]["reduction"] is None
    assert groups["0% to 25%"]["reduction"]["estimate"] == pytest.approx(1 - 30 / 60)
    assert groups["0% to 25%"]["accuracy_change"]["estimate"] == pytest.approx(np.mean([0.5, 0.5, 0, 0]) - 1)
    assert groups["75% to 100%"]["reduction"]["estimate"] == pytest.approx(1 - 30 / np.mean([70, 80]))
    with pytest.raises(ValueError, match=r"1 problems are in one of the results only, such as '7'"):
        compare(base, {**other, "problems": other["problems"][:7]}, 100)
    with pytest.raises(ValueError, match="not graded at a budget of 99 tokens; the budgets there are 50, 100"):
        compare(base, other, 99)
    one = {"protocol": PROTOCOL, "problems": [problem(str(i), (80, True)) for i in range(8)]}
    assert compare(one, one, 100)["by_pass_rate"] == {}


def test_groups_by_pass_rate_show_no_change_where_there_is_none():
    """The same model against itself: groups that are chosen by the samples they are measured with show ten points."""
    rng = np.random.default_rng(0)
    rates = rng.beta(0.5, 0.5, size=300)

    def draw():
        rows = [problem(str(i), *[(80, bool(rng.random() < rate)) for _ in range(8)]) for i, rate in enumerate(rates)]
        return {"protocol": PROTOCOL, "problems": rows}

    groups = compare(draw(), draw(), 100)["by_pass_rate"]
    changes = [group["accuracy_change"] for group in groups.values()]
    assert all(change["low"] <= 0 <= change["high"] for change in changes), changes


def test_only_results_of_the_same_measurement_are_compared():
    base = {"protocol": PROTOCOL, "problems": [problem(str(i), (80, True)) for i in range(2)]}
    other = {**base, "protocol": {**PROTOCOL, "temperature": 1.0, "model": "another"}}
    with pytest.raises(ValueError, match=r"(?s)measured in another way.*temperature: 0.6 there, 1.0 here"):
        compare(base, other, 100)
    other = {**base, "problems": [{**row, "answer": "2"} for row in base["problems"]]}
    with pytest.raises(ValueError, match="problem '0' has the answer '1' in the baseline and '2' here"):
        compare(base, other, 100)


@pytest.mark.parametrize(
    "name",
    [
        *("benchmark_revision", "temperature", "top_p", "top_k", "max_new_tokens", "chat_template_kwargs"),
        *("prompt_template", "system", "kind", "grader"),
    ],
)
def test_each_part_of_the_measurement_has_to_be_the_same(name):
    rows = [problem(str(i), (80, True)) for i in range(2)]
    base, other = ({"protocol": {**PROTOCOL, name: value}, "problems": rows} for value in ("a", "b"))
    with pytest.raises(ValueError, match=f"{name}: 'a' there, 'b' here"):
        compare(base, other, 100)


def test_results_without_the_problems_revision_are_not_compared():
    rows = [problem(str(i), (80, True)) for i in range(2)]
    base = {"protocol": {**PROTOCOL, "benchmark_revision": None}, "problems": rows}
    with pytest.raises(ValueError, match="benchmark_revision: None there, None here"):
        compare(base, base, 100)


def test_a_baseline_that_lacks_parts_is_named_before_the_sampling(files, tmp_path):
    base = evaluate(settings(files, limit=2), tmp_path / "base")
    for name in ("problems", "protocol", "summary"):
        with pytest.raises(ValueError, match=f"the baseline's results have no {name}"):
            evaluate(
                settings(files, limit=2), tmp_path / "out", None, {key: base[key] for key in base.keys() - {name}}
            )
    assert not (tmp_path / "out").exists()


def test_files_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "results.json"
    asked = EvaluationSettings("m", "b", samples=1, max_new_tokens=100, budgets=(50,))
    scored = [problem_from_dict(problem("a", (40, True)))]
    written = write_results(tmp_path, asked, PROTOCOL, "Hi", scored, SamplingPace(tokens=90, wall_s=2.0))
    read = load_results(path)
    assert read["schema_version"] == SCHEMA_VERSION
    assert {key: read[key] for key in written} == written
    assert (written["wall_s"], written["tokens_per_s"], list(written["summary"])) == (2.0, 45.0, ["50", "100"])
    assert written["problems"] == [problem("a", (40, True))]
    for content, message in (
        ("{", "is not valid JSON"),
        ('{"schema": "other"}', "its schema is 'other'"),
        ("[]", "its schema is None"),
        ("\xe9", "is not valid JSON"),
        ('{"schema": "trl-crisp evaluation"}', "schema version None"),
        ('{"schema": "trl-crisp evaluation", "schema_version": 0}', "schema version 0, and this trl-crisp reads 1"),
    ):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            load_results(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_results(tmp_path / "nowhere.json")


def test_sample_file_keeps_any_text(tmp_path):
    file = SampleFile(tmp_path / "samples.jsonl", {"seed": 0})
    sample = Sample("a/1", 0, 'ünï "q" \u2028 \n\\boxed{1}', [7, 1], 0, True, "ab")
    file.add(sample)
    assert SampleFile(tmp_path / "samples.jsonl", {"seed": 0}).samples == {("a/1", 0): sample}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("samples", 0, "samples=0"),
        ("budgets", (25,), "budget 25 is not between"),
        ("max_new_tokens", 0, "max_new_tokens=0"),
        ("samples", 2.0, "samples=2.0 has to be an integer"),
        ("samples", None, "samples=None has to be an integer"),
        ("seed", True, "seed=True has to be an integer"),
        ("budgets", ("8",), "budget='8' has to be an integer"),
        ("temperature", "hot", "temperature='hot' has to be a finite number"),
        ("chat_template_kwargs", "{}", "chat_template_kwargs='{}' has to be a mapping"),
    ],
)
def test_settings_that_make_no_sense_are_refused(files, field, value, message):
    with pytest.raises(ValueError, match=message):
        settings(files, **{field: value})
