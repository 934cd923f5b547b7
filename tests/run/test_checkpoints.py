"""Which checkpoints a run can go on from: whole ones, of the same run."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers import config, make_trainer, parameters_of
from tests.tiny_models import tiny_model
from trl_crisp.rows.hub import cached_commit
from trl_crisp.run.checkpoints import checkpoints_in, find_fault, remove_torn, seal
from trl_crisp.run.files import write_json
from trl_crisp.run.identity import (
    check_same_run,
    describe_run,
    differences,
    fingerprint,
    last_own_checkpoint,
    resolve_checkpoint,
)

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def make_checkpoint(directory: Path, step: int) -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "global_step" / "shard.pt").write_bytes(b"optimizer")
    seal(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    return checkpoint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda c: None, None),
        (lambda c: (c / "trainer_state.json").unlink(), r"its trainer_state\.json is missing or torn"),
        (lambda c: cut(c / "trainer_state.json"), r"its trainer_state\.json is missing or torn"),
        (lambda c: (c / "checkpoint_files.json").unlink(), r"its checkpoint_files\.json is missing or torn"),
        (lambda c: (c / "model.safetensors").unlink(), r"its model\.safetensors is missing"),
        (lambda c: cut(c / "global_step" / "shard.pt"), r"its global_step/shard\.pt has 8 bytes instead of 9"),
    ],
)
def test_a_torn_checkpoint_is_detected(tmp_path, damage, fault):
    checkpoint = make_checkpoint(tmp_path, 4)
    damage(checkpoint)
    found = find_fault(checkpoint)
    assert found is None if fault is None else re.search(fault, found or "")


def test_resuming_takes_the_last_whole_checkpoint(tmp_path, capsys):
    assert last_own_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10, 4):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-last").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-4", "checkpoint-2"]
    assert last_own_checkpoint(tmp_path) == tmp_path / "checkpoint-10"

    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    assert last_own_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert resolve_checkpoint(True, tmp_path) == resolve_checkpoint("true", tmp_path) == str(tmp_path / "checkpoint-4")
    said = capsys.readouterr().out
    assert "checkpoint-10 is skipped: its model.safetensors is missing" in said
    assert f"resuming from {tmp_path}/checkpoint-4" in said


def test_without_a_whole_checkpoint_training_starts_afresh(tmp_path, capsys):
    torn = make_checkpoint(tmp_path, 2)
    (torn / "trainer_state.json").unlink()
    assert resolve_checkpoint(True, tmp_path) is None
    said = capsys.readouterr().out
    assert "checkpoint-2 is skipped" in said
    assert "no whole checkpoint of this run yet, so training starts afresh" in said


@pytest.mark.parametrize("value", [None, "False", "false", False, "none"])
def test_values_that_mean_no_resume_ignore_checkpoints(tmp_path, value):
    make_checkpoint(tmp_path, 2)
    assert resolve_checkpoint(value, tmp_path) is None


def test_a_given_path_is_resumed_if_it_is_whole(tmp_path):
    whole, torn = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 6)
    cut(torn / "model.safetensors")
    assert resolve_checkpoint(str(whole), tmp_path / "elsewhere") == str(whole)
    with pytest.raises(
        ValueError, match=r"(?s)checkpoint-6' cannot be resumed.*6 bytes.*last whole checkpoint .*checkpoint-4"
    ):
        resolve_checkpoint(str(torn), tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)'nowhere'.*no such directory.*checkpoint-4.*true for the last checkpoint"
    ):
        resolve_checkpoint("nowhere", tmp_path)


def test_only_a_torn_checkpoint_is_removed(tmp_path):
    whole, torn = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 6)
    cut(torn / "model.safetensors")
    for path in (whole, torn, tmp_path / "checkpoint-8"):
        remove_torn(path)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4"]


def test_json_that_is_cut_off_while_it_is_written_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    write_text = Path.write_text

    def cut_off(path, text, **options):
        write_text(path, text[:3], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_fingerprint_is_of_the_base_model_and_its_values():
    model = tiny_model("llama")
    before = fingerprint(model)
    assert before == fingerprint(tiny_model("llama")) != fingerprint(tiny_model("qwen3"))
    # An adapter is not the model that the run began with
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(**LORA))
    with torch.no_grad():
        base = fingerprint(adapted)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    assert fingerprint(adapted) == base
    # A step of the optimizer is seen, in bfloat16 too
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert fingerprint(model) != before
    assert fingerprint(model.bfloat16()) != before


def test_fields_that_differ_from_the_checkpoint_are_listed(tmp_path, capsys):
    def run(**overrides):
        return describe_run(
            tiny_model("llama"), config(tmp_path, **overrides), overrides.get("instruction", "Be brief.")
        )

    saved = run()
    assert differences(saved, run(learning_rate=1e-3, max_completion_length=4)) == []
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    write_json(checkpoint / "crisp_run.json", {"run": saved})
    check_same_run(checkpoint, run(), allowed=False)

    other = run(instruction="Be terse.", teacher_sync_steps=7)
    with pytest.raises(
        ValueError, match=r"(?s)instruction: 'Be brief.' .*'Be terse.' now.*teacher_sync_steps: .*7 now"
    ) as e:
        check_same_run(checkpoint, other, allowed=False)
    assert "teacher_model_kind" not in str(e.value)
    assert "allow_changed_resume=True" in str(e.value)
    check_same_run(checkpoint, other, allowed=True)
    assert "resuming with other settings" in capsys.readouterr().out


def test_another_model_or_adapter_is_refused_on_resuming(tmp_path):
    args = config(tmp_path)
    llama = describe_run(tiny_model("llama"), args, "")
    assert differences(llama, describe_run(tiny_model("qwen3"), args, ""))[0].startswith("model: ")
    adapters = [
        describe_run(get_peft_model(tiny_model("llama"), LoraConfig(**{**LORA, "r": r})), args, "") for r in (2, 3)
    ]
    (line,) = differences(*adapters)
    assert re.match(r"lora: .*'r': 2.*'r': 3", line)
    # The same weights in another directory are the same model; where they are not known the name decides
    moved = {**llama, "model": {**llama["model"], "name": "elsewhere"}}
    assert differences(llama, moved) == []
    sharded = [{**run, "model": {**run["model"], "weights": None}} for run in (llama, moved)]
    assert differences(*sharded)[0].startswith("model: ")


def test_the_commit_of_a_hub_model_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    commits = {"main": "0" * 39 + "1", "older": "0" * 39 + "2"}
    for revision, commit in commits.items():
        tiny_model("llama").save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    model = tiny_model("llama")
    model.config._name_or_path = "org/tiny"
    runs = {
        revision: describe_run(model, config(tmp_path), "", cached_commit("org/tiny", given))
        for revision, given in (("main", None), ("older", "older"))
    }
    assert {revision: run["model"]["revision"] for revision, run in runs.items()} == commits
    assert differences(runs["main"], runs["older"]) == []
    # Where the weights are not known, the commit decides
    sharded = [{**run, "model": {**run["model"], "weights": None}} for run in runs.values()]
    assert differences(*sharded)[0].startswith(f"model: 'org/tiny' (revision {commits['main']}")


@pytest.mark.parametrize(("before", "after"), [("periodic", "base"), ("live", "periodic"), ("periodic", "live")])
def test_going_on_with_another_schedule_takes_the_state_over(tmp_path, before, after):
    """Where the user allows it: a saved teacher's weights stay, and one that was the student begins as the student."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    steps = {"periodic": {"teacher_sync_steps": 2}}
    first = make_trainer(tmp_path, teacher_model_kind=before, **steps.get(before, {}), **options)
    first.train()
    with pytest.raises(ValueError, match=rf"(?s)teacher_model_kind: '{before}' in the checkpoint, '{after}' now"):
        make_trainer(tmp_path, teacher_model_kind=after, **options).train(resume_from_checkpoint=True)

    # It goes on from step 3, where nothing is left to do but to load
    second = make_trainer(tmp_path, teacher_model_kind=after, allow_changed_resume=True, **options)
    second.train(resume_from_checkpoint=True)
    expected = first.teacher.state_dict()["weights"] if before == "periodic" else parameters_of(first.model)
    found = second.teacher.state_dict()["weights"]
    assert bool(found) is (after != "live")
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert second.teacher.refreshes == first.teacher.refreshes
