"""Checks early that the model that the user names can be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_crisp.models.files import check_model_files
from trl_crisp.rows.hub import raise_for_hub


def check_model(
    name: str | None, revision: str, trust_remote_code: bool, field_name: str = "model_name_or_path"
) -> str:
    """
    Check that the model can be loaded, by its config and, if it is local, its files, and return its name.

    Args:
        name: A Hub id, or a directory.
        revision: The revision of the Hub id.
        trust_remote_code: As in transformers.
        field_name: The user's name for the argument, for error messages.

    Raises:
        ValueError: If no model is named, or a local model has torn files.
        FileNotFoundError: If the directory, the model or the revision does not exist.
        PermissionError, ConnectionError: See [`~trl_crisp.rows.hub.raise_for_hub`].
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
        check_model_files(path, f"{field_name}={name!r}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{field_name}={name!r}: there is no such directory (looked for {path.absolute()}). Check the path; "
            "a model on the Hub is named OWNER/NAME."
        )
    with loading_errors_named(name, "its config", field_name):
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return name


def check_tokenizer(name: str, trust_remote_code: bool) -> None:
    """
    Check that the tokenizer of a local model can be loaded.

    Raises:
        ValueError: If it cannot be loaded; the message gives the reason.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        with loading_errors_named(name, "its tokenizer", "model_name_or_path"):
            AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


@contextmanager
def loading_errors_named(name: str, what: str, field_name: str = "model") -> Iterator[None]:
    """
    Turn errors of loading a part of a model inside this context into errors that name the model.

    Args:
        name: A Hub id, or a directory.
        what: The part that is loaded, for error messages.
        field_name: The user's name for the model.

    Raises:
        ValueError: For errors of transformers, PEFT and the file readers.
        FileNotFoundError, PermissionError, ConnectionError: See [`~trl_crisp.rows.hub.raise_for_hub`].
        ImportError: If a package that the model needs is missing.
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
            # PEFT raises this if the weights of a fully trained module are missing
            reason = f"the files have no {error}"
        raise ValueError(f"{field_name}={name!r}: {what} cannot be loaded: {reason}") from error
