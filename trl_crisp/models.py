"""Whether the model that the user names can be had, before anything heavy begins."""

from pathlib import Path

from trl_crisp.data import raise_for_hub
from trl_crisp.model_files import check_model_files


def check_model(name: str | None, revision: str, trust_remote_code: bool) -> str:
    """
    Check that the model can be had, by reading its config and, of a local one, its files, and return its name.

    Raises:
        ValueError: Where no model is named, and for a local one whose files are torn.
        FileNotFoundError: Where there is no such directory, model or revision.
        PermissionError, ConnectionError: See [`~trl_crisp.data.raise_for_hub`].
    """
    from transformers import AutoConfig, AutoTokenizer

    if not name:
        raise ValueError(
            "no model: set model_name_or_path to a model on the Hub, such as Qwen/Qwen3-8B, or to a local directory."
        )
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model_name_or_path={name!r}: the directory has no config.json, so it holds no model. Give the "
                "directory that save_pretrained wrote; merge an adapter into its base model first."
            )
        check_model_files(path, f"model_name_or_path={name!r}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"model_name_or_path={name!r}: there is no such directory (looked for {path.absolute()}). Check the path; "
            "a model on the Hub is named OWNER/NAME."
        )
    if path.is_dir():
        try:
            AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"model_name_or_path={name!r}: its tokenizer cannot be loaded ({str(error).strip().partition(chr(10))[0]}). Save the model's "
                "tokenizer into the directory: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            ) from error
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise_for_hub(error, "model", name, "model_name_or_path")
    return name
