"""A card says what was trained, from what, how and with what results; its snippet runs; no path of the machine is in it."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from tests.helpers import config, make_trainer, rows
from tests.report.made_results import training_log, write_evaluation, write_run
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp import INSTRUCTIONS, CRISPConfig, CRISPTrainer
from trl_crisp.health.attach import attach_health
from trl_crisp.publish.run_card import _adapter_of, describe_training
from trl_crisp.report.card import CardFacts, code_fence, make_card
from trl_crisp.report.card_metadata import leaderboard_entry
from trl_crisp.report.card_results import load_card_results
from trl_crisp.report.run_log import load_run
from trl_crisp.run.training_record import read_record, write_record

pytestmark = pytest.mark.filterwarnings("ignore:teacher_sync_steps=")
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_base(path: Path, kind: str = "qwen3", has_template: bool = True) -> str:
    """Save a base with a licence, whose answers end soon."""
    save_tiny(path, kind)
    if not has_template:
        tokenizer = tiny_tokenizer(kind)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(path)
        (path / "chat_template.jinja").unlink(missing_ok=True)
    GenerationConfig(max_length=4096, do_sample=False, eos_token_id=list(range(260))).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    return str(path)


def train(output_dir: Path, model: str, peft_config=None, dataset=None, **overrides) -> CRISPTrainer:
    trainer = CRISPTrainer(
        model=model,
        args=config(output_dir, max_steps=2, **overrides),
        train_dataset=rows() if dataset is None else dataset,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def text_of(trainer) -> str:
    return (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")


def card_of(trainer) -> ModelCard:
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run from a local directory with LoRA, and one of all weights."""
    directory = tmp_path_factory.mktemp("secret_place")
    base = save_base(directory / "TinyBase")
    instruction = directory / "brief.txt"
    instruction.write_text("Answer briefly, please.\n")
    full = train(
        directory / "full", base, instruction=str(instruction), resume_from_checkpoint=str(directory / "gone")
    )
    lora = train(directory / "lora", base, LORA)
    return SimpleNamespace(directory=directory, full=full, lora=lora)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_base_is_named_without_a_path(trained, name):
    text = text_of(getattr(trained, name))
    assert "TinyBase" in text
    assert "None" not in text
    record = (Path(getattr(trained, name).args.output_dir) / "crisp_training.json").read_text()
    for content in (text, record):
        assert str(trained.directory) not in content
        assert "secret_place" not in content


def test_the_card_says_what_the_teacher_was_told(trained):
    assert "```text\nAnswer briefly, please.\n```" in text_of(trained.full)
    assert "| `instruction` | brief.txt |" in text_of(trained.full)
    assert f"```text\n{INSTRUCTIONS['v1']}\n```" in text_of(trained.lora)


def test_the_card_has_all_of_crisps_fields_and_their_values(trained):
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text_of(trained.full), flags=re.MULTILINE))
    own = [name for name in CRISPConfig.__annotations__ if name in CRISPConfig.__dataclass_fields__]
    assert set(own) <= shown.keys()
    assert shown["teacher_sync_steps"] == "50"
    assert shown["learning_rate"] == "0.001"
    assert shown["teacher_update_rate"] == "not set"
    assert shown["lr_scheduler_type"] == "constant"
    assert shown["resume_from_checkpoint"] == "gone"


def test_the_card_says_how_it_was_trained(trained):
    assert "- Steps: 2 (2 planned), 4 rollouts each\n- Trained: all weights, " in text_of(trained.full)
    text = text_of(trained.lora)
    count = sum(p.numel() for p in trained.lora.model.parameters() if p.requires_grad)
    assert (
        f"- Trained: an adapter (type LORA, r 2, lora_alpha 8, target_modules q_proj), {count:,} parameters\n" in text
    )
    assert f"torch {torch.__version__}" in text
    assert "2603.05433" in text
    assert "@article{sang2026crisp" in text
    assert "@software{vonwerra2020trl" in text


