"""What a run saves at its end is tried before its start; an error while saving names no cause that was not checked."""

import errno
import json

import pytest
from peft import LoraConfig

from tests.helpers import make_trainer
from tests.tiny_models import save_tiny, tiny_model


def model_with(tmp_path, **generation):
    path = save_tiny(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_sampling_values_without_do_sample_are_completed(tmp_path):
    with pytest.warns(UserWarning, match="saved with do_sample=True"):
        trainer = make_trainer(tmp_path / "run", model=model_with(tmp_path, temperature=0.6, top_p=0.9))
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)


@pytest.mark.parametrize(
    "generation",
    [{"do_sample": False, "temperature": 0.6}, {"early_stopping": True}, {"length_penalty": 2.0}],
    ids=lambda value: next(iter(value)),
)
def test_a_generation_config_that_cannot_be_written_is_refused_at_construction(tmp_path, generation):
    with pytest.raises(ValueError, match=r"(?s)model cannot be saved as it is.*Correct its generation_config before"):
        make_trainer(tmp_path / "run", model=model_with(tmp_path, **generation))


def test_an_adapters_run_does_not_write_the_base_models_generation_config(tmp_path):
    trainer = make_trainer(
        tmp_path / "run",
        model=model_with(tmp_path, early_stopping=True),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_a_config_that_cannot_be_written_is_refused_at_construction(tmp_path):
    model = tiny_model()
    model.config.my_own = object()
    with pytest.raises(ValueError, match=r"(?s)model cannot be saved as it is.*not JSON serializable"):
        make_trainer(tmp_path, model=model)


@pytest.mark.parametrize(
    ("error", "is_disk"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (ValueError("a tensor of the wrong shape"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
    ],
    ids=["full", "full-safetensors", "value", "permission"],
)
def test_the_disk_is_named_if_it_is_full_and_not_otherwise(tmp_path, monkeypatch, error, is_disk):
    def fail(self, output_dir=None, state_dict=None):
        raise error

    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    monkeypatch.setattr("transformers.Trainer._save", fail)
    with pytest.raises(type(error)) as raised:
        trainer.train()
    (note,) = raised.value.__notes__
    assert f"Saving {tmp_path}/checkpoint-2 failed, so training stopped" in note
    assert "No checkpoint is whole" in note
    assert ("The disk is full" in note) is is_disk
