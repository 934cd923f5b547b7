"""Each weight of what is evaluated comes from the files: keys, shapes, torn files, adapters and their bases, the Hub's commits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import save_tiny, tiny_tokenizer
from trl_crisp.evaluation.loading import check_weights, describe_weights, find_model, load_model, load_tokenizer
from trl_crisp.rows.hub import cached_commit

COMMITS = ["0" * 39 + "1", "0" * 39 + "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a directory with a model, one with a tied head, and an adapter of LoRA with a head that was trained whole."""
    directory = tmp_path_factory.mktemp("made")
    save_tiny(directory / "model", "qwen3")
    save_tiny(directory / "tied", "gemma")
    base = AutoModelForCausalLM.from_pretrained(directory / "model")
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(directory / "adapter")
    base = AutoModelForCausalLM.from_pretrained(directory / "model")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(directory / "plain")
    return directory


def copy_of(made: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / name, tmp_path / name))


def rewrite(path: Path, change) -> None:
    """Write the weights of a file again, under the names that `change` makes of them; `None` drops one."""
    kept = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in kept.items() if name}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model", "tied", "adapter"])
def test_what_was_saved_is_loaded(made, name):
    source = find_model(str(made / name))
    model = load_model(source, load_tokenizer(source))
    assert not hasattr(model, "peft_config")
    assert (source.base is not None) == (name == "adapter")
    if name == "tied":
        assert "lm_head.weight" not in load_file(made / name / "model.safetensors")
        check_weights(source)


LAYER_1 = "model.layers.1.mlp.down_proj.weight"
Q_1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A"


