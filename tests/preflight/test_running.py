"""`trl-crisp preflight` from start to end: on the lab's trained model, which follows its instruction, and on tiny random ones."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

from benchmarks.lab.task import draw_problem, lab_tokenizer, prompt
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp.cli import main
from trl_crisp.evaluation.sample_file import sha256_of_ids
from trl_crisp.models.memory import estimate_memory
from trl_crisp.preflight import results as results_module
from trl_crisp.preflight.arguments import make_preflight_parser, output_of, settings_of
from trl_crisp.preflight.running import run_preflight
from trl_crisp.preflight.settings import PreflightSettings
from trl_crisp.report.preflight_table import print_preflight

PROMPTS, SAMPLES = 8, 3
BASE = Path("benchmarks/lab/fixtures/tradeoff")


def answer_of(text: str) -> str | None:
    return text.partition("so answer ")[2].replace(" ", "") or None


def lab_settings(directory: Path, **overrides) -> PreflightSettings:
    fields = {
        "model": str(directory / "model"),
        "dataset": str(directory / "rows.jsonl"),
        "instructions": ("be concise", ""),
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "max_completion_length": 340,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    }
    return PreflightSettings(**{**fields, **overrides})


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Return the directory of a preflight of the lab's model, its results and its progress."""
    directory = tmp_path_factory.mktemp("lab")
    shutil.copytree(BASE, directory / "model")
    lab_tokenizer().save_pretrained(directory / "model")
    rng = random.Random(1)
    problems = [draw_problem(rng, 2 + i % 2) for i in range(16)]
    rows = [{"prompt": prompt(problem), "answer": str(sum(problem))} for problem in problems]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = []
    found = run_preflight(lab_settings(directory), directory / "out", lambda *args: told.append(args), None, answer_of)
    return directory, found, told


def samples_in(path: Path) -> dict[tuple[str, int], dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {(line["problem"], line["number"]): line for line in lines}


def test_an_instruction_that_the_model_follows_shortens_and_none_is_ignored(lab):
    _, found, _ = lab
    concise, none = found["instructions"]
    assert concise["verdict"]["kind"] == "shortens"
    assert concise["effect"]["reduction"]["low"] > 0.1
    assert found["judged_by"] == "accuracy"
    assert found["plain"]["accuracy"] > 0.8
    # The same prompt, with other random numbers
    assert none["verdict"]["kind"] in ("ignores", "uncertain", "lengthens")
    assert none["reverse_kl_nats"] == pytest.approx(0.0, abs=1e-6)
    assert found["recommendation"]["instruction"] == "be concise"


def test_the_numbers_are_those_of_the_kept_answers(lab):
    directory, found, _ = lab
    for name, counted, effect in [
        ("plain", found["plain"], None),
        *((one["name"], one["counted"], one["effect"]) for one in found["instructions"]),
    ]:
        told = [one["told"][name] if effect else one["plain"] for one in found["answers"]]
        lengths = [one["tokens"] for one in told]
        assert counted["mean_tokens"] == pytest.approx(sum(map(sum, lengths)) / (PROMPTS * SAMPLES))
        right = [flag for one in told for flag in one["correct"]]
        assert counted["accuracy"] == pytest.approx(sum(right) / (PROMPTS * SAMPLES))
        if effect:
            plain = [one["plain"] for one in found["answers"]]
            share = sum(map(sum, lengths)) / sum(sum(one["tokens"]) for one in plain)
            assert effect["reduction"]["estimate"] == pytest.approx(1 - share)
            change = sum(right) / len(right) - found["plain"]["accuracy"]
            assert effect["accuracy_change"]["estimate"] == pytest.approx(change)
            known = [one for one in found["answers"] if one["reference"] is not None]
            agreement = sum(sum(one["told"][name]["agrees"]) for one in known) / (len(known) * SAMPLES)
            level = sum(one["reference"]["base_agreement"] for one in known) / len(known)
            assert counted["agreement"] == pytest.approx(agreement)
            assert found["plain"]["agreement"] == pytest.approx(level)
            assert effect["agreement_change"]["estimate"] == pytest.approx(agreement - level)
    names = sorted(path.name for path in (directory / "out" / "samples").iterdir())
    assert len(names) == 3
    assert "plain.jsonl" in names
    plain = samples_in(directory / "out" / "samples" / "plain.jsonl")
    for one in found["answers"]:
        for number in range(SAMPLES):
            sample = plain[str(one["row"]), number]
            assert len(sample["token_ids"]) == one["plain"]["tokens"][number]
            assert (answer_of(sample["text"]) == one["label"]) == one["plain"]["correct"][number]


def test_the_reverse_kl_is_that_of_a_loop_over_the_kept_answers(lab):
    directory, found, _ = lab
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    tokenizer, model = lab_tokenizer(), AutoModelForCausalLM.from_pretrained(BASE).eval()
    samples = samples_in(directory / "out" / "samples" / "plain.jsonl")
    total, tokens = 0.0, 0
    for sample in samples.values():
        messages = rows[int(sample["problem"])]["prompt"]
        logs = []
        for content in (messages[0]["content"], f"be concise\n\n{messages[0]['content']}"):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            if not logs:
                assert sha256_of_ids(ids) == sample["prompt_sha256"]
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *sample["token_ids"]]])).logits[0, len(ids) - 1 : -1]
            logs.append(logits.double().log_softmax(-1))
        total += (logs[0].exp() * (logs[0] - logs[1])).sum().item()
        tokens += len(sample["token_ids"])
    assert len(samples) == PROMPTS * SAMPLES
    assert found["instructions"][0]["reverse_kl_nats"] == pytest.approx(total / tokens, rel=1e-4)
    assert found["reverse_kl_reason"] is None


