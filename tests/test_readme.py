"""Nothing shown in the three READMEs goes untested: Python runs on a tiny model, commands parse, numbers are the results'."""

import ast
import importlib.util
import itertools
import json
import math
import re
import shlex
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from benchmarks import memory, speed, steps
from benchmarks.health.answers import RIGHT
from benchmarks.health.figure import PANELS, SEED
from benchmarks.health.measured import codes_of, points_of
from tests.helpers import load_example
from tests.tiny_models import save_tiny
from trl_crisp import CRISPConfig
from trl_crisp.config import FEW_BASE_SAMPLES
from trl_crisp.evaluation.results import load_results
from trl_crisp.rollouts.engine_check import MEAN_GAP_LIMIT_NATS, OFF_SHARE_LIMIT

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("README.md", "examples/README.md", "benchmarks/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, EXAMPLES, BENCHMARKS = TEXTS.values()
# Of the lab's task
FORMS = ("stability", "tradeoff")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a text in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The shell commands of a text, as words."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level = heading.split(" ")[0]
    _, found, rest = f"\n{text}".partition(f"\n{heading}\n")
    assert found, f"there is no heading {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def table_rows(text: str) -> list[list[str]]:
    """The cells of all table rows but headers and rules."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\|[-| ]+\|", line):
            rows.pop()
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def result(name: str) -> dict:
    """A committed result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# What a block is run with instead of what it shows: a tiny model, few rows, and one short step on a CPU
REPLACED = {
    "README.md": {
        "max_steps=99, max_completion_length=2048": "max_steps=1, {small}",
        "use_vllm=True, vllm_max_model_length=3072, vllm_gpu_memory_utilization=0.45, vllm_enable_sleep_mode=True": "",
        'model="Qwen/Qwen3-8B"': "model={model!r}",
    },
    "examples/README.md": {
        "max_steps=99": "max_steps=1, {small}",
        'model="Qwen/Qwen3-0.6B"': "model={model!r}",
        'benchmark="math500", limit=100, samples=1, max_new_tokens=8192': "benchmark='problems.jsonl', limit=2, samples=1, max_new_tokens=4",
    },
}


@pytest.mark.filterwarnings("ignore:The global batch is")
@pytest.mark.parametrize("name", REPLACED)
def test_python_runs_as_it_is_shown(name, tmp_path, monkeypatch):
    """But for the model, the rows, and the number, size and device of the steps."""
    model = save_tiny(tmp_path / "model", "qwen3")
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} + {i}?"}]} for i in range(32)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    problems = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(3)]
    Dataset.from_list(problems).to_json(tmp_path / "problems.jsonl")
    monkeypatch.chdir(tmp_path)
    small = "use_cpu=True, bf16=False, max_completion_length=4, save_strategy='no', report_to='none'"
    # A later block goes on with the trainer of the first
    code = "\n".join(blocks(TEXTS[name], "python"))
    load = 'load_dataset("trl-lib/DeepMath-103K", split="train")'
    replaced = {**REPLACED[name], load: "load_dataset('json', data_files='rows.jsonl', split='train')"}
    for shown, run in replaced.items():
        assert shown in code, f"{name} no longer has {shown}; adapt this test"
        code = code.replace(shown, run.format(model=model, small=small))
    names: dict = {}
    exec(compile(code, name, "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1
    if name == "README.md":
        assert Path("qwen3-8b-crisp", "adapter_model.safetensors").is_file()
    else:
        logged = {key for entry in trainer.state.log_history for key in entry}
        shown = set(re.findall(r"`eval_math500_(\w+)`", EXAMPLES))
        assert {key.removeprefix("eval_problems_") for key in logged if key.startswith("eval_problems_")} == shown
        assert Path("qwen3-0.6b-crisp", "evaluation", "problems", "step-0", "results.json").is_file()
        assert names["health"].signals in trainer.callback_handler.callbacks
        assert Path("qwen3-0.6b-crisp", "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [pytest.param(name, words, id=shlex.join(words)[:60]) for name in NAMES for words in commands(TEXTS[name])],
)
@pytest.mark.filterwarnings("ignore:The global batch is")
def test_command_is_one_that_its_program_takes(name, words, tmp_path, monkeypatch):
    """Scripts, configs and extras exist; options and their values parse."""
    from accelerate.commands.launch import launch_command_parser

    from trl_crisp.cli import make_eval_parser, resolve_accelerate_config, split_arguments
    from trl_crisp.preflight.arguments import make_preflight_parser, settings_of
    from trl_crisp.publish.arguments import make_merge_parser, make_push_parser
    from trl_crisp.report.arguments import make_report_parser
    from trl_crisp.train import check_config, make_parser, parse_args

    for word in words:
        if word.startswith(("examples/", "tests/")):
            assert (ROOT / word).is_file()
    if words[0] == "bash":
        assert words[1] in ("examples/quickstart.sh", "tests/run.sh", "tests/run_vllm.sh", "tests/run_gpu.sh")
    elif words[0] == "pip":
        assert words[1] == "install"
        if extras := re.search(r"\[(.*)\]", shlex.join(words)):
            import tomllib

            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[0] == "python":
        assert words[1:] == ["examples/get_smollm2.py", "smollm2"]
    elif words[:2] == ["trl-crisp", "eval"]:
        make_eval_parser().parse_args(words[2:])
    elif words[:2] == ["trl-crisp", "report"]:
        make_report_parser().parse_args(words[2:])
    elif words[:2] == ["trl-crisp", "merge"]:
        make_merge_parser().parse_args(words[2:])
    elif words[:2] == ["trl-crisp", "push"]:
        make_push_parser().parse_args(words[2:])
    elif words[:2] == ["trl-crisp", "preflight"]:
        assert settings_of(make_preflight_parser().parse_args(words[2:])).instructions == ("v1", "v2")
    elif words[:2] == ["trl-crisp", "train"]:
        (tmp_path / "config.yaml").write_text(blocks(EXAMPLES, "yaml")[0], encoding="utf-8")
        [(tmp_path / directory).symlink_to(ROOT / directory) for directory in ("examples",)]
        monkeypatch.chdir(tmp_path)
        parser = make_parser()
        training, launch = split_arguments(parser, check_config(parser, words[2:]))
        launch = resolve_accelerate_config(launch)
        args = launch_command_parser().parse_args([*launch, "-m", "trl_crisp.train"])
        assert args.training_script == "trl_crisp.train"
        rows, config, model, _ = parse_args([*training, "--use_cpu", "true", "--bf16", "false"])
        assert model.model_name_or_path
        assert rows.dataset_name
        assert config.output_dir != "trainer_output"
    else:
        assert words[:2] == ["accelerate", "launch"]
        args = launch_command_parser().parse_args(words[2:])
        assert args.training_script == "examples/train.py"
        assert args.training_script_args[0] == "--config"


def test_the_first_python_trains_as_the_command_above_it():
    """The same values, but for the rows and how the model's dtype is said."""
    [code] = blocks(README, "python")
    calls = {
        node.func.id: node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    dicts = [
        node.value
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Assign) and node.value.func.id == "dict"
    ]
    fields = {word.arg: ast.literal_eval(word.value) for one in dicts for word in one.keywords}
    assert len(fields) == 8
    assert fields.pop("model_init_kwargs") == {"dtype": "bfloat16"}
    [command] = [words for words in commands(README) if words[:2] == ["trl-crisp", "train"]]
    values = dict(itertools.pairwise(command))
    assert {name: float(values[f"--{name}"].replace("true", "1")) for name in fields} == fields
    assert values["--dtype"] == "bfloat16"
    assert values["--output_dir"] == ast.literal_eval(calls["CRISPConfig"].args[0])
    adapter = {word.arg: ast.literal_eval(word.value) for word in calls["LoraConfig"].keywords}
    assert adapter == {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
    assert [values[f"--lora_{name}"] for name in ("r", "alpha", "target_modules")] == ["32", "64", "all-linear"]


@pytest.mark.parametrize("name", NAMES)
def test_results_that_are_compared_are_of_the_same_problems(name):
    """Of a benchmark, as many of them; else the second command is refused."""
    measured: dict[str, tuple[str, str | None]] = {}
    for words in commands(TEXTS[name]):
        values = dict(itertools.pairwise(words))
        if words[:2] == ["trl-crisp", "eval"]:
            problems = values["--benchmark"], values.get("--limit")
            measured[values["--output"]] = problems
            if "--baseline" in values:
                assert measured[values["--baseline"]] == problems, shlex.join(words)
        elif words[:2] == ["trl-crisp", "report"]:
            results = list(itertools.takewhile(lambda word: not word.startswith("--"), words[2:]))
            assert len({measured[one] for one in results}) == 1, shlex.join(words)


def test_the_config_in_the_examples_has_fields_only(tmp_path):
    from trl_crisp.train import check_config, make_parser

    [block] = blocks(EXAMPLES, "yaml")
    assert yaml.safe_load(block)["output_dir"]
    (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
    check_config(make_parser(), ["--config", str(tmp_path / "config.yaml")])


def test_rows_in_the_examples_are_read_as_they_are_described(tmp_path):
    """The first row has a teacher's prompt of its own; the second gets the instruction."""
    from trl_crisp.rows.prompts import load_prompts
    from trl_crisp.train import make_parser

    [block] = blocks(EXAMPLES, "jsonl")
    (tmp_path / "rows.jsonl").write_text(block, encoding="utf-8")
    script_args = make_parser().parse_args_into_dataclasses(
        ["--dataset_name", str(tmp_path / "rows.jsonl"), "--use_cpu", "true", "--bf16", "false"]
    )[0]
    rows, _ = load_prompts(script_args)
    assert [row["prompt"][0]["role"] for row in rows] == ["user", "user"]
    assert rows[0]["teacher_prompt"][0]["content"].startswith("17 * 24 is 408.")
    assert rows[1]["teacher_prompt"] is None


def shown_default(field) -> str:
    """A field's default as the tables show it."""
    value = field.default if field.default is not MISSING else field.default_factory()
    return "unset" if value is None else f"`{value}`"


def test_fields_of_the_tables_are_those_that_crisp_adds():
    """Each with its default."""
    from trl import DistillationConfig, ModelConfig, ScriptArguments

    from trl_crisp.train import make_parser

    upstream = [DistillationConfig, ModelConfig, ScriptArguments]
    known = {name for config in upstream for name in config.__dataclass_fields__}
    added = {
        f"`{name}`": shown_default(field)
        for arguments in make_parser().dataclass_types
        for name, field in arguments.__dataclass_fields__.items()
        if name not in known
    }
    rows = table_rows(section(EXAMPLES, "## Fields"))
    assert {row[0]: row[1] for row in rows if row[0] in added} == added
    others = {row[0]: row[1:] for row in rows if row[0] not in added}
    config = make_parser().dataclass_types[1]
    changed = {
        f"`{name}`": [shown_default(config.__dataclass_fields__[name]), shown_default(field)]
        for name, field in DistillationConfig.__dataclass_fields__.items()
        if name in config.__dataclass_fields__
        and shown_default(config.__dataclass_fields__[name]) != shown_default(field)
    }
    assert others == changed


def test_keys_of_the_log_are_those_that_a_run_logs(tmp_path):
    """The guide's table of signals, the length that it tells to look at, and skipped_steps."""
    from trl_crisp import CRISPConfig, CRISPTrainer

    signals = section(EXAMPLES, "### Signals of health")
    keys = [row[1].strip("`") for row in table_rows(signals) if row[1].startswith("`")]
    assert len(keys) == 11
    keys += re.findall(r"Look at `([\w/]+)` yourself", signals)
    assert len(keys) == 12
    args = CRISPConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, logging_steps=1, max_completion_length=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=16, save_strategy="no", report_to="none",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(32)])
    trainer = CRISPTrainer(model=save_tiny(tmp_path / "model", "qwen3"), args=args, train_dataset=rows)
    trainer.train()
    assert {*keys, "skipped_steps"} <= set(trainer.state.log_history[0])


def test_the_guides_sentence_on_agreement_is_the_experiments_summary():
    summary = json.loads((RESULTS / "health" / "summary.json").read_text(encoding="utf-8"))
    words = " ".join(section(EXAMPLES, "### Agreement, without labels").split())
    errors = {name: 100 * one["change_largest_error"] for name, one in summary["tracking"].items()}
    right = {name: 100 * one["accuracy"] for name, one in summary["bases"].items()}
    full = [name for name in errors if name.endswith("full")]
    assert max(errors[name] for name in full) <= 2
    assert {f"{right[name]:.0f}" for name in full} == {"92", "93"}
    assert "within 2 points of that of the true accuracy for bases that are 92% and 93% right" in words
    worst = max(errors, key=errors.__getitem__)
    assert f"at worst {errors[worst]:.1f} points off for one that is {right[worst]:.0f}% right" in words
    differences = {
        name: one for name, one in summary["gate_differences"].items() if re.search("-m(10|20): gated", name)
    }
    saved = [100 * one["accuracy"][0] for name, one in differences.items() if name.endswith("ungated")]
    lost = [-100 * one["accuracy"][0] for name, one in differences.items() if name.endswith("gated - frozen")]
    fewer = [-100 * one["tokens"][0] for name, one in differences.items() if name.endswith("gated - frozen")]
    stopped = [100 * one["accuracy"][0] for name, one in differences.items() if "stopped" in name]
    assert f"saves {math.floor(min(saved))} to {max(saved):.0f} points" in words
    assert (
        f"ends {min(lost):.0f} to {max(lost):.0f} points below it, with {min(fewer):.0f}% to {max(fewer):.0f}% fewer tokens"
        in words
    )
    assert len(stopped) == 4
    assert f"is at most {-min(stopped):.0f} points below it" in words


def test_the_aim_of_the_gate_is_met_where_the_benchmarks_say_so():
    differences = json.loads((RESULTS / "health" / "summary.json").read_text(encoding="utf-8"))["gate_differences"]
    low = {
        name: 100 * (one["accuracy"][0] - one["accuracy"][1]) for name, one in differences.items() if one["seeds"] == 5
    }
    gated = {name for name in low if name.endswith("gated - frozen")}
    met = {"tradeoff-m20-strict: gated - frozen", "stability-m50: gated - frozen"}
    assert {name for name in gated if low[name] > -3} == met
    assert all(low[f"{form}-m50: gated and stopped - frozen"] > -3 for form in FORMS)
    stopped = [differences[f"{form}-m20: gated and stopped - frozen"] for form in ("tradeoff", "stability")]
    points = " and ".join(f"{-100 * one['accuracy'][0]:.1f}" for one in stopped)
    tokens = " and ".join(f"{-100 * one['tokens'][0]:.0f}%" for one in stopped)
    words = " ".join(BENCHMARKS.split())
    found = json.loads((RESULTS / "health" / "summary.json").read_text(encoding="utf-8"))["gate"]
    ends = [found[f"{form}-m10-ungated"]["accuracy"] for form in ("tradeoff", "stability")]
    ruined = " and ".join(f"{100 * sum(one) / len(one):.0f}%" for one in ends)
    assert f"at M = 10 the ungated runs end {ruined} right" in words
    assert f"at M = 20 it is {points} points below the frozen teacher, with {tokens} fewer tokens" in words
    gate = json.loads((RESULTS / "health" / "summary.json").read_text(encoding="utf-8"))["gate"]
    kept = [gate[f"{form}-m50-ungated"]["accuracy"] for form in ("tradeoff", "stability")]
    assert "the ungated runs keep " + " and ".join(f"{100 * sum(one) / len(one):.0f}%" for one in kept) in words
    # "By about a point"
    assert all(-4.5 < low[f"{form}-m20: gated and stopped - frozen"] < -3 for form in ("tradeoff", "stability"))


def test_the_runs_of_the_health_experiment_are_as_its_protocol_says():
    """How long they are, how often they are measured, and how many problems are held out."""
    paths = sorted((RESULTS / "health").glob("*-seed*.json"))
    assert len(paths) == 132
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        setting, config = run["setting"], run["protocol"]["config"]
        sync = re.search(r"-m(\d+)", setting)
        assert config["max_steps"] == {"5": 60, "1": 40}.get(sync and sync[1], 150)
        assert run["measurements"][-1]["step"] == config["max_steps"]
        odd = (setting, run["seed"]) in (("tradeoff-m20-gated", 0), ("tradeoff-m20-ungated", 0))
        is_gated = config["teacher_refresh_gate"] is not None
        every = 30 if sync is None else {"5": 5, "1": 5, "50": 50 if is_gated else 10}.get(sync[1], 10)
        if (sync and sync[1] == "20" and is_gated and not odd) or re.search("-k8|-50-m20|-75-m20", setting):
            every = 20
        assert config["monitor_steps"] == every, path.name
        assert run["protocol"]["held_out"]["problems_a_difficulty"] == (50 if odd else 20)
    words = " ".join(section(BENCHMARKS, "## Accuracy without labels").split())
    assert "Runs have 150 steps; with M = 5 they have 60, with M = 1 they have 40." in words
    assert "All settings have five seeds, but K = 8 has one." in words
    count = {name: len(seeds) for name, seeds in result("health/summary.json")["runs"].items()}
    for name, number in count.items():
        assert number == (1 if "-k8-" in name else 5), name


def test_what_is_said_of_weak_bases_and_of_every_step_is_measured():
    words = " ".join(section(BENCHMARKS, "## Accuracy without labels").split())
    errors = {}
    for form in FORMS:
        for base in ("50", "75"):
            for path in (RESULTS / "health").glob(f"{form}-{base}-m20-*.json"):
                _, points = points_of(json.loads(path.read_text(encoding="utf-8")))
                for point in points:
                    seen, true = 100 * point.change.mean(), 100 * point.accuracy_change.mean()
                    errors[abs(seen - true)] = seen, true
    seen, true = errors[max(errors)]
    assert f"In the largest error accuracy had gained {true:.1f} points and agreement lost {-seen:.1f}." in words
    # How much smaller losses look
    assert 6.5 < max(seen - true for seen, true in errors.values() if true < 0) < 7
    stop = result("health/summary.json")["stop"]
    named = [[100 * one["named"]["accuracy_change"] for one in stop[f"{form}-m1-ungated"]] for form in FORMS]
    means = [sum(one) / len(one) for one in named]
    assert f"as a mean over five seeds, {means[0]:.1f} points above its base on the held-out problems" in words
    assert f"and {-means[1]:.1f} below it in *tradeoff*" in words
    below = [change for one in named for change in one if change < -3]
    assert f"In {len(below)} of the 10 runs it is further below, by up to {-min(below):.1f} points" in words


def test_what_few_answers_of_the_base_do_is_calculated():
    """In the warning of the config too."""
    power = result("health/summary.json")["power"]
    bias = {one["base_samples"]: 100 * one["bias"] for one in power if (one["prompts"], one["samples"]) == (128, 5)}
    lost, gained = f"{-bias[2]:.0f}", f"{bias[3]:.0f}"
    told = f"seems to have lost {lost} points or gained {gained}, so `monitor_base_samples` warns below {FEW_BASE_SAMPLES}."
    assert told in " ".join(BENCHMARKS.split())
    assert f"new answers of the same model agree {lost} points less" in " ".join(BENCHMARKS.split())
    with pytest.warns(UserWarning, match=f"seems to lose {lost} points with 2, and to gain {gained} with 3"):
        CRISPConfig("x", use_cpu=True, bf16=False, monitor_prompts=8, monitor_base_samples=2)
    assert all(abs(bias[samples]) < 1 for samples in bias if samples >= FEW_BASE_SAMPLES)
    alarms = {
        (one["prompts"], one["base_samples"]): one["by_margin"]["0.03"]["false_alarm"]
        for one in power
        if one["samples"] == 5
    }
    told = " ".join(CRISPConfig.__doc__.split())
    few, many = (f"{alarms[prompts, 16]:.0%}" for prompts in (64, 128))
    assert f"64 prompts give {few} false alarms instead of {many} with 16 answers of the base" in told
    assert f"{many} false alarms of a measurement with 128 prompts and 16 answers of the base" in told
    assert f"{alarms[128, 5]:.1%} with 5; benchmarks/README" in told


def test_the_gaps_of_engines_are_the_measured_ones():
    """And the limits of the check separate the engines that are the student from those that are not."""
    cases = json.loads((RESULTS / "engine_gap.json").read_text(encoding="utf-8"))["cases"]
    words = " ".join(BENCHMARKS.split())
    for name, one in cases.items():
        assert f"{name} {one['mean_gap_nats']:.2f} and {one['off_share']:.1%}" in words
        is_far = one["mean_gap_nats"] > MEAN_GAP_LIMIT_NATS or one["off_share"] > OFF_SHARE_LIMIT
        assert is_far == (name in ("4 bits", "no chat template"))
    assert f"a run stops at {MEAN_GAP_LIMIT_NATS} or {OFF_SHARE_LIMIT:.0%}" in words


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    """Relative links are to files of the repository, and anchors to headings."""
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", TEXTS[name]):
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_configs_and_extras_in_the_examples_are_those_there_are():
    import tomllib

    configs = set(re.findall(r"`([\w.-]+)`", section(EXAMPLES, "### Configs").split("```")[0]))
    assert configs == {path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml")}
    extras = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in table_rows(section(EXAMPLES, "## Install")))))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extras == set(project["optional-dependencies"])


