"""One process at a time in a directory, which is left as it was found."""

import errno
import fcntl
import os

import pytest

from trl_crisp.evaluation.locking import locked


def test_a_directory_that_is_in_use_names_who_has_it(tmp_path):
    with locked(tmp_path):
        message = f"output '{tmp_path}' is in use by process {os.getpid()} on .*give another --output"
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
        # The one that has it keeps it
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_directories_that_nothing_was_put_into_are_removed_again(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_lock_file_that_was_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """The one before removes its file between the opening and the locking here: that lock would be of no file."""
    flock, calls = fcntl.flock, []

    def remove_first(file, operation):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(file)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is in use"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .*keeps a second evaluation out"), locked(tmp_path):
        (tmp_path / "samples.jsonl").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