def test_what_a_run_needs_is_computed_for_this_run(lab, capsys):
    directory, found, _ = lab
    run = found["run"]
    # 16 rows in steps of 4 rollouts
    assert (run["steps"], run["rollouts_per_step"]) == (4, 4)
    assert run["rollout_tokens"] == round(16 * found["plain"]["mean_tokens"])
    print_preflight(found)
    said = " ".join(capsys.readouterr().out.split())
    assert f"It is for prompts of up to {run['prompt_tokens']:,} tokens, the longest of those asked" in said
    longest = max(
        len(lab_tokenizer().encode(text))
        for text in (found["first_prompts"][name] for name in ("plain", "be concise"))
    )
    config = AutoConfig.from_pretrained(directory / "model")
    for side, fields in (("full", {}), ("lora", {"lora_r": 32})):
        # Prompts have 2 or 3 numbers, so the longest is up to 2 words longer than the first
        candidates = [
            estimate_memory(
                config,
                prompt_tokens=longest + more,
                completion_tokens=340,
                micro_batch=1,
                rollouts_at_once=4,
                **fields,
            )
            for more in range(3)
        ]
        assert any(memory.peak_gib == run[side]["peak_gib"] for memory in candidates)
        assert run[side]["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    other = settings_of(parsed("--max_steps", "7", model="m", dataset="d"))
    assert other.max_steps == 7


def test_the_file_has_the_results_and_the_keys_that_its_schema_names(lab):
    directory, found, _ = lab
    written = json.loads((directory / "out" / "preflight.json").read_text())
    assert written.pop("schema") == "trl-crisp preflight"
    assert written.pop("schema_version") == 1
    assert written == json.loads(json.dumps(found))
    listed = re.findall(r"^- ((?:`\w+`(?:, )?)+)", results_module.__doc__, re.MULTILINE)
    assert {name for names in listed for name in re.findall(r"\w+", names)} - {"schema", "schema_version"} == set(
        found
    )
    assert written["protocol"]["weights_sha256"]
    assert set(written["protocol"]["versions"]) == {"trl-crisp", "transformers", "torch", "math-verify"}
    assert written["settings"]["instructions"] == ["be concise", ""]
    assert written["prompts"] == {
        "asked": PROMPTS,
        "with_reference": sum(one["reference"] is not None for one in found["answers"]),
        "with_label": PROMPTS,
        "own_teacher_prompt": 0,
        "dropped": 0,
    }
    assert written["endings"]["generation_prompt"] == "<assistant>"
    assert written["endings"]["generation_prompt_tokens"] == 1
    # The user's text is the end of both prompts: two numbers with their letters, the end of the message and the turn
    assert written["endings"]["common_tokens"] == 2 * 2 + 2 + 2


def test_progress_reaches_the_end_of_each_stage(lab):
    _, _, told = lab
    last = {stage: (done, total) for stage, done, total, _ in told}
    assert last == {
        "plain answers": (24, 24),
        "be concise answers": (24, 24),
        "'' answers": (24, 24),
        "reverse KL": (24, 24),
        "grading": (3, 3),
    }
    assert any("s left" in note for _, _, _, note in told)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory / "model", "qwen3")
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} + 1?"}], "answer": str(i + 1)} for i in range(12)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def flags(directory: Path, output: Path, *more: str) -> list[str]:
    return [
        *("preflight", "--model", str(directory / "model"), "--dataset", str(directory / "rows.jsonl")),
        *("--prompts", "8", "--samples", "2", "--max_completion_length", "12", "--output", str(output), *more),
    ]