def test_the_figure_is_beside_the_card(trained):
    assert "](rollout_length.png)" in text_of(trained.full)
    assert (Path(trained.full.args.output_dir) / "rollout_length.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_metadata_of_a_local_base(trained, name):
    data = card_of(getattr(trained, name)).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == {"full": "transformers", "lora": "peft"}[name]
    assert data["pipeline_tag"] == "text-generation"
    assert {"trl", "crisp", "generated_from_trainer"} <= set(data["tags"])
    assert "datasets" not in data


def snippet_of(text: str) -> str:
    [snippet] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return snippet


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_snippet_runs(trained, name, capsys):
    snippet = snippet_of(text_of(getattr(trained, name)))
    for given in (name, "TinyBase"):
        snippet = snippet.replace(f'"{given}"', f'"{trained.directory / given}"')
    assert str(trained.directory / name) in snippet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(snippet, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_the_snippet_of_a_model_for_plain_texts_runs(tmp_path, peft_config, capsys):
    from datasets import Dataset

    base = save_base(tmp_path / "TinyBase", has_template=False)
    plain = Dataset.from_list([{"prompt": f"What is {i}?"} for i in range(8)])
    snippet = snippet_of(text_of(train(tmp_path / "out", base, peft_config, plain)))
    assert "messages" not in snippet
    for given in ("out", "TinyBase"):
        snippet = snippet.replace(f'"{given}"', f'"{tmp_path / given}"')
    exec(snippet, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_base_on_the_hub_is_linked(tmp_path, tuning):
    model = tiny_model("qwen3")
    model.config._name_or_path = "org/base"
    trainer = make_trainer(tmp_path / "out", "qwen3", model, peft_config=LORA if tuning == "lora" else None)
    trainer.dataset_name = "org/rows"
    trainer.create_model_card("my-model", tags="mine")
    data = card_of(trainer).data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == {"full": "finetune", "lora": "adapter"}[tuning]
    assert data["datasets"] == ["org/rows"]
    assert "mine" in data["tags"]
    assert "license" not in data
    text = text_of(trainer)
    assert "[org/base](https://huggingface.co/org/base)" in text
    assert "[org/rows](https://huggingface.co/datasets/org/rows)" in text
    assert "# Model Card for my-model" in text


def test_monitor_prompts_are_not_counted_as_rows_that_are_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), monitor_prompts=8)
    assert describe_training(trainer)["dataset"]["rows"] == 24
    attach_health(trainer, lambda text: text)
    assert describe_training(trainer)["dataset"]["rows"] == 16


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("DIR/rows.jsonl", "- Rows: rows.jsonl, 8 prompts"),
        ("reasoning-gym:gsm_symbolic", "- Rows: reasoning-gym:gsm_symbolic, 8"),
        (None, "- Rows: not named, 8"),
    ],
)
def test_rows_that_are_not_on_the_hub_are_named_and_not_linked(tmp_path, name, shown):
    trainer = make_trainer(tmp_path / "out")
    trainer.create_model_card(dataset_name=name and name.replace("DIR", str(tmp_path)))
    assert shown in text_of(trainer)
    assert "datasets" not in card_of(trainer).data.to_dict()


def test_a_model_that_was_made_in_memory_has_a_base_in_words(tmp_path):
    trainer = make_trainer(tmp_path / "out", "llama")
    trainer.create_model_card()
    assert "This is a llama model that was made in memory, trained to reason in fewer tokens" in text_of(trainer)


def test_saving_an_adapter_again_leaves_no_path_in_its_card(tmp_path):
    """PEFT writes a card with each adapter."""
    base = save_base(tmp_path / "secret_place" / "TinyBase")
    trainer = train(tmp_path / "out", base, LORA)
    trainer.save_model()
    assert "secret_place" not in text_of(trainer)
    assert "## Limits" in text_of(trainer)


