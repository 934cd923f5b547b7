"""Rollouts are the run's own sampling; what is saved is the model's own generation config."""

import json

import pytest
import torch
from peft import LoraConfig

from tests.helpers import make_trainer, rows
from tests.tiny_models import tiny_model

OWN = {
    "min_p": 0.9,
    "typical_p": 0.1,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(40, 120)),
    "begin_suppress_tokens": list(range(40, 120)),
    "sequence_bias": [[[65], 50.0]],
    "bad_words_ids": [[i] for i in range(64, 200)],
    "min_new_tokens": 12,
    "min_length": 1000,
    "num_beams": 3,
    "guidance_scale": 3.0,
    "exponential_decay_length_penalty": [1, 9.0],
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.9,
    "forced_eos_token_id": 70,
    "stop_strings": ["a", "e", "i"],
    "max_time": 1e-9,
}


def rollouts(directory, lora: bool = False, **own):
    # Logits as flat as those of a model that may say anything
    model = tiny_model(scale=1.0)
    # Answers end soon, so that a shortest length shows
    model.generation_config.eos_token_id = list(range(64))
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    if own:
        model.generation_config.do_sample = True
    trainer = make_trainer(
        directory,
        model=model,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
        max_completion_length=12,
        dataset=rows(4),
    )
    trainer.model.train()
    completions = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))["completion_ids"]
    return completions, trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return {lora: rollouts(tmp_path_factory.mktemp("plain"), lora)[0] for lora in (False, True)}


@pytest.mark.parametrize("name", OWN)
def test_no_value_of_the_models_own_shapes_rollouts(tmp_path, plain, name):
    completions, trainer = rollouts(tmp_path, **{name: OWN[name]})
    assert torch.equal(completions, plain[False])
    assert getattr(trainer.model.generation_config, name) == OWN[name]


def test_no_value_of_an_adapters_base_shapes_rollouts_and_its_own_are_saved(tmp_path, plain):
    completions, trainer = rollouts(tmp_path, lora=True, min_p=0.9, no_repeat_ngram_size=1)
    assert torch.equal(completions, plain[True])
    trainer.model.get_base_model().generation_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["min_p"], saved["no_repeat_ngram_size"]) == (0.9, 1)


def test_the_runs_generation_kwargs_shape_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, generation_kwargs={"suppress_tokens": list(range(1, 256))}, dataset=rows(4))
    trainer.model.train()
    completions = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))["completion_ids"]
    assert not ((completions >= 1) & (completions < 256)).any()