def parsed(*argv: str, model: str, dataset: str):
    return make_preflight_parser().parse_args(["--model", model, "--dataset", dataset, *argv])


def test_the_command_prints_tables_and_verdicts_and_says_when_agreement_is_off(tiny, tmp_path, capsys):
    assert main(flags(tiny, tmp_path / "out", "--instruction", "v1", "Say it in few words.")) == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert "8 prompts of 12 rows, with right answers in 'answer'; final answers are compared as math" in said.out
    assert "--- the first prompt, v1 ---" in said.out
    assert "Agreement could not be measured: only 0 of 8 prompts have a majority answer" in said.out
    assert "which cannot fall by more than the margin, so accuracy does not judge" in said.out
    assert "of the plain answers were cut at 12 tokens" in said.out
    assert "The rows do not fill one step: there are 12, and a step has 32 rollouts" in said.out
    unfolded = said.out.replace("\n", " ").replace("  ", " ")
    for one in found["instructions"]:
        assert one["verdict"]["words"] in unfolded
        assert one["verdict"]["judged_by"] is None
        # All answers are cut, which hides what the instruction does
        assert one["verdict"]["kind"] in ("uncertain", "lengthens")
        assert one["counted"]["agreement"] is None
    assert found["recommendation"]["words"] in unfolded
    assert "plain answers: 16/16" in said.err
    assert "GPU memory of a run, GiB, estimated" in said.out
    assert {path.name[:5] for path in (tmp_path / "out" / "samples").iterdir()} == {"plain", "v1.js", "text-"}
    # <think> is a token of this model
    assert found["plain"]["thinking"] is not None


def test_with_a_function_of_the_users_any_of_several_right_answers_is_right(tiny, tmp_path):
    lines = (tiny / "rows.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "answer": ["a", "b"] if i % 2 else ["c", "d"]} for i, line in enumerate(lines)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PreflightSettings(
        model=str(tiny / "model"),
        dataset=str(tmp_path / "rows.jsonl"),
        instructions=("v1",),
        prompts=8,
        samples=2,
        max_completion_length=4,
        grader="math",
    )
    with pytest.warns(UserWarning, match="grader='math' has no effect with answer_of"):
        found = run_preflight(settings, tmp_path / "out", answer_of=lambda text: "b")
    assert found["prompts"]["with_label"] == 8
    for one in found["answers"]:
        assert one["plain"]["correct"] == [one["label"] == ["a", "b"]] * 2
    # The answers are on disk
    with pytest.raises(TypeError, match="answer_of returned 7, of type int"):
        run_preflight(settings, tmp_path / "out", answer_of=lambda text: 7)


def test_it_resumes_and_more_prompts_start_from_the_answers_that_are_there(tiny, tmp_path, capsys):
    # Texts are compared in this process, which is faster
    options = ("--grader", "text", "--instruction", "v1", "Say it in few words.")
    assert main(flags(tiny, tmp_path, *options)) == 0
    found = json.loads((tmp_path / "preflight.json").read_text())
    path = tmp_path / "samples" / "plain.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # Killed in the middle of a line
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert main(flags(tiny, tmp_path, *options)) == 0
    again = json.loads((tmp_path / "preflight.json").read_text())
    assert {**again, "wall_s": 0} == {**found, "wall_s": 0}
    before = {one.name: one.read_bytes() for one in (tmp_path / "samples").iterdir()}
    assert main(flags(tiny, tmp_path, "--grader", "text", "--instruction", "v1", "--prompts", "9")) == 0
    more = json.loads((tmp_path / "preflight.json").read_text())
    assert [one["row"] for one in more["answers"][:8]] == [one["row"] for one in found["answers"]]
    assert [one["plain"] for one in more["answers"][:8]] == [one["plain"] for one in found["answers"]]
    for name, there in before.items():
        now = (tmp_path / "samples" / name).read_bytes()
        assert now.startswith(there)
        assert len(now.removeprefix(there).splitlines()) == (0 if name.startswith("text-") else 2)
    capsys.readouterr()
    assert main(flags(tiny, tmp_path, *options, "--temperature", "0.5")) == 2
    error = capsys.readouterr().err
    assert "samples of another run:\n  temperature: 1.0 there, 0.5 now\nGive another --output" in error


