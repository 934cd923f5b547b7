"""Whether the files of a model in a local directory are whole."""

import json
from pathlib import Path
from typing import Any

_INDEX = "model.safetensors.index.json"


def check_model_files(directory: Path, subject: str) -> None:
    """
    Check that the model's files can be read, without loading its weights.

    Args:
        directory: What `save_pretrained` wrote.
        subject: What the user calls it, for the messages.

    Raises:
        ValueError: For a file that is torn; it is named.
        FileNotFoundError: Where weights are missing.
    """
    from safetensors import SafetensorError, safe_open

    def torn(path: Path, error: object) -> ValueError:
        return ValueError(
            f"{subject}: {path.name} is torn or damaged ({error}). Copy or download {path} again, or save the model again."
        )

    contents: dict[str, Any] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            contents[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise torn(path, error) from error
    shards = set(contents[_INDEX].get("weight_map", {}).values()) if isinstance(contents.get(_INDEX), dict) else set()
    if missing := sorted(name for name in shards if not (directory / name).is_file()):
        raise FileNotFoundError(
            f"{subject}: {_INDEX} names {', '.join(missing)}, and there is no such file. Copy or download the rest of the model."
        )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights and not any(directory.glob("*.bin")):
        raise FileNotFoundError(
            f"{subject}: the directory has a config.json and no weights (*.safetensors). Give the directory that save_pretrained "
            "wrote."
        )
    for path in weights:
        try:
            # Reads the header, and compares it with the file's size
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise torn(path, error) from error
