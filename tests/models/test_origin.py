"""What a model comes from is told without a path, and its licence only as its card has it."""

from pathlib import Path

import pytest

from trl_crisp.models.origin import describe_origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_card(directory: Path, metadata: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n", encoding="utf-8")
    return directory


def test_a_hub_id_keeps_its_commit():
    origin = describe_origin("Qwen/Qwen3-0.6B", COMMIT)
    assert origin == {"source": "hub", "name": "Qwen/Qwen3-0.6B", "hub_id": "Qwen/Qwen3-0.6B", "revision": COMMIT}


@pytest.mark.parametrize("end", ["", "/"])
def test_a_directory_of_the_hubs_cache_is_the_hubs_model(tmp_path, end):
    path = write_card(tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT, "license: apache-2.0")
    assert describe_origin(f"{path}{end}") == {
        "source": "hub",
        "name": "Qwen/Qwen3-0.6B",
        "hub_id": "Qwen/Qwen3-0.6B",
        "revision": COMMIT,
        "license": "apache-2.0",
    }


@pytest.mark.parametrize("as_typed", ["{}", "{}/", "{}/../model"])
def test_a_directory_has_its_name_alone(tmp_path, as_typed, monkeypatch):
    (tmp_path / "model").mkdir()
    origin = describe_origin(as_typed.format(tmp_path / "model"))
    assert origin == {"source": "directory", "name": "model", "hub_id": None, "revision": None}


def test_a_relative_directory_that_looks_like_a_hub_id_is_a_directory(tmp_path, monkeypatch):
    (tmp_path / "me" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert describe_origin("me/model")["source"] == "directory"
    monkeypatch.chdir(tmp_path / "me" / "model")
    assert describe_origin(".")["name"] == "model"


def test_a_directory_that_is_gone_is_still_no_hub_id():
    assert describe_origin("/gone/me/model") == {
        "source": "directory",
        "name": "model",
        "hub_id": None,
        "revision": None,
    }


def test_a_model_in_memory_is_told_by_its_kind():
    assert describe_origin("", None, "qwen3")["name"] == "a qwen3 model that was made in memory"
    assert describe_origin(None)["name"] == "a model that was made in memory"


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: own\nlicense_link: https://own.org/license",
            {"license": "other", "license_name": "own", "license_link": "https://own.org/license"},
        ),
        # A file of a directory is nowhere for a reader
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", {"license": "other", "license_name": "own"}),
        ("tags: [x]", {}),
        ("license_name: own", {}),
        ("license: [a", {}),
        ("- a list", {}),
    ],
)
def test_the_licence_is_the_cards_or_none(tmp_path, metadata, found):
    origin = describe_origin(str(write_card(tmp_path / "model", metadata)))
    assert {key: value for key, value in origin.items() if key.startswith("license")} == found


def test_the_licence_of_a_hub_model_is_read_from_the_cache(tmp_path, monkeypatch):
    snapshot = write_card(
        tmp_path / "models--org--model" / "snapshots" / COMMIT,
        "license: other\nlicense_name: own\nlicense_link: LICENSE",
    )
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    origin = describe_origin("org/model")
    assert origin["license"] == "other"
    assert origin["license_link"] == "https://huggingface.co/org/model/blob/main/LICENSE"
