"""What is pushed, over HTTP to a Hub on this machine, and what is never pushed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import config, make_trainer, rows
from tests.publish.fake_hub import fake_hub
from tests.report.made_results import write_evaluation
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp import CRISPTrainer
from trl_crisp.cli import main
from trl_crisp.evaluation.loading import ModelSource, describe_weights
from trl_crisp.publish.folder import make_folder
from trl_crisp.publish.merging import merge_adapter
from trl_crisp.publish.pushing import check_repo
from trl_crisp.report.card_metadata import _LEADERBOARDS
from trl_crisp.train import main as train_main
from trl_crisp.train import parse_args

pytestmark = pytest.mark.filterwarnings("ignore:teacher_sync_steps=", "ignore:The global batch is")
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
RUN = {"README.md", "crisp_training.json", "report.html", "report.md", "rollout_length.png"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_report(monkeypatch, request):
    """Drawing a report takes a second. The tests of it ask for the mark `page`."""

    def write_nothing(results, output, runs=()):
        files = [output, output.with_suffix(".md")]
        [file.write_text("a report") for file in files]
        return files

    if "page" not in request.keywords:
        monkeypatch.setattr("trl_crisp.publish.folder.write_report", write_nothing)


def sha_of(directory: Path) -> str:
    return describe_weights(ModelSource(str(directory)))["weights_sha256"]


def write_results(place: Path, model: Path, **more) -> list[Path]:
    """Write results of the base, of the base told to be concise, and of the model in a directory, with paths in their protocols."""

    def write(name: str, tokens: int, weights: str, instruction: str = "") -> Path:
        protocol = {"model": str(place / name), "benchmark": str(place / "sums.jsonl"), "weights_sha256": weights}
        return write_evaluation(
            place / name,
            lambda i, j: (tokens + i, i % 3 > 0),
            instruction=instruction,
            text=lambda i, j: f"the answer of {name} to {i}",
            protocol={**protocol, **more.pop("protocol", {})},
            **more,
        )

    return [write("base", 200, "b"), write("told", 120, "b", "Be brief."), write("after", 100, sha_of(model))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs from a local directory, of all weights and of an adapter, with checkpoints, and results of both."""
    place = tmp_path_factory.mktemp("secret_place")
    base = save_tiny(place / "TinyBase", "qwen3")
    (place / "TinyBase" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for name, peft_config in (("full", None), ("lora", LORA)):
        args = config(place / name, max_steps=2, save_strategy="steps", save_steps=1, teacher_sync_steps=2)
        trainer = CRISPTrainer(model=base, args=args, train_dataset=rows(), peft_config=peft_config)
        trainer.train()
        trainer.save_model()
        trainer.state.best_model_checkpoint, trainer.state.best_global_step = str(place / name / "checkpoint-1"), 1
        trainer.save_state()
        trainer.create_model_card()
        # What a user may have there
        (place / name / "notes.txt").write_text("mine")
        (place / name / ".env").write_text("HF_TOKEN=hf_secret")
    results = {name: write_results(place / f"results-{name}", place / name) for name in ("full", "lora")}
    return SimpleNamespace(place=place, results=results)


def copy_of(trained, name: str, tmp_path: Path) -> Path:
    """Copy a run, so that a test may change it."""
    return Path(shutil.copytree(trained.place / name, tmp_path / name, ignore=shutil.ignore_patterns("_push")))


@pytest.mark.parametrize(("name", "weights"), [("full", MODEL), ("lora", ADAPTER)])
def test_the_folder_has_the_model_its_evidence_and_nothing_else(trained, name, weights):
    directory = trained.place / name
    folder = make_folder(directory, "me/model", [trained.results[name]])
    results = {f"results/sums/{one}/results.json" for one in ("base", "told", "after")}
    assert set(folder.files) == weights | TOKENIZER | RUN | results
    assert {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()} == set(folder.files)
    assert {"checkpoint-1/", "checkpoint-2/", "training_args.bin", "notes.txt", ".env"} <= set(folder.left_out)
    for file in weights - {"adapter_config.json"}:
        assert (folder.path / file).read_bytes() == (directory / file).read_bytes()


@pytest.mark.page
@pytest.mark.parametrize("name", ["full", "lora"])
def test_no_file_of_the_folder_has_a_path_of_the_machine(trained, name):
    folder = make_folder(trained.place / name, "me/model", [trained.results[name]])
    for path in folder.path.rglob("*"):
        if path.is_file():
            assert b"secret_place" not in path.read_bytes(), path


def test_the_original_files_stay_as_they_are(trained, tmp_path):
    directory = copy_of(trained, "lora", tmp_path)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    make_folder(directory, "me/model", [trained.results["lora"]])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("checkpoint", ["checkpoint-1", "checkpoint-2"])
@pytest.mark.parametrize(("name", "weights"), [("full", MODEL), ("lora", ADAPTER)])
def test_a_checkpoint_goes_without_the_optimizer_and_the_teacher(trained, tmp_path, name, weights, checkpoint):
    directory = copy_of(trained, name, tmp_path) / checkpoint
    assert {"optimizer.pt", "teacher_state.json"} <= {p.name for p in directory.iterdir()}
    folder = make_folder(directory, "me/model")
    assert set(folder.files) == weights | TOKENIZER | RUN
    step = checkpoint[-1]
    assert f"- Steps: {step}" in (folder.path / "README.md").read_text()
    assert json.loads((folder.path / "crisp_training.json").read_text())["step"] == int(step)


@pytest.mark.page
def test_the_pushed_card_has_the_results_and_links_their_files(trained):
    folder = make_folder(trained.place / "full", "me/model", [trained.results["full"]])
    card = ModelCard.load(folder.path / "README.md")
    assert "- Steps: 2" in card.text
    assert "[results/sums/after/results.json](results/sums/after/results.json)" in card.text
    assert "[report.html](report.html)" in card.text
    assert 'pipeline("text-generation", model="me/model")' in card.text
    assert card.data.eval_results[0].metric_value == 0.6667
    assert card.data.license == "apache-2.0"
    report = (folder.path / "report.html").read_text()
    assert "the answer of after to" in report
    assert "the answer of base to" in report


def test_several_benchmarks_are_kept_apart(trained, tmp_path, monkeypatch):
    # The whole of it would take seconds to compare
    monkeypatch.setitem(_LEADERBOARDS, "gsm8k", ("openai/gsm8k", "gsm8k", 13))
    more = {"benchmark": "gsm8k", "benchmark_source": "openai/gsm8k", "benchmark_revision": COMMIT}
    directory = trained.place / "full"
    base, after = (
        write_evaluation(
            tmp_path / name,
            lambda i, j: (200, i % 2 > 0),
            problems=13,
            samples=1,
            budgets=(),
            protocol={**more, "weights_sha256": weights},
        )
        for name, weights in (("base", "b"), ("after", sha_of(directory)))
    )
    folder = make_folder(directory, "me/model", [trained.results["full"], [base, after]])
    assert {"results/sums/after/results.json", "results/gsm8k/after/results.json", ".eval_results/gsm8k.yaml"} <= set(
        folder.files
    )
    assert {"report-sums.html", "report-gsm8k.html"} <= set(folder.files)
    links = "[report-sums.html](report-sums.html), [report-gsm8k.html](report-gsm8k.html)"
    assert links in (folder.path / "README.md").read_text()
    [entry] = parse_eval_result_entries(yaml.safe_load((folder.path / ".eval_results/gsm8k.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("openai/gsm8k", "gsm8k", COMMIT)
    assert entry.value == round(100 * 6 / 13, 2)
    assert entry.source_url == "https://huggingface.co/me/model/blob/main/results/gsm8k/after/results.json"
    assert "sums: no file in .eval_results" in folder.describe()


def test_results_of_another_model_are_refused(trained):
    with pytest.raises(
        ValueError,
        match=r"was measured on another model than the one in .*full: weights_sha256 .* there, weights_sha256 .* here",
    ):
        make_folder(trained.place / "full", "me/model", [trained.results["lora"]])


def test_results_of_a_hub_model_have_to_be_of_the_repository(trained, tmp_path):
    unknown = {"weights_sha256": None, "model_revision": COMMIT}
    results = [
        write_evaluation(tmp_path / model, lambda i, j: (100, True), protocol={**unknown, "model": f"me/{model}"})
        for model in ("model", "other")
    ]
    assert "results/sums/after/results.json" in make_folder(trained.place / "full", "me/model", [[results[0]]]).files
    with pytest.raises(ValueError, match="me/other there, me/model here"):
        make_folder(trained.place / "full", "me/model", [[results[1]]])


def test_the_results_of_an_adapter_are_those_of_the_merged_model(trained, tmp_path):
    merge_adapter(str(trained.place / "lora"), tmp_path / "merged")
    folder = make_folder(tmp_path / "merged", "me/model", [trained.results["lora"]])
    assert set(folder.files) >= MODEL | TOKENIZER
    text = (folder.path / "README.md").read_text()
    assert "- Merged from an adapter by `trl-crisp merge`" in text
    assert "This is TinyBase, trained to reason in fewer tokens" in text
    assert "secret_place" not in text


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_card_that_was_edited_is_pushed_as_it_is(trained, tmp_path, name):
    directory = copy_of(trained, name, tmp_path)
    card = directory / "README.md"
    card.write_text(card.read_text() + "\nTrained by hand.\n")
    folder = make_folder(directory, "me/model", [trained.results[name]])
    assert (folder.path / "README.md").read_bytes() == card.read_bytes()
    assert f"{card} was edited, so it is pushed as it is. Remove it, and push writes a new one" in folder.describe()
    # Whoever downloads what was pushed and pushes it again has edited nothing
    again = make_folder(folder.path, "me/again")
    assert "was edited" not in again.describe()
    card.unlink()
    assert (
        "after CRISP" in (make_folder(directory, "me/model", [trained.results[name]]).path / "README.md").read_text()
    )


@pytest.mark.parametrize("front", ["- a list", "[torn", "tags: 3", "model-index:\n- name: x"])
def test_an_edited_card_that_the_hub_could_not_read_is_refused(trained, tmp_path, front):
    directory = copy_of(trained, "full", tmp_path)
    (directory / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"README\.md was edited, and the Hub could not read its metadata: "):
        make_folder(directory, "me/model")


def test_an_adapter_of_a_local_base_names_it_without_its_path_and_warns(trained, tmp_path):
    folder = make_folder(trained.place / "lora", "me/model")
    assert json.loads((folder.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "TinyBase"
    assert "Warning: the adapter's base, TinyBase, is not on the Hub" in folder.describe()


def test_an_adapter_of_the_hubs_cache_names_the_hubs_base(tmp_path):
    model = tiny_model("qwen3")
    model.config._name_or_path = str(tmp_path / "models--org--base" / "snapshots" / COMMIT)
    trainer = make_trainer(tmp_path / "out", "qwen3", model, peft_config=LORA)
    trainer.save_model()
    trainer.create_model_card()
    folder = make_folder(tmp_path / "out", "me/model")
    written = json.loads((folder.path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/base", COMMIT)
    assert "AutoPeftModelForCausalLM.from_pretrained" in (folder.path / "README.md").read_text()
    assert not [note for note in folder.notes if "Warning" in note]


def test_an_adapter_without_a_tokenizer_is_pushed_with_a_warning_and_uses_the_bases(trained, tmp_path):
    directory = copy_of(trained, "lora", tmp_path)
    for name in TOKENIZER:
        (directory / name).unlink()
    folder = make_folder(directory, "me/model")
    assert (
        f"Warning: {directory} has no tokenizer. Save it there: tokenizer.save_pretrained('{directory}')."
        in folder.notes
    )
    assert 'AutoTokenizer.from_pretrained("TinyBase")' in (folder.path / "README.md").read_text()


def test_a_model_without_a_record_says_that_nothing_is_known(tmp_path):
    save_tiny(tmp_path / "model")
    text = (make_folder(tmp_path / "model", "me/model").path / "README.md").read_text()
    assert "This is a model whose base is not known: its directory does not name it." in text
    assert "None" not in text


def test_code_that_the_config_names_is_pushed_and_other_code_is_not(tmp_path):
    directory = tmp_path / "model"
    save_tiny(directory)
    code = {"modeling.py": "from .layers import Layer", "layers.py": "", "mine.py": "", "elsewhere.py": ""}
    for name, text in code.items():
        (directory / name).write_text(text)
    assert not set(code) & set(make_folder(directory, "me/model").files)
    path = directory / "config.json"
    auto_map = {"AutoModel": "modeling.Model", "AutoTokenizer": ["me/other--elsewhere.Tokenizer", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    assert set(code) & set(make_folder(directory, "me/model").files) == {"modeling.py", "layers.py"}


def test_files_of_the_users_whose_names_are_like_those_of_a_model_are_not_pushed(tmp_path):
    directory = tmp_path / "model"
    save_tiny(directory)
    for name in ("LICENSE_KEY_private.txt", "mine.model", "LICENSE", "spiece.model"):
        (directory / name).write_text("")
    files = make_folder(directory, "me/model").files
    assert {"LICENSE", "spiece.model"} <= set(files)
    assert not {"LICENSE_KEY_private.txt", "mine.model"} & set(files)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_in_the_folders_place_is_refused(tmp_path, kind):
    directory = tmp_path / "model"
    save_tiny(directory)
    place = directory / "_push"
    place.write_text("") if kind == "file" else place.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"_push is not a directory, and push writes its folder there"):
        make_folder(directory, "me/model")


def test_a_model_keeps_its_record_while_another_run_trains_in_its_directory(trained, tmp_path):
    """A second run was killed after a checkpoint: the weights in output_dir are still those of the first."""
    directory = copy_of(trained, "full", tmp_path)
    before = {name: (directory / name).read_bytes() for name in ("README.md", "crisp_training.json")}
    trainer = CRISPTrainer(
        model=str(trained.place / "TinyBase"),
        args=config(directory, max_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.5),
        train_dataset=rows(),
    )
    trainer.train()
    assert {name: (directory / name).read_bytes() for name in before} == before
    folder = make_folder(directory, "me/model")
    assert "The log in" in folder.describe()
    assert "is that of another run than the model's" in folder.describe()
    text = (folder.path / "README.md").read_text()
    assert "- Steps: 2 (2 planned)" in text
    assert "| `learning_rate` | 0.5 |" not in text
    # The second run's checkpoint has its own
    text = (make_folder(directory / "checkpoint-1", "me/model").path / "README.md").read_text()
    assert "- Steps: 1 (1 planned)" in text
    assert "| `learning_rate` | 0.5 |" in text
    # Once it saves its model, the card is of this model
    trainer.save_model()
    trainer.save_state()
    assert "| `learning_rate` | 0.5 |" in (make_folder(directory, "me/model").path / "README.md").read_text()


def test_a_log_that_is_torn_is_left_out_with_a_warning(trained, tmp_path):
    directory = copy_of(trained, "full", tmp_path)
    (directory / "trainer_state.json").write_text("{")
    assert (
        "Warning: the training's log is left out, because it cannot be read: "
        in make_folder(directory, "me/model").describe()
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: shutil.rmtree(d), "there is no such directory"),
        (
            lambda d: (d / "model.safetensors").unlink(),
            r"has no model .* It has checkpoint-1, checkpoint-2: one of these can be pushed",
        ),
        (lambda d: (d / "config.json").unlink(), "has no model"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 20), r"model\.safetensors is torn or damaged"),
        (lambda d: (d / "crisp_training.json").write_text("{"), r"crisp_training\.json is torn"),
    ],
)
def test_a_directory_that_cannot_be_pushed_is_refused_in_words(trained, tmp_path, capsys, break_it, message):
    directory = copy_of(trained, "full", tmp_path)
    break_it(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_folder(directory, "me/model")
    assert main(["push", str(directory), "--repo", "me/model", "--dry-run"]) == 2
    assert "trl-crisp push: error: " in capsys.readouterr().err


@pytest.mark.parametrize("repo", ["model", "me/model/x", "/model", "me/", "me/mo del", "me/model--x", "me/.model"])
def test_a_name_that_the_hub_does_not_take_is_refused(repo):
    with pytest.raises(ValueError, match=r"^--repo "):
        check_repo(repo)


def test_a_dry_run_writes_and_lists_the_folder_and_asks_no_hub(trained, tmp_path, capsys, monkeypatch):
    directory = copy_of(trained, "full", tmp_path)
    with fake_hub(monkeypatch) as hub:
        assert main(["push", str(directory), "--repo", "me/model", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{directory}/_push:\n  README.md " in out
    assert "Nothing was pushed (--dry-run)." in out
    assert (directory / "_push" / "model.safetensors").is_file()
    assert hub.repos == hub.files == {}


def test_what_is_pushed_is_the_folder(trained, tmp_path, capsys, monkeypatch):
    directory = copy_of(trained, "full", tmp_path)
    command = ["push", str(directory), "--repo", "me/model", "--results", *map(str, trained.results["full"])]
    assert main([*command, "--dry-run"]) == 0
    folder = directory / "_push"
    expected = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with fake_hub(monkeypatch) as hub:
        assert main([*command, "--private", "--revision", "first"]) == 0
    pushed = hub.files["first"]
    assert pushed.keys() == expected.keys()
    for name in expected.keys() - {"report.html", "report.md", "rollout_length.png"}:
        assert pushed[name] == expected[name], name
    assert hub.repos == {"me/model": {"name": "model", "organization": "me", "visibility": "private"}}
    assert hub.branches == ["first"]
    # As the Hub would be asked to check it
    assert hub.cards == [pushed["README.md"].decode()]
    assert not folder.exists()
    assert "https://huggingface.co/me/model" in capsys.readouterr().out
    for name, content in pushed.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path / "downloaded")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "downloaded").chat_template == tiny_tokenizer("qwen3").chat_template
    )


def test_a_refused_push_keeps_everything_and_prints_the_command(trained, tmp_path, capsys, monkeypatch):
    directory = copy_of(trained, "full", tmp_path)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    results = list(map(str, trained.results["full"]))
    command = ["push", str(directory), "--repo", "me/model", "--results", *results, "--private"]
    with fake_hub(monkeypatch) as hub:
        hub.refuses = True
        assert main(command) == 1
        told = capsys.readouterr().err
        assert "The push to me/model failed: " in told
        assert "no room left for you" in told
        assert f"  trl-crisp {' '.join(command)}" in told
        assert {path: path.read_bytes() for path in before} == before
        assert (directory / "_push" / "README.md").is_file()
        hub.refuses = False
        assert main(command) == 0
    assert hub.files["main"].keys() >= MODEL


# From a trainer


def test_a_trainer_pushes_the_same_folder(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", max_steps=1, hub_model_id="me/model")
    trainer.train()
    with fake_hub(monkeypatch) as hub:
        trainer.push_to_hub(dataset_name="org/rows", tags=["mine"])
    assert hub.files["main"].keys() == MODEL | TOKENIZER | RUN
    card = ModelCard(hub.files["main"]["README.md"].decode())
    assert card.data.datasets == ["org/rows"]
    assert "mine" in card.data.tags


def test_results_can_be_given_to_a_trainer(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", max_steps=1, hub_model_id="me/model")
    trainer.train()
    trainer.save_model()
    results = write_results(tmp_path / "results", tmp_path / "out")
    trainer.create_model_card(results=[results])
    assert "| after CRISP | 106 |" in (tmp_path / "out" / "README.md").read_text()
    with fake_hub(monkeypatch) as hub:
        trainer.push_to_hub(results=[list(map(str, results))])
    assert b"| after CRISP | 106 |" in hub.files["main"]["README.md"]
    assert "results/sums/told/results.json" in hub.files["main"]
    with pytest.raises(ValueError, match="was measured on another model than the one in"):
        trainer.create_model_card(results=[[write_evaluation(tmp_path / "other", lambda i, j: (1, True))]])


def test_a_card_of_trls_template_is_pushed_as_it_is(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", max_steps=1, hub_model_id="me/model")
    trainer._template_file = "lm_model_card.md"
    with fake_hub(monkeypatch) as hub:
        trainer.push_to_hub()
    assert b"## Quick start" in hub.files["main"]["README.md"]


def test_a_subclass_with_a_card_of_its_own_pushes_it(tmp_path, monkeypatch):
    class Ours(CRISPTrainer):
        def create_model_card(self, *args, **kwargs):
            Path(self.args.output_dir, "README.md").write_text("---\ntags: [mine]\n---\n# Mine\n")

    trainer = Ours(
        model=tiny_model(),
        args=config(tmp_path / "out", hub_model_id="me/model"),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )
    with fake_hub(monkeypatch) as hub:
        trainer.push_to_hub()
    assert hub.files["main"]["README.md"] == b"---\ntags: [mine]\n---\n# Mine\n"


def train_flags(place: Path) -> list[str]:
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    questions = place / "own.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(3)))
    text = (
        f"--model_name_or_path {save_tiny(place / 'TinyBase')} --dataset_name {data} --output_dir {place / 'out'} --max_steps 2 "
        "--max_completion_length 4 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1 --report_to none "
        f"--use_cpu --bf16 false --disable_tqdm true --save_strategy no --eval_benchmark {questions} --eval_benchmark_steps 1 "
        "--eval_benchmark_max_new_tokens 8 --push_to_hub true --hub_model_id me/model"
    )
    return text.split()


def test_a_run_with_push_to_hub_pushes_what_it_measured(tmp_path, monkeypatch):
    with fake_hub(monkeypatch) as hub:
        train_main(*parse_args(train_flags(tmp_path)))
    results = {f"results/own/{one}/results.json" for one in ("base", "after")}
    assert hub.files["main"].keys() == MODEL | TOKENIZER | RUN | results
    measured = json.loads(hub.files["main"]["results/own/after/results.json"])["protocol"]
    assert (measured["step"], measured["model"], measured["benchmark"]) == (2, "TinyBase at step 2", "own.jsonl")
    text = hub.files["main"]["README.md"].decode()
    assert "measured during training, at step 2" in text
    assert "- Rows: rows.jsonl, 12 prompts" in text
    for content in hub.files["main"].values():
        assert str(tmp_path).encode() not in content


def test_a_lost_run_pushes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_crisp.health.ending.describe_lost", lambda trainer, health: "It is lost.")
    flags = train_flags(tmp_path)
    flags[flags.index("--eval_benchmark") : flags.index("--push_to_hub")] = []
    with fake_hub(monkeypatch) as hub, pytest.raises(SystemExit) as ended:
        train_main(*parse_args(flags))
    assert ended.value.code == 3
    assert hub.files == {}
