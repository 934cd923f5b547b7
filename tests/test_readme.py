"""Nothing shown in the README goes untested: its Python runs on a tiny model, its commands parse, its files exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks import smollm2
from tests.tiny_models import save_tiny
from trl_crisp import CRISPConfig
from trl_crisp.evaluation.results import load_results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:The global batch is")
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """As they stand, but for the model, the dataset, and the number and size of steps."""
    model = save_tiny(tmp_path / "model", "qwen3")
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} + {i}?"}]} for i in range(32)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    small = "use_cpu=True, bf16=False, max_steps=1, max_completion_length=4, save_strategy='no', report_to='none', "
    code = "\n".join(blocks("python"))
    replaced = {
        '"Qwen/Qwen3-0.6B"': repr(model),
        'load_dataset("trl-lib/DeepMath-103K", split="train")': "load_dataset('json', data_files='rows.jsonl', split='train')",
        "args=CRISPConfig(": f"args=CRISPConfig({small}",
    }
    for shown, run in replaced.items():
        assert shown in code, f"the README no longer has {shown}; adapt this test"
        code = code.replace(shown, run)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "Qwen3-0.6B-CRISP" / "model.safetensors").is_file()
    names["trainer"].train()
    assert names["trainer"].state.global_step == 1


def commands() -> list[list[str]]:
    """The README's shell commands, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_commands_name_files_and_flags_that_exist():
    """Scripts and configs are there, and the commands know every flag."""
    from trl_crisp.cli import make_eval_parser
    from trl_crisp.train import make_parser

    flags = set(make_parser()._option_string_actions) | {"--accelerate_config"}
    programs = set()
    for words in commands():
        programs.add(words[0])
        for word in words:
            if word.startswith(("examples/", "tests/")):
                assert (ROOT / word).is_file(), word
        if words[:2] == ["trl-crisp", "train"]:
            assert {word for word in words if word.startswith("--")} <= flags, words
        if words[:2] == ["trl-crisp", "eval"]:
            make_eval_parser().parse_args(words[2:])
    assert programs == {"bash", "pip", "trl-crisp", "accelerate"}


def test_fields_of_the_table_are_the_configs(tmp_path):
    """Each field that CRISP adds is in the README, with its default."""
    from trl import DistillationConfig

    added = set(CRISPConfig.__dataclass_fields__) - set(DistillationConfig.__dataclass_fields__)
    table = README.split("### The new fields")[1].split("###")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == added


def test_links_lead_somewhere():
    """Relative links are to files of the repository."""
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_results_are_those_of_the_committed_runs():
    """The first screen's table is the quickstart's three seeds, number by number."""
    runs = [
        json.loads((ROOT / "benchmarks" / "results" / f"quickstart_seed{seed}.json").read_text(encoding="utf-8"))
        for seed in range(3)
    ]
    for seed, run in enumerate(runs):
        assert (run["protocol"]["seed"], run["protocol"]["quick"], run["before_reused"]) == (seed, False, False)
        before, after = run["summary"]["before"], run["summary"]["after"]
        reduction = run["summary"]["reduction"]["plain_before_to_plain_after"]
        cells = (
            f"{seed}",
            f"{before['plain']['mean_tokens']:.0f}",
            f"{before['concise']['mean_tokens']:.0f}",
            f"{after['plain']['mean_tokens']:.0f}",
            f"{-reduction['estimate']:.0%} [{-reduction['high']:.0%}, {-reduction['low']:.0%}]",
            f"{before['plain']['ended_by_eos']:.0%}, {after['plain']['ended_by_eos']:.0%}",
            f"{before['plain']['correct']:.0%}, {after['plain']['correct']:.0%}",
            f"{run['wall_s']['total'] / 60:.1f}",
        )
        assert "| " + " | ".join(cells) + " |" in README
    protocol = runs[0]["protocol"]
    assert f"{protocol['held_out_rows']} held-out problems" in README
    assert f"up to {protocol['cap_tokens']} tokens" in README


def test_lora_beside_the_quickstart_is_that_of_the_committed_runs():
    """In the README and in the quickstart's config."""
    config = (ROOT / "examples" / "configs" / "smollm2-cpu.yaml").read_text(encoding="utf-8")
    reductions = {}
    for name in ("lora_1e-3_", "lora_3e-4_", ""):
        path = ROOT / "benchmarks" / "results" / f"quickstart_{name}seed0.json"
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["training"]["lora"] is bool(name)
        reductions[name] = run["summary"]["reduction"]["plain_before_to_plain_after"]
        assert f"{-reductions[name]['estimate']:.0%}" in config, name
    best, slow = reductions["lora_1e-3_"], reductions["lora_3e-4_"]
    shown = (
        f"{-best['estimate']:.0%} [{-best['high']:.0%}, {-best['low']:.0%}], seed 0; at 3e-4 {-slow['estimate']:.0%}"
    )
    assert shown in README.replace("\n", " ")


def test_points_of_resuming_are_those_of_the_committed_run():
    result = json.loads((ROOT / "benchmarks" / "results" / "resume.json").read_text(encoding="utf-8"))
    text = " ".join(README.split("## Stop, and go on")[1].split("## What")[0].split())
    assert f"of {result['tried']} points" in text
    assert f"{result['survived']} resumed to the same bits" in text
    shares = {name: row["bytes_of_teacher"] / row["bytes"] for name, row in result["checkpoint"].items()}
    assert f"(full: {shares['full']:.0%} of the checkpoint, LoRA: {shares['lora']:.0%}, in that run)" in text


def test_ratios_to_sdft_are_those_of_the_committed_run():
    """Each number of the comparison is the JSON's."""
    result = json.loads((ROOT / "benchmarks" / "results" / "sdft_step.json").read_text(encoding="utf-8"))
    (row,) = result["table"]
    ratio = row["ratio_crisp_to_sdft"]
    for key in ("step_seconds", "loss_and_backward_seconds", "peak_rss_mib", "peak_over_before_mib"):
        assert f"{ratio[key]:.2f}" in README.split("### How it was checked")[1], key


def test_smollm2s_table_is_that_of_the_committed_results():
    """Accuracy and tokens on MATH-500 and GSM8K, under the same protocol for the three models."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- smollm2 -->\n")[1].split("\n<!-- /smollm2 -->")[0]
    assert table.splitlines() == smollm2.table_lines(ROOT / "benchmarks" / "results" / "smollm2")
    for benchmark in smollm2.BENCHMARKS:
        protocols = [
            load_results(ROOT / "benchmarks" / "results" / "smollm2" / f"{benchmark}-{model}.json")["protocol"]
            for model in smollm2.MODELS
        ]
        differing = {key for key in protocols[0] if any(p[key] != protocols[0][key] for p in protocols)}
        assert differing == {"model", "weights_sha256", "instruction"}
