"""Lets one process at a time use a directory. Two would write the same samples, or mix samples of different settings."""

import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK_FILE = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """
    Lock a directory. It is made if it does not exist, and removed afterwards if it is empty.

    The kernel releases the lock when the process ends for any reason.

    Raises:
        ValueError: If another process has the lock. The message names the process.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _LOCK_FILE
    file = _open_locked(path, directory)
    try:
        yield
    finally:
        # The file is removed before the lock is released: a process that waits for the removed file makes a new one
        path.unlink(missing_ok=True)
        os.close(file)
        with suppress(OSError):
            for made in missing:
                made.rmdir()


def _open_locked(path: Path, directory: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 1000).decode(errors="replace") or "another process"
            os.close(file)
            raise ValueError(
                f"output {str(directory)!r} is in use by {holder}. Wait until it has ended, or give another --output."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked ({error}), so nothing keeps a second evaluation out of the directory.",
                stacklevel=4,
            )
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
                return file
        # The process before removed the file between the two calls
        os.close(file)
