"""A merged model is its adapter on the base, in the base's dtype, or nothing is written."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp.cli import main
from trl_crisp.evaluation.loading import describe_weights, find_model
from trl_crisp.publish.folder import make_folder
from trl_crisp.publish.merging import describe_merge, merge_adapter
from trl_crisp.run.training_record import read_record, write_record

LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def save_base(path: Path, kind: str = "qwen3", dtype: torch.dtype = torch.float32) -> Path:
    model = tiny_model(kind).to(dtype)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=model.config.eos_token_id)
    model.save_pretrained(path)
    tiny_tokenizer(kind).save_pretrained(path)
    return path


def save_adapter(path: Path, base: Path, config: LoraConfig = LORA, size: float = 0.1) -> Path:
    """Save an adapter whose trained weights are moved at random by `size`."""
    torch.manual_seed(0)
    # PEFT writes the name of the base into the config
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def float32_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_merge_is_the_float32_merge_rounded_once(tmp_path, dtype):
    base = save_base(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(tmp_path / "adapter", base)
    merged = merge_adapter(str(adapter), tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    expected = float32_merge(base, adapter)
    assert saved.config.dtype == merged.dtype == dtype
    assert saved.state_dict().keys() == expected.keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert merged.merging_distance < 1e-5 < merged.adapter_distance
    assert (merged.rounding_distance == merged.merging_distance) == (dtype is torch.float32)
    assert not merged.is_lost_in_rounding


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("qwen3", LoraConfig(r=2, target_modules="all-linear", use_dora=True)),
        ("qwen3", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ("llama", LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"], use_rslora=True, lora_dropout=0.5)),
        # On a head that is tied to the embeddings
        ("gemma", LoraConfig(r=2, target_modules=["embed_tokens"])),
        ("gemma", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])),
    ],
)
def test_the_logits_are_those_of_the_adapter(tmp_path, kind, config):
    base = save_base(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, config)
    from peft import PeftModel

    merge_adapter(str(adapter), tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(9)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_weights_of_another_dtype_keep_it(tmp_path):
    """A base may keep some weights in float32."""
    model = tiny_model("qwen3").to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer("qwen3").save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base")
    merge_adapter(str(adapter), tmp_path / "merged")
    dtypes = [
        {
            name: tensor.dtype
            for name, tensor in AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict().items()
        }
        for path in (tmp_path / "base", tmp_path / "merged")
    ]
    assert dtypes[0] == dtypes[1]


def test_tokenizer_and_generation_config_come_along(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapter(str(adapter), tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == tiny_tokenizer("qwen3").chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "merged").temperature == 0.6
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_sampling_values_without_do_sample_are_saved(tmp_path):
    """transformers loads such a generation config, and refuses to write it."""
    base = save_base(tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "eos_token_id": 1}))
    adapter = save_adapter(tmp_path / "adapter", base)
    with pytest.warns(UserWarning, match="do_sample"):
        merge_adapter(str(adapter), tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").temperature == 0.6


def test_a_merge_that_changes_the_logits_is_refused(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.1 * right(self, name))
    with pytest.raises(ValueError, match=r"logits differ from those of the adapter .* Nothing was written"):
        merge_adapter(str(adapter), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_files_that_do_not_hold_the_merged_weights_are_refused(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    load = AutoModelForCausalLM.from_pretrained

    def spoil(path, *args, **kwargs):
        model = load(path, *args, **kwargs)
        if Path(str(path)).name.startswith(".merging"):
            model.lm_head.weight.data[0, 0] += 1
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spoil)
    with pytest.raises(ValueError, match=r"does not come back from its files: lm_head\.weight differs"):
        merge_adapter(str(adapter), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_that_rounding_blurs_gets_a_warning(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, size=1e-5)
    merged = merge_adapter(str(adapter), tmp_path / "merged")
    assert merged.is_lost_in_rounding
    assert "rounding to bfloat16 blurs it" in describe_merge(merged, "adapter")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: (path / "x").mkdir(parents=True),
            "the directory has files, and a merge never writes over a model",
        ),
        (lambda path: path.write_text(""), "is a file. Give a new directory"),
        (lambda path: path.symlink_to(path.parent / "gone"), "is a link to nothing. Give a new directory"),
    ],
)
def test_an_output_that_is_in_use_is_refused_before_anything_is_loaded(tmp_path, make, message):
    make(tmp_path / "merged")
    with pytest.raises(ValueError, match=message):
        merge_adapter("no/such/adapter", tmp_path / "merged")


def test_an_output_below_a_file_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "notes").write_text("")
    with pytest.raises(ValueError, match=r"notes is a file. Give a new directory"):
        merge_adapter("no/such/adapter", tmp_path / "notes" / "deep" / "merged")


@pytest.mark.parametrize("kind", ["link", "here"])
def test_an_empty_directory_is_filled_and_not_replaced(tmp_path, monkeypatch, kind):
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    before = (tmp_path / "place").stat().st_ino
    merge_adapter(str(adapter), Path(".") if kind == "here" else tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "place").stat().st_ino == before
    names = {path.name for path in (tmp_path / "place").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_a_merge_of_an_adapter_without_a_record_keeps_its_base(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "TinyBase"))
    merge_adapter(str(adapter), tmp_path / "merged")
    text = (make_folder(tmp_path / "merged", "me/model").path / "README.md").read_text()
    assert "This is a model from TinyBase. Its directory has no record of how it was trained." in text
    assert "## Training" not in text


def test_a_whole_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a whole model, so there is nothing to merge"):
        merge_adapter(save_tiny(tmp_path / "model"), tmp_path / "merged")


def test_the_command_merges_into_an_empty_directory_and_keeps_the_record(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run" / "checkpoint-2", base)
    write_record(tmp_path / "run", {"instruction": "Be brief, please."})
    (tmp_path / "merged").mkdir()
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert "Checked by logits: merging in float32 changed them by" in capsys.readouterr().out
    record = read_record(tmp_path / "merged")
    assert (record["instruction"], record["step"]) == ("Be brief, please.", 2)
    assert record["merged_from"] == {
        "model_revision": None,
        "weights_sha256": describe_weights(find_model(str(adapter)))["weights_sha256"],
    }


def test_the_command_tells_an_error_in_words(tmp_path, capsys):
    assert main(["merge", str(tmp_path / "nothing"), "--output", str(tmp_path / "merged")]) == 2
    assert "trl-crisp merge: error: adapter=" in capsys.readouterr().err
