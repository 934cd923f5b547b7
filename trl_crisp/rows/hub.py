"""Errors of downloads from the Hub in the user's terms, and the commit of a loaded model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_HTTP_PACKAGES = {"httpx", "httpx2", "requests", "urllib3", "aiohttp"}


def raise_for_hub(error: Exception, kind: str, name: str, field_name: str) -> NoReturn:
    """
    Raise an error that explains a failed download, or `error` itself if its cause is unknown.

    Args:
        error: The error from `datasets`, `transformers` or `huggingface_hub`.
        kind: "dataset" or "model".
        name: The id of the dataset or the model.
        field_name: The argument that gave the id.

    Raises:
        PermissionError: If the repository is gated and access was not granted.
        FileNotFoundError: If the repository or the revision does not exist, or is private.
        ConnectionError: If the Hub cannot be reached and the cache does not have the repository.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(exception_chain(error))
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    local = "file" if kind == "dataset" else "directory that holds the model"
    subject = f"{field_name}={name!r}"

    def any_is(*types: type[BaseException]) -> bool:
        return any(isinstance(e, types) for e in chain)

    if any_is(GatedRepoError) or any(re.search(r"\bgated\b", str(e)) for e in chain):
        raise PermissionError(
            f"{subject}: the {kind} is gated. Request access at {page}, log in with `hf auth login` (or set "
            f"HF_TOKEN), and start again; or give a local {local}."
        ) from error
    if any_is(RevisionNotFoundError):
        raise FileNotFoundError(f"{subject}: the {kind} has no such revision. See the revisions at {page}.") from error
    if any_is(RepositoryNotFoundError, DatasetNotFoundError):
        raise FileNotFoundError(
            f"{subject}: the Hub has no such {kind}, or it is private. Check the id; for a private {kind} log in with "
            f"`hf auth login` (or set HF_TOKEN); or give a local {local}."
        ) from error
    if any_is(ConnectionError, LocalEntryNotFoundError) or any(
        type(e).__module__.split(".")[0] in _HTTP_PACKAGES and getattr(e, "response", None) is None for e in chain
    ):
        import huggingface_hub.constants

        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        way_out = "Unset it" if offline else "Connect to the network (behind a proxy set HTTPS_PROXY)"
        raise ConnectionError(
            f"{subject}: {reason} and the local cache does not have the {kind}. {way_out}, or give a local {local}. "
            "If this machine has no network, download it elsewhere with `hf download "
            f"{'--repo-type dataset ' * (kind == 'dataset')}{name}` and copy it here."
        ) from error
    raise error


def exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def cached_commit(name: str | None, revision: str | None = None) -> str | None:
    """
    Return the commit of a model's revision, read from the Hub's cache after the model's config was loaded.

    The config that transformers loads does not contain the commit.

    Args:
        name: A Hub id, or a directory.
        revision: A branch, a tag or a commit; the main branch if `None`.

    Returns:
        The commit, 40 hexadecimal digits; `None` for a directory or if the cache does not have the model.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    for file in ("config.json", "adapter_config.json"):
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            # The name is that of a directory that does not exist any more
            return None
        if isinstance(path, str):
            return Path(path).parent.name
    return None
