"""Whether the model that the user names can be had, before anything heavy begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_crisp.models.files import check_model_files
from trl_crisp.rows.hub import raise_for_hub


def check_model(
    name: str | None, revision: str, trust_remote_code: bool, field_name: str = "model_name_or_path"
) -> str:
    """
    Check that the model can be had, by reading its config and, of a local one, its files, and return its name.

    Args:
        name: A Hub id, or a directory.
        revision: Of the Hub id.
        trust_remote_code: As transformers' own.
        field_name: What the user calls it, for the messages.

    Raises:
        ValueError: Where no model is named, and for a local one whose files are torn.
        FileNotFoundError: Where there is no such directory, model or revision.
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
        ValueError: If it cannot, with the reason.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        with loading_errors_named(name, "its tokenizer", "model_name_or_path"):
            AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


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
        FileNotFoundError, PermissionError, ConnectionError: See [`~trl_crisp.rows.hub.raise_for_hub`].
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
