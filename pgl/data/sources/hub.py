"""One file from the Hugging Face hub: checked, retried, whole or not there."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

MAX_BACKOFF_SECONDS = 60.0


class DownloadError(RuntimeError):
    """A file that could not be fetched although it was tried again and again."""


@dataclass(frozen=True)
class HubFiles:
    """Files of one data set repository.

    The host is huggingface_hub's own setting (``HF_ENDPOINT``), and so is the token.
    """

    repo_id: str
    """Data set repository, as ``owner/name``."""
    revision: str
    """Branch, tag or commit."""
    staging: Path
    """Directory for unfinished files, on the file system that the files shall end on."""
    attempts: int
    """Number of times a file is tried."""
    backoff_seconds: float
    """Pause before the second attempt; it doubles from one to the next, up to a minute."""

    def fetch(self, remote: str, destination: Path, check: Callable[[Path], object]) -> None:
        """Put a file of the repository at ``destination``.

        What was loaded of an interrupted file is kept in ``staging`` and completed.

        Args:
            remote: Path inside the repository.
            destination: Where the file shall be; it appears there once loaded and checked.
            check: Raises ValueError for a file that must not be used; it is then loaded anew.

        Raises:
            ValueError: If repository, revision or file do not exist or are not accessible.
            DownloadError: If no attempt brought a good file.
        """
        failure: Exception | None = None
        for attempt in range(self.attempts):
            if attempt > 0:
                time.sleep(min(self.backoff_seconds * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS))
            try:
                # A file that failed its check may lie in huggingface_hub's own cache: pass it by.
                staged = self._load(remote, afresh=isinstance(failure, ValueError))
                self._accept(staged, destination, check)
                return
            except _final_errors() as error:
                if not _is_transient(error):
                    raise ValueError(
                        f"{remote} of {self.repo_id} at {self.revision} cannot be had "
                        f"({_first_line(error)}); check repo_id, revision and your access."
                    ) from error
                failure = error
            except Exception as error:
                # Which class stands for a lost connection differs between versions of the hub's
                # client, so everything is worth another attempt; the last error is shown.
                failure = error
        assert failure is not None
        raise DownloadError(
            f"{remote} of {self.repo_id} could not be fetched in {self.attempts} attempts "
            f"({_first_line(failure)}); run again, finished files are kept."
        ) from failure

    def _load(self, remote: str, afresh: bool) -> Path:
        path = huggingface_hub.hf_hub_download(
            self.repo_id,
            remote,
            repo_type="dataset",
            revision=self.revision,
            local_dir=self.staging,
            force_download=afresh,
        )
        return Path(path)

    def _accept(self, staged: Path, destination: Path, check: Callable[[Path], object]) -> None:
        try:
            check(staged)
        except ValueError:
            staged.unlink()
            raise
        with open(staged, "rb+") as file:
            os.fsync(file.fileno())
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, destination)


@contextmanager
def hub_progress_hidden() -> Iterator[None]:
    """Hide huggingface_hub's bar for each file, which would write over ours."""
    was_hidden = huggingface_hub.utils.are_progress_bars_disabled()
    huggingface_hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not was_hidden:
            huggingface_hub.utils.enable_progress_bars()


def _final_errors() -> tuple[type[Exception], ...]:
    # Imported late: this brings in an HTTP client, which nobody else needs.
    from huggingface_hub import errors

    return (
        errors.EntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    )


def _is_transient(error: Exception) -> bool:
    # "Not found here" is what the client says of a host that does not answer.
    return isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