def test_the_first_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_no_value_is_left_open():
    assert [line for text in TEXTS.values() for line in text.splitlines() if "TODO" in line] == []


def test_the_papers_rows_are_the_configs():
    """The same numbers as in the configs of these runs."""
    for version in ("v1", "v2"):
        config = (ROOT / "examples" / "configs" / f"qwen3-8b-{version}.yaml").read_text(encoding="utf-8")
        comment = " ".join(line.lstrip("# ") for line in config.splitlines() if line.startswith("#"))
        for benchmark, cells in (
            (row[0], row[1:]) for row in table_rows(README) if row[0].startswith(("MATH", "AIME"))
        ):
            if version in benchmark:
                assert f"{benchmark.split(',')[0]} {cells[0]} -> {cells[2]}" in comment
        before, after = re.search(r"AIME 2025 accuracy ([\d.]+) -> ([\d.]+)\.", comment).groups()
        assert f"from {before} to " in README
        assert f"{after} with {version}" in README


def test_the_line_on_what_is_lost_is_the_third_run():
    """Of the figure's panels; counted anew from the run's answers."""
    name = list(PANELS.values())[2]
    run = json.loads((ROOT / f"benchmarks/results/health/{name}-seed{SEED}.json").read_text(encoding="utf-8"))
    measured = {one["step"]: one for one in run["measurements"]}
    tokens = [one["agreement_mean_tokens"] for step, one in measured.items() if step >= 39]
    codes = ["".join(codes_of(measured[step])) for step in (39, 150)]
    first, last = (row.count(RIGHT) / len(row) for row in codes)
    stated = f"stay at {math.floor(min(tokens))} to {math.ceil(max(tokens))} tokens from step 39 on"
    assert stated in README
    assert f"falls from {first:.0%} to {last:.0%}" in " ".join(README.split())
    for step, share in ((39, first), (150, last)):
        assert measured[step]["agreement"] == pytest.approx(share, abs=0.01)


