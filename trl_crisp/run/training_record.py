"""crisp_training.json, beside a trained model: what was trained, from what and how. It has no path of the machine."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp.run.files import write_json

RECORD_FILE = "crisp_training.json"
SCHEMA = "trl-crisp training"
SCHEMA_VERSION = 1
# Of `base`, which models.origin describes
_BASE_KEYS = {"source", "name", "hub_id", "revision"}


def write_record(directory: str | Path, record: dict[str, Any]) -> None:
    """Write a record into a model's directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORD_FILE, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **record})


def read_record(directory: str | Path) -> dict[str, Any] | None:
    """
    Return the record of a model's directory; `None` if there is none.

    A checkpoint without a record of its own has that of its run, with its own step.

    Raises:
        ValueError: If it is torn or of another schema.
    """
    directory = Path(directory)
    places, step = [directory], None
    prefix, _, number = directory.resolve().name.rpartition("-")
    if prefix == PREFIX_CHECKPOINT_DIR and number.isdigit():
        places.append(directory.resolve().parent)
        step = int(number)
    path = next((place / RECORD_FILE for place in places if (place / RECORD_FILE).is_file()), None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["schema"], record["schema_version"]
        if not set(record.get("base", _BASE_KEYS)) >= _BASE_KEYS:
            raise ValueError(f"its base is {record['base']!r}")
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
    return record if step is None else {**record, "step": step}