def test_every_option_is_a_setting_and_each_reaches_it():
    parser = make_preflight_parser()
    names = {action.dest for action in parser._actions} - {"help", "output"}
    assert names - {"instruction"} | {"instructions"} == set(PreflightSettings.__dataclass_fields__)
    assert settings_of(parsed(model="m", dataset="d")) == PreflightSettings("m", "d")
    argv = ["--instruction", "v1", "be brief", "--top_k", "5", "--dataset-size", "9", "--margin", "0.1"]
    argv += ["--lora_target_modules", "q_proj", "v_proj", "--chat_template_kwargs", '{"enable_thinking": false}']
    assert settings_of(parsed(*argv, model="m", dataset="d")) == PreflightSettings(
        "m",
        "d",
        instructions=("v1", "be brief"),
        top_k=5,
        dataset_size=9,
        margin=0.1,
        lora_target_modules=("q_proj", "v_proj"),
        chat_template_kwargs={"enable_thinking": False},
    )


@pytest.mark.parametrize(
    ("model", "dataset", "directory"),
    [
        ("Qwen/Qwen3-0.6B", "trl-lib/DeepMath-103K", "Qwen3-0.6B-DeepMath-103K"),
        ("./runs/model", "rows.jsonl", "model-rows.jsonl"),
        ("m", "reasoning-gym:gsm_symbolic", "m-reasoning-gym-gsm_symbolic"),
    ],
)
def test_without_an_output_the_directory_is_named_after_model_and_dataset(model, dataset, directory):
    assert output_of(parsed(model=model, dataset=dataset)) == Path("preflight", directory)
    assert output_of(parsed("--output", "x", model=model, dataset=dataset)) == Path("x")