def test_loras_rows_are_the_labs_and_the_committed_runs():
    """Beside full fine-tuning, and in the quickstart's config."""
    text = section(BENCHMARKS, "## LoRA against full fine-tuning")
    lab = {row[0]: row for row in table_rows(section(BENCHMARKS, "## The lab")) if len(row) == 11}
    rows = table_rows(text)
    named = {re.search(r"`([\w-]+)`", row[0])[1]: row for row in rows if "`" in row[0]}
    assert set(named) == {"m50", "lora-3e-5", "lora-3e-4", "lora-3e-3"}
    for name, row in named.items():
        assert row[2:] == [lab[name][4], lab[name][6]]
        assert float(row[1]) == float(name.removeprefix("lora-") if "lora" in name else "3e-5")


def test_points_of_resuming_are_those_of_the_committed_run():
    run = result("resume.json")
    text = " ".join(section(EXAMPLES, "## Stopping and resuming").split())
    assert f"at {run['tried']} points" in text
    assert f"{run['survived']} runs resumed to the same bits" in text
    shares = {name: row["bytes_of_teacher"] / row["bytes"] for name, row in run["checkpoint"].items()}
    assert f"{shares['full']:.0%} of the checkpoint with full fine-tuning and {shares['lora']:.0%} with LoRA" in text


