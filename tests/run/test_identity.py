"""A run knows its own checkpoints among those of others, and what to do with the one of its last step."""

import json
import shutil

import pytest
import torch

from tests.helpers import make_trainer, parameters_of
from trl_crisp.run.checkpoints import keep_at_most
from trl_crisp.run.identity import own_checkpoints, resolve_checkpoint, run_id_of, saved_checkpoints, start_run

SAVING = {"save_strategy": "steps", "save_steps": 2}


class Killed(BaseException):
    """What a SIGKILL would do: nothing of ours handles it."""


def train_until(directory, step: int, **options):
    """Train a fresh run and end it without a word after a step."""
    trainer = make_trainer(directory, **{**SAVING, **options})
    compute_loss = trainer.compute_loss

    def compute_or_die(*args, **kwargs):
        if trainer.state.global_step == step:
            raise Killed
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = compute_or_die
    with pytest.raises(Killed):
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A finished run's directory, with its checkpoint-6."""
    directory = tmp_path_factory.mktemp("old")
    make_trainer(directory, max_steps=6, save_strategy="steps", save_steps=6, max_completion_length=2).train()
    return directory


@pytest.fixture
def among_others(old_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(old_run, directory)
    return directory


@pytest.mark.parametrize(("killed_at", "resumed_at"), [(1, 0), (3, 2)])
def test_a_fresh_run_among_the_checkpoints_of_another_resumes_its_own(among_others, capsys, killed_at, resumed_at):
    first = train_until(among_others, killed_at, max_steps=4)
    said = capsys.readouterr().out
    assert f"{among_others} has checkpoints of another run (checkpoint-6). This run starts afresh." in said
    resumed = make_trainer(among_others, max_steps=4, **SAVING)
    trained = []
    resumed.training_step = lambda *a, f=resumed.training_step, **k: (
        trained.append(resumed.state.global_step) or f(*a, **k)
    )
    resumed.train(resume_from_checkpoint=True)
    assert trained == list(range(resumed_at, 4))
    said = capsys.readouterr().out
    assert f"checkpoint-6 is skipped: it is of another run, {run_id_of(among_others / 'checkpoint-6')}." in said
    if resumed_at:
        assert resumed.run_id == first.run_id == run_id_of(among_others)
    assert [path.name for path in own_checkpoints(among_others)] == ["checkpoint-4", "checkpoint-2"]


def test_a_limit_counts_the_runs_own_checkpoints_alone(among_others):
    make_trainer(among_others, max_steps=3, **{**SAVING, "save_steps": 1}, save_total_limit=1).train()
    assert sorted(path.name for path in among_others.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_a_limit_holds_where_only_the_model_is_saved(among_others):
    fields = {**SAVING, "save_steps": 1, "save_total_limit": 1, "save_only_model": True}
    other = make_trainer(among_others, max_steps=2, **fields)
    other.train()
    assert sorted(path.name for path in among_others.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    # Cut off before its end, and one of TRL's: neither says whose it is
    unknown = among_others / "checkpoint-9"
    unknown.mkdir()
    (unknown / "trainer_state.json").write_text("{}")
    (among_others / "checkpoint-8").mkdir()

    # A whole checkpoint of the run stays the one that it can go on from
    fields["save_only_model"] = False
    whole = make_trainer(among_others, max_steps=3, **{**fields, "save_steps": 3})
    whole.train()
    later = make_trainer(among_others, max_steps=5, **{**fields, "save_only_model": True})
    later.train(resume_from_checkpoint=True)
    assert [path.name for path in saved_checkpoints(among_others, whole.run_id)] == ["checkpoint-5", "checkpoint-3"]
    assert [path.name for path in own_checkpoints(among_others)] == ["checkpoint-3"]
    left = {path.name for path in among_others.glob("checkpoint-*")}
    assert left == {f"checkpoint-{step}" for step in (2, 3, 5, 6, 8, 9)}


def test_the_checkpoint_of_the_last_step_is_loaded_and_not_trained_on(tmp_path):
    """A process killed between the last checkpoint and the final save."""
    whole = make_trainer(tmp_path, max_steps=3, **SAVING)
    whole.train()
    again = make_trainer(tmp_path, max_steps=3, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert again.teacher.state_dict()["completed_steps"] == whole.teacher.state_dict()["completed_steps"]
    for name, value in parameters_of(whole.model).items():
        assert torch.equal(parameters_of(again.model)[name], value), name
    again.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_a_checkpoint_past_the_last_step_is_an_error_that_names_both(among_others):
    with pytest.raises(ValueError, match=r"(?s)checkpoint-6' is of step 6, and this run ends at step 4\."):
        make_trainer(among_others, max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_a_refused_checkpoint_does_not_take_over_the_directory(among_others):
    own = start_run(among_others)
    with pytest.raises(ValueError, match=r"is of step 6, and this run ends at step 4"):
        make_trainer(among_others, max_steps=4, **SAVING).train(
            resume_from_checkpoint=str(among_others / "checkpoint-6")
        )
    assert run_id_of(among_others) == own


def test_another_runs_checkpoint_is_an_error_that_names_both(among_others, tmp_path):
    train_until(among_others, 3, max_steps=4)
    old, own = run_id_of(among_others / "checkpoint-6"), run_id_of(among_others / "checkpoint-2")
    named = str(among_others / "checkpoint-6")
    with pytest.raises(
        ValueError, match=rf"(?s)checkpoint-6' is of run {old}, and output_dir .* run {own}, whose last"
    ):
        resolve_checkpoint(named, among_others)
    # The user may mean it, and another directory may take the run over
    assert resolve_checkpoint(named, among_others, allowed=True) == named
    assert resolve_checkpoint(named, tmp_path / "elsewhere") == named
    # A directory that lost its note of whose it is
    (among_others / "_crisp_run.json").unlink()
    with pytest.raises(
        ValueError, match=rf"checkpoints of 2 runs .*checkpoint-2 is of run {own} and checkpoint-6 is of run {old}"
    ):
        resolve_checkpoint("true", among_others)


def test_a_run_that_resumes_elsewhere_keeps_its_id(old_run, tmp_path):
    make_trainer(tmp_path / "elsewhere", max_steps=7).train(resume_from_checkpoint=str(old_run / "checkpoint-6"))
    assert run_id_of(tmp_path / "elsewhere") == run_id_of(old_run)


def test_the_id_is_noted_beside_the_checkpoints_and_not_uploaded(tmp_path):
    run_id = start_run(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "_crisp_run.json").read_text()) == {"run_id": run_id}
    assert start_run(tmp_path / "run", run_id) == run_id != start_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("limit", "others", "kept"),
    [
        (None, (None,), "4321"),
        (0, (None,), "4321"),
        (2, (None,), "43"),
        (1, (None,), "4"),
        (1, (2,), "42"),
        (2, (2,), "42"),
        (3, (1,), "431"),
        (1, (2, 1), "421"),
        (2, (4, 1), "41"),
        (2, (1, 1), "41"),
    ],
)
def test_the_latest_and_those_that_are_named_are_kept(tmp_path, limit, others, kept):
    paths = [tmp_path / f"checkpoint-{step}" for step in (4, 3, 2, 1)]
    for path in paths:
        path.mkdir()
    keep_at_most(paths, limit, *(step and tmp_path / f"checkpoint-{step}" for step in others))
    assert sorted((path.name[-1] for path in tmp_path.iterdir()), reverse=True) == list(kept)