def test_the_help_has_an_example_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["preflight", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example:\n  trl-crisp preflight --model" in text
    assert "(default: 8192)" in text
    assert "exit status is 0" in text


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (["--samples", "1"], ["samples=1: a majority needs at least 2 answers"]),
        (["--prompts", "7"], ["prompts=7", "Give at least 8"]),
        (["--prompts", "13"], ["prompts=13: the rows have only 12 different prompts", "Give fewer prompts"]),
        (["--instruction", "v9"], ["'v9' is not a name in the catalogue. The names are v1"]),
        (["--instruction", "v1", "v1"], ["are the same text. Leave one of them out"]),
        (["--grader", "choice"], ["is not a letter A to J", "another --grader"]),
        (["--dataset", "nowhere.jsonl"], ["dataset_name='nowhere.jsonl': there is no such file"]),
        (["--model", "./nowhere"], ["model='./nowhere'", "no such directory"]),
        (["--prompt_column", "question"], ["no such column; it has prompt, answer"]),
        (["--max_completion_length", "5000"], ["needs 5", "positions", "Give --max_completion_length"]),
        (["--max_prompt_length", "20"], ["only 0 different prompts that are short enough"]),
        (["--lora_target_modules", "nowhere"], ["lora_target_modules=['nowhere']", "nowhere"]),
        (["--output", "ROWS"], ["is a file. Give a directory"]),
    ],
)
def test_bad_input_is_named_with_the_way_out(tiny, tmp_path, capsys, more, phrases):
    more = [str(tiny / "rows.jsonl") if item == "ROWS" else item for item in more]
    assert main(flags(tiny, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert "trl-crisp preflight: error: " in error
    assert "Traceback" not in error
    assert all(phrase in error for phrase in phrases), error
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["preflight", "--model", "m", "--dataset", "d", "--instructions", "v1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --instructions v1" in capsys.readouterr().err


def test_prompts_that_are_texts_need_no_chat_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i} + 1 ="}) + "\n" for i in range(8)))
    settings = PreflightSettings(
        str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), ("be brief",), 8, 2, max_completion_length=4
    )
    found = run_preflight(settings, tmp_path / "out")
    assert found["first_prompts"]["plain"].endswith(" + 1 =")
    assert found["first_prompts"]["be brief"] == "be brief\n\n" + found["first_prompts"]["plain"]
    assert found["endings"]["generation_prompt_tokens"] == 0
    assert found["labels"]["column"] is None
    assert found["plain"]["accuracy"] is None


def test_an_adapter_is_measured_and_memory_is_that_of_its_base(tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    parameters = sum(p.numel() for p in base.parameters())
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    options = ("--instruction", "v1", "--grader", "text")
    assert main(flags(tiny, tmp_path / "out", "--model", str(tmp_path / "adapter"), *options)) == 0
    assert main(flags(tiny, tmp_path / "base", *options)) == 0
    found, of_base = (json.loads((tmp_path / name / "preflight.json").read_text()) for name in ("out", "base"))
    assert found["protocol"]["base_model"]["name"] == str(tiny / "model")
    assert found["run"]["full"]["parameters"] == parameters
    assert found["instructions"][0]["reverse_kl_nats"] != of_base["instructions"][0]["reverse_kl_nats"]


def test_a_run_whose_memory_has_no_formula_says_so(lab, capsys):
    _, found, _ = lab
    run = {**found["run"], "full": None, "lora": None, "memory_reason": "the memory of a 'mamba' cannot be estimated"}
    print_preflight({**found, "run": run, "reverse_kl_reason": "the memory did not hold the model"})
    said = capsys.readouterr().out
    assert "GPU memory of a run" not in said
    assert "the memory of a 'mamba' cannot be estimated" in said
    assert "No reverse KL: the memory did not hold the model." in said


@pytest.fixture
def chat(tmp_path):
    """Return settings that ask a tiny model for stories, which have no final answer."""
    save_tiny(tmp_path / "model")
    prompts = ["Tell me about snow.", "Who are you?", "Say hello.", "Why is the sky blue?", "Write a poem.", "Sing!"]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in [*prompts, "Name a bird.", "Name a tree."]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreflightSettings(
        str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), ("v1", "general"), 8, 2, max_completion_length=4
    )


def test_an_instruction_that_speaks_of_math_is_noted_if_the_prompts_do_not(chat, tmp_path):
    found = run_preflight(chat, tmp_path / "out")
    [note] = [note for note in found["notes"] if "speaks of a math problem" in note]
    assert note.startswith(
        "v1 speaks of a math problem, but only 0% of the prompts look like one. Try --instruction general"
    )
    assert found["labels"] == {
        "column": None,
        "kind": "math",
        "reason": "the rows have no answer, solution or reward_model.ground_truth",
    }
    assert found["judged_by"] is None


def test_a_reverse_kl_that_memory_does_not_hold_is_left_out_with_a_word(chat, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("trl_crisp.preflight.divergence.last_hidden_state", fail)
    found = run_preflight(chat, tmp_path / "out")
    assert [one["reverse_kl_nats"] for one in found["instructions"]] == [None, None]
    assert "memory did not hold the model" in found["reverse_kl_reason"]
    assert found["plain"]["mean_tokens"] > 0


def test_a_model_that_training_refuses_is_refused_before_anything_is_sampled(chat, tmp_path, capsys):
    # Its hidden states change with the padding, whatever the positions
    config = RwkvConfig(
        vocab_size=300,
        hidden_size=16,
        attention_hidden_size=16,
        num_hidden_layers=2,
        eos_token_id=260,
        bos_token_id=259,
    )
    RwkvForCausalLM(config).save_pretrained(chat.model)
    with pytest.raises(ValueError, match="gives other hidden states when a row is padded"):
        run_preflight(chat, tmp_path / "out")
    assert not (tmp_path / "out" / "samples").exists()


def test_images_are_refused(chat, tmp_path):
    path = Path(chat.dataset)
    rows = [{**json.loads(line), "image": "x.png"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="vision inputs are not supported"):
        run_preflight(chat, tmp_path / "out")


def test_rows_that_are_too_long_and_rows_with_teacher_prompts_of_their_own_are_noted(chat, tmp_path):
    path = Path(chat.dataset)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        row["teacher_prompt"] = [{"role": "user", "content": f"Briefly: {row['prompt'][0]['content']}"}]
    rows += [{"prompt": [{"role": "user", "content": "Tell me more. " * 400}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_preflight(dataclasses.replace(chat, max_prompt_length=2000), tmp_path / "out")
    assert found["prompts"]["own_teacher_prompt"] == 3
    assert any(note.startswith("3 of 8 prompts have a teacher prompt of their own") for note in found["notes"])
    assert any(
        note.startswith("The steps are those of all 9 rows: 1 of the 9 drawn are longer than max_prompt_length=2000")
        for note in found["notes"]
    )