@pytest.mark.parametrize(
    ("name", "change", "phrases"),
    [
        ("model", lambda key: None if key == LAYER_1 else key, [f"not in the files: {LAYER_1}\n"]),
        ("model", lambda key: None, ["not in the files: lm_head.weight, model.embed_tokens.weight", "more"]),
        ("model", lambda key: f"module.{key}", ["without a place in the model: module.lm_head", "take it out"]),
        ("model", lambda key: f"_orig_mod.{key}", ["_orig_mod.lm_head.weight", "'_orig_mod.' in them"]),
        ("model", lambda key: key.replace("layers.1", "layers.2"), [LAYER_1, "model.layers.2.mlp.down_proj.weight"]),
        ("tied", lambda key: None if "embed" in key else key, ["not in the files", "model.embed_tokens.weight"]),
        ("plain", lambda key: None, [f"not in the files: {Q_1.replace('layers.1', 'layers.0')}"]),
        ("plain", lambda key: f"module.{key}", ["not in the files", "without a place in the model: module.base"]),
        ("adapter", lambda key: None, ["the files have no 'base_model.model.lm_head.weight'"]),
        ("adapter", lambda key: None if "lm_head" in key else key, ["no 'base_model.model.lm_head.weight'"]),
        ("adapter", lambda key: None if key.startswith(Q_1) else key, [f"not in the files: {Q_1}", "on its base"]),
        (
            "adapter",
            lambda key: key if "lm_head" in key else f"module.{key}",
            ["module.base_model.model", "take it out"],
        ),
        ("adapter", lambda key: key.replace(".lora_A", "._orig_mod.lora_A"), ["'_orig_mod.' in them"]),
        (
            "adapter",
            lambda key: key.replace("base_model.model.model.layers", "base_model.model.layers"),
            ["not in the"],
        ),
        (
            "adapter",
            lambda key: key.replace("layers.1", "layers.2"),
            ["layers.2.mlp", "layers.1.mlp.down_proj.lora_A"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(made, tmp_path, name, change, phrases):
    directory = copy_of(made, name, tmp_path)
    [path] = directory.glob("*model.safetensors")
    rewrite(path, change)
    source = find_model(str(directory))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_model(source)
    for phrase in [str(directory), *phrases]:
        assert phrase in str(caught.value)
    if source.base is None:
        # Without the weights, for an engine that loads them itself
        with pytest.raises(ValueError) as again:  # noqa: PT011
            check_weights(source)
        assert str(again.value) == str(caught.value)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model", LoraConfig(r=2, target_modules="all-linear", use_dora=True)),
        # Its projections are shared by the layers
        ("model", VeraConfig(target_modules=["q_proj"])),
        # On a head that is tied to the embeddings
        ("tied", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])),
        ("tied", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
        ("tied", LoraConfig(r=2, target_modules=["embed_tokens"])),
    ],
)
def test_a_merged_adapter_is_the_model_that_was_trained(made, tmp_path, name, config):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(made / name), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(tmp_path)
    merged = load_model(find_model(str(tmp_path)))
    ids = torch.arange(9)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    # As vLLM gets it
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(find_model(str(tmp_path / "merged")))
    torch.testing.assert_close(again(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_an_adapter_that_cannot_be_merged_is_refused(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING does not change the base's weights"):
        load_model(find_model(str(tmp_path)))


def test_more_keys_than_the_adapter_has_are_named(made, tmp_path):
    """As of a base with more layers."""
    directory = copy_of(made, "adapter", tmp_path)
    weights = load_file(directory / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    save_file({**weights, name: torch.zeros(2, 32)}, directory / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"without a place in the model: base_model\S*layers\.2\.self_attn\.q_proj"):
        load_model(find_model(str(directory)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 4, r"size mismatch for \S*q_proj\.lora_A"),
        ("target_modules", ["c_attn"], "the adapter cannot be loaded: No modules were targeted"),
        ("target_modules", ["q_proj", "down_proj", "v_proj"], r"not in the files: \S*v_proj\.lora_A"),
        ("peft_type", "NOPE", "cannot be loaded"),
    ],
)
def test_an_adapter_config_that_does_not_fit_its_weights_is_refused(made, tmp_path, field, value, message):
    directory = copy_of(made, "adapter", tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(find_model(str(directory)))
    assert str(directory) in str(caught.value)


def test_an_adapter_on_another_base_is_refused(made, tmp_path):
    save_tiny(tmp_path / "wide", "qwen3", hidden_size=48)
    save_tiny(tmp_path / "deep", "qwen3", num_hidden_layers=3)
    directory = copy_of(made, "adapter", tmp_path)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, message in (("wide", "size mismatch"), ("deep", r"not in the files: \S*layers\.2\.")):
        path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / base)}))
        with pytest.raises(ValueError, match=message):
            load_model(find_model(str(directory)))


@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        (
            "/nowhere/model",
            FileNotFoundError,
            "the base of the adapter '.*'='/nowhere/model': there is no such directory",
        ),
        ("nobody/nothing", ConnectionError, "the base of the adapter .*='nobody/nothing': HF_HUB_OFFLINE is set"),
        (None, ValueError, "names no base_model_name_or_path"),
        ("ADAPTER", ValueError, "is an adapter too"),
    ],
)
def test_an_adapter_whose_base_is_missing_names_it(made, tmp_path, monkeypatch, base, kind, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    directory = copy_of(made, "adapter", tmp_path)
    path = directory / "adapter_config.json"
    base = str(made / "adapter") if base == "ADAPTER" else base
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(kind, match=message):
        find_model(str(directory))


def test_an_adapter_without_weights_is_refused(made, tmp_path):
    directory = copy_of(made, "adapter", tmp_path)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights \(adapter_model.safetensors or adapter_model.bin\)"):
        find_model(str(directory))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model", "config.json"),
        ("model", "generation_config.json"),
        ("model", "tokenizer.json"),
        ("model", "tokenizer_config.json"),
        ("model", "model.safetensors"),
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_torn_file_is_named(made, tmp_path, name, file, part):
    directory = copy_of(made, name, tmp_path)
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=rf"model='{directory}': {file} is torn or damaged"):
        find_model(str(directory))


@pytest.mark.parametrize("name", ["model", "plain"])
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_torn_weights_in_torchs_own_format_are_named(made, tmp_path, name, part):
    directory = copy_of(made, name, tmp_path)
    [path] = directory.glob("*model.safetensors")
    weights = load_file(path)
    path.unlink()
    path = directory / {"model": "pytorch_model.bin", "plain": "adapter_model.bin"}[name]
    torch.save(weights, path)
    load_model(find_model(str(directory)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=rf"{path.name} is torn or damaged \(it was cut off\)"):
        find_model(str(directory))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "many", "its config cannot be loaded: .*hidden_size"),
        ("model_type", "nope", "its config cannot be loaded: .*`nope`"),
    ],
)
def test_a_config_that_is_not_a_models_is_named(made, tmp_path, field, value, message):
    directory = copy_of(made, "model", tmp_path)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"(?s)model='{directory}': {message}"):
        find_model(str(directory))


