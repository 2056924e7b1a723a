"""Files that are whole or not there: every writer goes through :func:`atomic_write`."""

import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pgl.errors import DiskError

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears under ``path`` only once it is complete and on disk.

    The bytes go to a temporary name in the same folder, are flushed and fsynced, and are then
    renamed. If the block raises, the temporary file is removed and ``path`` is left as it was.

    Args:
        path: Where the finished file shall be. Its folder is made if need be.

    Raises:
        DiskError: If the disk refuses: it is full, read-only or not ours.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = _refused_by_disk(error)
        if cause is None:
            raise
        kept = "; the file that was there before is whole" if path.exists() else ""
        raise DiskError(f"cannot write {path}: {os.strerror(cause)}{kept}") from error
    finally:
        with suppress(OSError):  # a disk that takes nothing may not take this either
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def check_folder(folder: str | os.PathLike[str], needed_bytes: int, purpose: str) -> None:
    """Make a folder and check that files can be written there, and how large they may be.

    Args:
        folder: Where the files go.
        needed_bytes: How many bytes must be free.
        purpose: What for, as part of the message.

    Raises:
        DiskError: In one sentence, with the folder and the numbers.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{_host()}.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise DiskError(
            f"cannot write to {folder} ({error.strerror}): choose another folder for the run"
        ) from error
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{folder} has {free_bytes / 1e6:,.1f} MB free but {purpose} takes "
            f"{needed_bytes / 1e6:,.1f} MB: free some, or choose another folder for the run"
        )


def remove_stale(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove temporary files that processes of this machine left when they were killed.

    Files of a process that is alive stay, unless it is this one, which must not be writing.

    Returns:
        What was removed.
    """
    removed = []
    for path in Path(folder).glob(f".*.{_host()}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as a hex string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _host() -> str:
    # Without dots, which separate the parts of a temporary name.
    return socket.gethostname().replace(".", "-")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _refused_by_disk(error: BaseException | None) -> int | None:
    """Return the number of the disk's error behind an error, or None: torch.save wraps them."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder's entry is on disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