@pytest.mark.parametrize("name", ["loss", "steps", "growth"])
def test_the_tables_of_speed_are_those_of_the_committed_runs(name):
    record = result(f"speed/{name}.json")
    module = {"loss": speed, "steps": steps}.get(name)
    expected = memory.table_of(record) if module is None else module.table_of(record["cases"])
    opening, closing = f"<!-- {name}:table -->\n", f"\n<!-- /{name}:table -->"
    assert BENCHMARKS.split(opening)[1].split(closing)[0] == expected


def test_the_quickstarts_table_is_that_of_the_committed_results():
    """And the result is what the quickstart promises: at least 40% shorter, no accuracy lost beyond five points by either flag."""
    quickstart = load_example("quickstart")
    committed = result("smollm2.json")
    shown = README.split(f"{quickstart.README_START}\n")[1].split(quickstart.README_END)[0]
    assert shown == quickstart.render(committed, Path("benchmarks/results/smollm2.json"))
    change = committed["arms"]["after"]["change"]
    assert change["tokens"]["high"] < -0.4
    assert all(change[flag]["low"] > -0.05 for flag in quickstart.FLAGS)
    assert f"the answers are {-change['tokens']['estimate']:.0%} shorter" in " ".join(README.split())
    assert f"as often anywhere, within {-100 * change['anywhere']['low']:.0f} points" in " ".join(README.split())
    assert -change["anywhere"]["low"] > change["anywhere"]["high"]
    assert change["first_sentence"]["low"] > 0
    by_seed = {}
    for seed in committed["protocol"]["seeds"]:
        for arm in quickstart.ARMS:
            results = load_results(RESULTS / "smollm2" / f"seed{seed}-{arm}.json")
            assert results["protocol"]["seed"] == seed
            summary = results["summary"][str(results["protocol"]["max_new_tokens"])]["all"]
            by_seed.setdefault(str(seed), {})[arm] = {
                "tokens": summary["mean_tokens"],
                "first_sentence": summary["accuracy"],
                "anywhere": summary["anywhere_accuracy"],
            }
    for seed, arms in by_seed.items():
        for arm, values in arms.items():
            assert committed["by_seed"][seed][arm] == pytest.approx(values)


