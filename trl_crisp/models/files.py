"""Checks that the files of a model in a local directory are whole."""

import json
import zipfile
from pathlib import Path
from typing import Any

# The JSON files that transformers and PEFT read; other files are not checked
_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def check_model_files(directory: Path, subject: str) -> None:
    """
    Check that the files of a model or an adapter can be read, without loading the weights.

    Args:
        directory: A directory that `save_pretrained` wrote.
        subject: The user's name for it, for error messages.

    Raises:
        ValueError: If a file is torn; the message names it.
        FileNotFoundError: If weights are missing.
    """
    from safetensors import SafetensorError, safe_open

    def torn(path: Path, error: object) -> ValueError:
        return ValueError(
            f"{subject}: {path.name} is torn or damaged ({error}). Copy or download {path} again, or save the model again."
        )

    shards: set[str] = set()
    for name in _JSON_FILES:
        path = directory / name
        if not path.is_file():
            continue
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise torn(path, error) from error
        if not isinstance(content, dict):
            raise torn(path, f"it holds a {type(content).__name__}")
        if name.endswith(".index.json"):
            if not isinstance(content.get("weight_map"), dict):
                raise torn(path, "it has no weight_map")
            # The index of torch's format is used only without safetensors files, because it is often present without its shards
            if name.startswith("model.") or not (shards or any(directory.glob("*.safetensors"))):
                shards = set(map(str, content["weight_map"].values()))
    if missing := sorted(name for name in shards if not (directory / name).is_file()):
        raise FileNotFoundError(
            f"{subject}: the index of the weights names {', '.join(missing)}, which does not exist. Copy or download the rest of "
            "the model."
        )
    patterns = ("*.safetensors", "*.bin")
    if (directory / "config.json").is_file() and not any(any(directory.glob(pattern)) for pattern in patterns):
        raise FileNotFoundError(
            f"{subject}: the directory has a config.json but no weights (*.safetensors). Give the directory that save_pretrained "
            "wrote."
        )
    for name in (*_WEIGHTS_FILES, *sorted(shards)):
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix == ".bin":
            # A zip archive has its table of contents at its end. Files of old versions of torch are not zip archives
            with path.open("rb") as file:
                is_archive = file.read(4) == b"PK\x03\x04"
            if path.stat().st_size == 0 or (is_archive and not zipfile.is_zipfile(path)):
                raise torn(path, "it was cut off")
            continue
        try:
            # safe_open reads the header and compares it with the file's size
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise torn(path, error) from error
