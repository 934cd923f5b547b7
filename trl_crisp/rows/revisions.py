"""Which commit of a Hub model was loaded."""

from pathlib import Path


def cached_commit(name: str | None, revision: str | None = None) -> str | None:
    """
    Return the commit that a model's revision stands for in the cache of the Hub, once the model's config was loaded.

    The config that transformers loads does not say it.

    Args:
        name: A Hub id, or a directory.
        revision: A branch, a tag or a commit; the main branch if `None`.

    Returns:
        The commit, 40 hexadecimal digits; `None` for a directory, and for a model that the cache does not have.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    for file in ("config.json", "adapter_config.json"):
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            # A directory that is no longer there
            return None
        if isinstance(path, str):
            return Path(path).parent.name
    return None