def test_the_tags_of_the_model_are_the_cards(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    trainer.model.add_model_tags(["own-tag"])
    trainer.create_model_card()
    tags = card_of(trainer).data.tags
    assert tags.count("own-tag") == tags.count("trl") == 1


def test_trls_template_stays_usable(tmp_path):
    class Ours(CRISPTrainer):
        _template_file = "lm_model_card.md"

    made = make_trainer(tmp_path / "ours")
    trainer = Ours(
        model=tiny_model(), args=config(tmp_path / "out"), train_dataset=rows(), processing_class=tiny_tokenizer()
    )
    trainer.create_model_card("my-model", "org/rows")
    made._template_file = "lm_model_card.md"
    made.create_model_card("my-model", "org/rows")
    for one in (trainer, made):
        assert "## Quick start" in text_of(one)
        assert "2603.05433" in text_of(one)
        assert "### Framework versions" in text_of(one)


def test_without_matplotlib_the_card_has_no_figure_and_says_why(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    trainer.train()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"no figure, because matplotlib.* is not installed"):
        trainer.create_model_card()
    assert ".png" not in text_of(trainer)


def test_a_checkpoint_that_was_loaded_as_the_result_is_what_the_card_is_about(tmp_path):
    trainer = make_trainer(tmp_path / "out", save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.state.best_model_checkpoint, trainer.state.best_global_step = str(tmp_path / "out/checkpoint-2"), 2
    trainer._load_best_model()
    trainer.create_model_card()
    assert "- Steps: 2, a checkpoint of the 3 that were done (3 planned)" in text_of(trainer)
    trainer.train()
    trainer.create_model_card()
    assert "- Steps: 3 (3 planned)" in text_of(trainer)


# Results


def evaluations(directory: Path, **more) -> list[Path]:
    """Write the base, the base told to be concise, and the trained model."""
    base = write_evaluation(directory / "base", lambda i, j: (200 + i, i % 3 > 0), **more)
    told = write_evaluation(directory / "told", lambda i, j: (120 + i, i % 3 > 0), instruction="Be brief.", **more)
    after = write_evaluation(directory / "after", lambda i, j: (100 + i, i % 3 > 0), weights="after", **more)
    return [base, told, after]


def facts(results=(), **more) -> CardFacts:
    base = {"source": "hub", "name": "org/base", "hub_id": "org/base", "revision": COMMIT}
    return CardFacts(name="model", repo="me/model", base=base, is_adapter=False, is_chat=True, results=results, **more)


def test_the_results_stand_with_verdict_table_and_protocol(tmp_path):
    result = load_card_results(evaluations(tmp_path))
    text = make_card(facts([result])).text
    assert (
        "### sums\n\n**Use with caution: 49% fewer tokens [48%, 49%], accuracy unclear: 0.0 points [0.0, 0.0]**"
        in text
    )
    rows_ = [line.split(" | ") for line in text.splitlines() if line.startswith(("| base", "| after"))]
    assert [row[:2] for row in rows_] == [
        ["| base", "206"],
        ["| base, told to be concise", "126"],
        ["| after CRISP", "106"],
    ]
    assert rows_[2][2:5] == ["-49% [-49%, -48%]", "66.7%", "0.0 points [0.0, 0.0]"]
    assert (
        'Protocol: 12 problems of sums.jsonl at sha256:0; 2 answers each; at most 1,000 tokens; temperature 0.6; grader made; told "Be brief."'
        in text
    )


def test_a_model_that_lost_accuracy_says_so_first(tmp_path):
    base = write_evaluation(tmp_path / "base", lambda i, j: (200, True), problems=40)
    after = write_evaluation(tmp_path / "after", lambda i, j: (100, i % 2 > 0), problems=40, weights="after")
    assert "**Do not use this checkpoint: " in make_card(facts([load_card_results([base, after])])).text


def test_the_model_index_is_built_from_the_results_and_parses_back(tmp_path):
    results = [
        load_card_results(evaluations(tmp_path / "a")),
        load_card_results(
            evaluations(
                tmp_path / "b",
                protocol={"benchmark": "gsm8k", "benchmark_source": "openai/gsm8k", "benchmark_revision": COMMIT},
            )
        ),
    ]
    (tmp_path / "README.md").write_text(str(make_card(facts(results))))
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [(one.dataset_type, one.dataset_revision, one.metric_type, one.metric_value) for one in found] == [
        ("sums.jsonl", None, "accuracy", 0.6667),
        ("sums.jsonl", None, "mean_tokens", 105.5),
        ("openai/gsm8k", COMMIT, "accuracy", 0.6667),
        ("openai/gsm8k", COMMIT, "mean_tokens", 105.5),
    ]
    assert found[0].metric_name == "accuracy (mean@2)"
    assert found[0].metric_args == {"samples_per_problem": 2, "temperature": 0.6, "max_new_tokens": 1000}
    assert found[0].dataset_args == {"problems": 12}


def test_a_result_without_a_base_has_no_verdict(tmp_path):
    [result] = [load_card_results([evaluations(tmp_path)[2]])]
    text = make_card(facts([result])).text
    assert "| after CRISP | 106 |  | 66.7% |  |" in text
    assert "The base was not measured in the same way everywhere" in text


@pytest.mark.parametrize(("chosen", "count"), [((0, 1), 0), ((0, 2, 3), 2)])
def test_results_of_no_or_two_trained_models_are_refused(tmp_path, chosen, count):
    paths = [*evaluations(tmp_path), write_evaluation(tmp_path / "other", lambda i, j: (90, True), weights="other")]
    with pytest.raises(
        ValueError, match=f"a card is about one model, and of these results {count} are of a trained one"
    ):
        load_card_results([paths[i] for i in chosen])


@pytest.mark.parametrize(
    ("protocol", "problems", "dataset"),
    [
        (
            {"benchmark": "gpqa-diamond", "benchmark_source": "Idavidrein/gpqa"},
            198,
            ("Idavidrein/gpqa", "gpqa_diamond"),
        ),
        # A part of the benchmark, rows of a file, and a benchmark that is not known to have a leaderboard
        ({"benchmark": "gpqa-diamond", "benchmark_source": "Idavidrein/gpqa"}, 197, None),
        ({"benchmark": "gpqa-diamond", "benchmark_source": "gpqa.csv"}, 198, None),
        ({"benchmark": "math500", "benchmark_source": "HuggingFaceH4/MATH-500"}, 500, None),
    ],
)
def test_a_leaderboard_gets_whole_benchmarks_in_percent(tmp_path, protocol, problems, dataset):
    more = {"benchmark_revision": COMMIT, **protocol}
    after = write_evaluation(tmp_path, lambda i, j: (100, i % 2 > 0), problems=problems, samples=1, protocol=more)
    entry = leaderboard_entry(load_card_results([after]), "https://huggingface.co/me/model")
    if dataset is None:
        assert entry is None
    else:
        assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == (*dataset, COMMIT)
        assert entry.value == 50.0
        assert entry.notes.startswith("accuracy in %, mean@1, temperature 0.6, up to 1,000 tokens")


def test_agreement_and_health_of_the_run_are_told_at_the_models_step(tmp_path, trained):
    record = read_record(trained.full.args.output_dir)
    run = load_run(write_run(tmp_path, training_log(20)))
    events = [
        {"step": step, "status": "watch", "reasons": [reason]}
        for step, reason in ((9, "rollouts are long"), (19, "rollouts are longer"))
    ]
    # Watched from step 9 on
    log = [{**entry, "health/status": 1.0} if entry["step"] >= 9 else entry for entry in run.log_history]
    run = dataclasses.replace(run, log_history=log, events=events)
    text = " ".join(make_card(facts(run=run, record={**record, "step": 10})).text.split())
    assert (
        "left out of training: 100 tokens before, 70.0 after. Agreement with the base's majority answers: 80.0% of the base's own answers, "
        "79.0% of this model's (-1.0 points [-2.5, +1.0])." in text
    )
    assert "Agreement with the base is no accuracy." in text
    assert "- The training's signals at step 10: watch (rollouts are long)" in text
    assert "- The training's signals at step 7: healthy " in " ".join(
        make_card(facts(run=run, record={**record, "step": 7})).text.split()
    )
    text = " ".join(make_card(facts(run=run, record={**record, "step": 20})).text.split())
    assert "- The training's signals at its end: watch (rollouts are longer)" in text
    # Nothing was measured at that step
    assert "Agreement with the base's" not in make_card(facts(run=run, record={**record, "step": 7})).text


def test_accuracy_that_the_run_measured_and_lost_is_told(tmp_path, trained):
    record = {**read_record(trained.full.args.output_dir), "step": 10}
    log = [
        {
            "step": step,
            "eval_agreement": level,
            "eval_agreement_accuracy": level,
            "eval_agreement_mean_tokens": tokens,
            **(
                {
                    "eval_agreement_reduction": 0.5,
                    **{
                        f"eval_agreement{name}_change{end}": -0.9
                        for name in ("", "_accuracy")
                        for end in ("", "_low", "_high")
                    },
                }
                if step
                else {}
            ),
        }
        for step, level, tokens in ((0, 0.9, 100.0), (10, 0.0, 50.0))
    ]
    card = make_card(facts(run=load_run(write_run(tmp_path, log)), record=record))
    text = " ".join(card.text.split())
    assert (
        "**Do not use this checkpoint: 50% fewer tokens, accuracy on the monitor prompts fell: -90.0 points [-90.0, -90.0]"
        in text
    )
    assert "Accuracy of the same answers: 90.0% before, 0.0% after (-90.0 points [-90.0, -90.0])." in text
    assert "Accuracy was measured on the monitor prompts alone" in text
    assert "Accuracy was not measured" not in text
    # Where no majority answers were found, accuracy is told alone
    alone = [
        {key: value for key, value in entry.items() if key != "eval_agreement" and "agreement_change" not in key}
        for entry in log
    ]
    text = " ".join(make_card(facts(run=load_run(write_run(tmp_path / "alone", alone)), record=record)).text.split())
    assert "50.0 after. Accuracy: 90.0% before, 0.0% after (-90.0 points [-90.0, -90.0])." in text
    assert "Accuracy was measured on the monitor prompts alone" in text


@pytest.mark.parametrize(
    ("repo", "snippet", "command"),
    [
        ("me/model", 'from_pretrained("me/model")', "trl-crisp merge me/model --output merged"),
        ('it"s "x" <b>', r'from_pretrained("it\"s \"x\" <b>")', """trl-crisp merge 'it"s "x" <b>' --output merged"""),
    ],
)
def test_the_snippet_quotes_names(repo, snippet, command):
    text = make_card(dataclasses.replace(facts(), is_adapter=True, repo=repo)).text
    assert snippet in text
    assert command in text


def test_a_base_without_a_name_is_no_argument_of_the_snippet():
    base = {"source": "memory", "name": "a qwen3 model that was made in memory", "hub_id": None, "revision": None}
    text = make_card(dataclasses.replace(facts(), is_adapter=True, base=base)).text
    assert 'from_pretrained("BASE")  # the directory of the base: a qwen3 model that was made in memory' in text
    assert 'from_pretrained("a qwen3' not in text


def test_files_with_spaces_are_linked(tmp_path):
    result = load_card_results(evaluations(tmp_path))
    links = {one.path: f"results/my sums (v1)/{one.path.parent.name}/results.json" for one in result.compared.all}
    text = make_card(dataclasses.replace(facts([result]), result_links=links)).text
    assert "](results/my%20sums%20%28v1%29/" in text


def test_a_page_without_results_has_no_answers(tmp_path):
    assert (
        "The training in figures: [report.html](report.html)."
        in make_card(dataclasses.replace(facts(), reports=("report.html",))).text
    )


def test_what_was_not_measured_is_told(tmp_path):
    assert (
        "Accuracy was not measured, so nothing here shows that the answers are still right." in make_card(facts()).text
    )
    text = make_card(facts([load_card_results(evaluations(tmp_path, samples=1))])).text
    assert "Accuracy and length were measured on sums alone" in text
    assert "No hard benchmark (AIME, GPQA) was measured" in text
    assert "With one answer per problem, pass@k was not measured" in text


def test_an_instruction_cannot_end_its_block():
    assert code_fence("a ``` b ```` c") == "`````text\na ``` b ```` c\n`````"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is torn"),
        ('{"schema": "x", "schema_version": 1}', "has schema 'x'"),
        ('{"schema": "trl-crisp training", "schema_version": 1, "base": {"name": "x"}}', "its base is {'name': 'x'}"),
        ('{"schema": "trl-crisp training", "schema_version": 1, "base": 3}', "is torn or no record"),
    ],
)
def test_a_record_that_is_torn_or_of_another_schema_is_refused(tmp_path, content, message):
    (tmp_path / "crisp_training.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path)


def test_a_record_that_lacks_something_is_refused(tmp_path):
    write_record(tmp_path, {"instruction": "Be brief.", "step": 1})
    with pytest.raises(ValueError, match=r"not as trl-crisp writes it: .* Move crisp_training\.json away"):
        make_card(facts(record=read_record(tmp_path)))


def test_a_checkpoint_without_a_record_has_that_of_its_run_with_its_own_step(tmp_path, monkeypatch):
    write_record(tmp_path, {"step": 4})
    (tmp_path / "checkpoint-2").mkdir()
    assert read_record(tmp_path / "checkpoint-2")["step"] == 2
    monkeypatch.chdir(tmp_path / "checkpoint-2")
    assert read_record(".")["step"] == 2
    write_record(tmp_path / "42", {"step": 4})
    assert read_record(tmp_path / "42")["step"] == 4
    assert read_record(tmp_path / "other") is None
    assert json.loads((tmp_path / "crisp_training.json").read_text())["schema"] == "trl-crisp training"


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["v_proj", "q_proj"], "q_proj, v_proj"),
        (
            [f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("up", "down")],
            "down_proj, up_proj (4 modules)",
        ),
    ],
)
def test_the_adapter_is_told_in_a_few_words(modules, words):
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules=modules, use_dora=True))
    told = _adapter_of(model)
    assert told["target_modules"] == words
    assert told["use_dora"] is True
    assert "use_rslora" not in told
