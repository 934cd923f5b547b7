"""Pushes a folder to a repository of the Hub; the upload itself is huggingface_hub's."""

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from trl_crisp.publish.folder import PushFolder


def check_repo(repo: str) -> None:
    """
    Check the name of a repository.

    Raises:
        ValueError: If it is not OWNER/NAME, or has characters that the Hub does not take.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"--repo {repo}: give OWNER/NAME, such as me/qwen3-8b-crisp.")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"--repo {repo}: the Hub takes no such name. {error}") from error


def push_folder(
    folder: PushFolder,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    run_as_future: bool = False,
) -> Any:
    """
    Upload a folder, and remove it when it is on the Hub. The repository and the branch are made if they do not exist.

    Args:
        folder: From [`~trl_crisp.publish.folder.make_folder`].
        repo: OWNER/NAME.
        private: Whether a new repository is private; if `None`, the owner's default.
        revision: The branch; main if `None`.
        token: That of the user's login if `None`.
        commit_message: That of huggingface_hub if `None`.
        run_as_future: Return at once; the folder stays.

    Returns:
        What `upload_folder` of huggingface_hub returns.
    """
    api = HfApi(token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    pushed: Any = api.upload_folder(  # type: ignore[call-overload]
        repo_id=repo,
        folder_path=folder.path,
        revision=revision,
        commit_message=commit_message or "Push a model trained with CRISP",
        run_as_future=run_as_future,
    )
    if not run_as_future:
        shutil.rmtree(folder.path)
    return pushed


@contextmanager
def uploading_only(patterns: Sequence[str]) -> Iterator[None]:
    """
    Have what is uploaded to the top of a repository leave out all files but some.

    transformers uploads the whole of output_dir during a training. There are the user's prompts in it.

    Args:
        patterns: Names of the files, as `allow_patterns` of `upload_folder`.
    """
    upload = HfApi.upload_folder

    def upload_some(self: HfApi, **kwargs: Any) -> Any:
        if kwargs.get("path_in_repo") is None:
            kwargs["allow_patterns"] = list(patterns)
        return upload(self, **kwargs)

    HfApi.upload_folder = upload_some  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        HfApi.upload_folder = upload  # type: ignore[method-assign]


def describe_failed_push(
    error: Exception,
    directory: Path,
    repo: str,
    results: Sequence[Sequence[Path]] = (),
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Return the Hub's error, where the model is, and the command that pushes it with the same options."""
    command = ["trl-crisp", "push", str(directory), "--repo", repo]
    for paths in results:
        command += ["--results", *map(str, paths)]
    command += ["--private"] if private else []
    command += ["--revision", revision] if revision is not None else []
    return f"The push to {repo} failed: {error}\nNothing is lost: the trained model is in {directory}. Push it again with:\n  {shlex.join(command)}"
