"""crisp_training.json, beside a trained model: what was trained, from what and how. It has no path of the machine."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp.run.files import write_json

RECORD_FILE = "crisp_training.json"
SCHEMA = "trl-crisp training"
SCHEMA_VERSION = 1


def write_record(directory: str | Path, record: dict[str, Any]) -> None:
    """Write a record into a model's directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORD_FILE, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **record})


def read_record(directory: str | Path) -> dict[str, Any] | None:
    """
    Return the record of a model's directory, or of the run that a checkpoint belongs to; `None` if there is none.

    Raises:
        ValueError: If it is torn or of another schema.
    """
    directory = Path(directory)
    places = [directory]
    if directory.absolute().name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        places.append(directory.absolute().parent)
    path = next((place / RECORD_FILE for place in places if (place / RECORD_FILE).is_file()), None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["schema"], record["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is torn or no record of a training ({type(error).__name__}: {error}). Move it away, and the card says that nothing is "
            "known of the training."
        ) from error
    if found != (SCHEMA, SCHEMA_VERSION):
        raise ValueError(
            f"{path} has schema {found[0]!r}, version {found[1]}, and this trl-crisp reads {SCHEMA!r}, version {SCHEMA_VERSION}. Use the trl-crisp "
            "that wrote it."
        )
    return record
