"""The token ids of a benchmark's prompts are those that training makes of the same prompt."""

import pytest

from tests.helpers import make_trainer, rows
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.prompts import prompt_token_ids

MESSAGES = [{"role": "user", "content": "3 + 4"}]


@pytest.mark.parametrize("prompt", [MESSAGES, "3 + 4"])
def test_a_whole_prompt_is_read_as_in_training(tmp_path, prompt):
    trainer = make_trainer(tmp_path, dataset=rows(4))
    (trained,), *_ = trainer._tokenize_prompts([prompt])
    (ids,) = prompt_token_ids([Problem("0", prompt, "7", is_whole_prompt=True)], "", trainer.processing_class)
    assert ids == list(trained)


@pytest.mark.parametrize(
    ("prompt", "words"), [("3 + 4", "is a text"), ([{"role": "system", "content": "s"}, *MESSAGES], "has a system")]
)
def test_a_system_message_needs_its_place(tmp_path, prompt, words):
    trainer = make_trainer(tmp_path, dataset=rows(4))
    with pytest.raises(ValueError, match=f"problem '0' {words}.*Leave it out"):
        prompt_token_ids([Problem("0", prompt, "7", is_whole_prompt=True)], "", trainer.processing_class, system="s")