def test_the_settings_that_were_tried_are_told_with_their_numbers():
    """And they were tried on questions that the table does not use."""
    tried = result("smollm2/choice.json")
    ids = {}
    for split in ("train", "tune", "test"):
        lines = (ROOT / "examples" / "facts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ids[split] = [json.loads(line)["id"] for line in lines]
    assert tried["ids"] == ids["tune"] + ids["train"][::3]
    text = section(BENCHMARKS, "## SmolLM2 on questions about facts")
    assert table_rows(text) == [
        [
            row["setting"],
            f"{row['mean_tokens']:.1f}",
            *(f"{row[flag]:.1%}" for flag in ("first_sentence", "anywhere")),
        ]
        for row in tried["table"]
    ]
    text = " ".join(text.split())
    assert f"has {sum(map(len, ids.values()))} questions" in text
    counts = [len(ids[split]) for split in ("train", "tune", "test")]
    assert "{} to train on, {} to choose settings by, {} for the table".format(*counts) in text
    config = yaml.safe_load((ROOT / "examples" / "configs" / "smollm2-cpu.yaml").read_text(encoding="utf-8"))
    settings = [row["setting"] for row in tried["table"]]
    assert f"told `{config['instruction']}`" in settings
    assert any(f"{config['max_steps']} steps" in setting for setting in settings)