def test_another_size_is_named_with_the_shapes(made, tmp_path):
    directory = copy_of(made, "model", tmp_path)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    shapes = r"of another shape: model\.layers\.0\.mlp\.down_proj\.weight \(\[32, 48\] in the files, \[32, 64\] here\)"
    with pytest.raises(ValueError, match=shapes):
        load_model(find_model(str(directory)))


def test_a_torn_or_missing_shard_is_named(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(find_model(str(tmp_path)))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is torn or damaged"):
        find_model(str(tmp_path))
    shards[1].write_bytes(content)
    # An index of files in another format is often there without them
    other = tmp_path / "pytorch_model.bin.index.json"
    other.write_text('{"weight_map": {"a": "pytorch_model-00001.bin"}}')
    find_model(str(tmp_path))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {shards[1].name}, which does not exist"):
        find_model(str(tmp_path))


def test_a_directory_without_weights_is_refused(made, tmp_path):
    directory = copy_of(made, "model", tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a config\.json but no weights"):
        find_model(str(directory))


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """Return a function that makes the cache hold a directory as a commit of a Hub id; without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def push(name: str, directory: Path, commit: str) -> str:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(directory, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return name

    return push


def test_the_commit_of_a_hub_model_is_found(made, hub):
    for commit in COMMITS:
        name = hub("org/tiny", made / "model", commit)
        source = find_model(name)
        assert source.revision == commit == cached_commit(name)
        assert describe_weights(source) == {"model_revision": commit, "weights_sha256": None}
        load_model(source, load_tokenizer(source))
    assert cached_commit(name, COMMITS[0]) == COMMITS[0]
    for nothing in ("org/other", str(made / "model"), "/no/longer/there", "", None):
        assert cached_commit(nothing) is None


def test_an_adapter_is_found_by_its_hub_id(made, tmp_path, hub):
    directory = copy_of(made, "adapter", tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/base"}))
    hub("org/base", made / "model", COMMITS[0])
    source = find_model(hub("org/adapter", directory, COMMITS[1]))
    merged = load_model(source, load_tokenizer(source)).state_dict()
    for name, tensor in load_model(find_model(str(made / "adapter"))).state_dict().items():
        assert torch.equal(merged[name], tensor)
    assert describe_weights(source) == {
        "model_revision": COMMITS[1],
        "weights_sha256": None,
        "base_model": {"name": "org/base", "model_revision": COMMITS[0], "weights_sha256": None},
    }
    # The base alone was pushed again
    hub("org/base", made / "model", COMMITS[1])
    assert describe_weights(find_model("org/adapter")) != describe_weights(source)


def test_weights_that_are_not_in_the_cache_are_told_as_such(made, hub, tmp_path):
    directory = copy_of(made, "model", tmp_path)
    (directory / "model.safetensors").unlink()
    source = find_model(hub("org/half", directory, COMMITS[0]))
    with pytest.raises((ValueError, ConnectionError), match="org/half"):
        load_model(source)


def test_other_weights_have_another_digest(made, tmp_path):
    first = describe_weights(find_model(str(made / "adapter")))
    assert first["model_revision"] is None
    assert len(first["weights_sha256"]) == len(first["base_model"]["weights_sha256"]) == 64
    directory = copy_of(made, "adapter", tmp_path)
    rewrite(directory / "adapter_model.safetensors", lambda key: f"{key}.")
    assert describe_weights(find_model(str(directory)))["weights_sha256"] != first["weights_sha256"]


def test_the_tokenizer_is_the_adapters_own_if_it_has_one(made, tmp_path):
    directory = copy_of(made, "adapter", tmp_path)
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = "The adapter's. " + tokenizer.chat_template
    assert load_tokenizer(find_model(str(directory))).chat_template != tokenizer.chat_template
    tokenizer.save_pretrained(directory)
    assert load_tokenizer(find_model(str(directory))).chat_template == tokenizer.chat_template
