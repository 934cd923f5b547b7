"""Whether the model that the user names can be had, before anything heavy begins."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_crisp.data import raise_for_hub

# What transformers and PEFT read as JSON
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
)

_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def check_model(
    name: str | None, revision: str, trust_remote_code: bool, field_name: str = "model_name_or_path"
) -> str:
    """
    Check that the model can be had, by reading its config, and return its name.

    Args:
        name: A Hub id, or a directory.
        revision: Of the Hub id.
        trust_remote_code: As transformers' own.
        field_name: What the user calls it, for the messages.

    Raises:
        ValueError: Where no model is named, and for a directory whose files are torn.
        FileNotFoundError: Where there is no such directory, model or revision.
        PermissionError, ConnectionError: See [`~trl_crisp.data.raise_for_hub`].
    """
    from transformers import AutoConfig

    if not name:
        raise ValueError(
            f"no model: set {field_name} to a model on the Hub, such as Qwen/Qwen3-8B, or to a local directory."
        )
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{field_name}={name!r}: the directory has no config.json, so it holds no model. Give the "
                "directory that save_pretrained wrote; merge an adapter into its base model first."
            )
        check_model_files(path)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{field_name}={name!r}: there is no such directory (looked for {path.absolute()}). Check the path; "
            "a model on the Hub is named OWNER/NAME."
        )
    with loading_errors_named(name, "its config", field_name):
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return name


@contextmanager
def loading_errors_named(name: str, what: str, field_name: str = "model") -> Iterator[None]:
    """
    Let what loads a part of a model inside this context raise an error that names the model.

    Args:
        name: A Hub id, or a directory.
        what: Is loaded, for the messages.
        field_name: What the user calls the model.

    Raises:
        ValueError: For what transformers, PEFT and the readers of files raise.
        FileNotFoundError, PermissionError, ConnectionError: See [`~trl_crisp.data.raise_for_hub`].
        ImportError: Where a package is missing that the model needs.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError and name in str(error):
            raise
        if not Path(name).is_dir():
            try:
                raise_for_hub(error, "model", name, field_name)
            except Exception as told:
                if told is not error:
                    raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError) and str(error).startswith("'base_model."):
            # PEFT's, of a module that was trained whole
            reason = f"the files have no {error}"
        raise ValueError(f"{field_name}={name!r}: {what} cannot be loaded: {reason}") from error


def check_model_files(directory: Path) -> None:
    """
    Check that a model's or an adapter's files are whole, by their structure; the weights themselves are not read.

    Raises:
        ValueError: For a JSON file that is none, and a file of weights that is none or was cut off.
        FileNotFoundError: For a shard that the index names and that is not there.
    """
    from safetensors import SafetensorError, safe_open

    again = "Copy or save the model again."
    shards: set[str] = set()
    for name in _JSON_FILES:
        path = directory / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}. {again}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} has to hold a JSON object; it holds a {type(content).__name__}. {again}")
        if name.endswith(".index.json") and not (directory / name.removesuffix(".index.json")).is_file():
            weight_map = content.get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{path} has no weight_map, so the shards are unknown. {again}")
            # transformers takes the first index that is there
            shards = shards or set(map(str, weight_map.values()))
    if missing := sorted(name for name in shards if not (directory / name).is_file()):
        raise FileNotFoundError(
            f"{directory}: the index of the weights names {', '.join(missing)}, and there is no such file. {again}"
        )
    for name in (*_WEIGHTS_FILES, *sorted(shards)):
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix == ".bin":
            # A zip archive, whose table of contents is at its end; those of old versions of torch are none
            with path.open("rb") as file:
                is_archive = file.read(4) == b"PK\x03\x04"
            if path.stat().st_size == 0 or (is_archive and not zipfile.is_zipfile(path)):
                raise ValueError(f"{path} cannot be read as torch's: it was cut off. {again}")
        else:
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as safetensors: {error}. {again}") from error
