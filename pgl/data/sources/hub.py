"""One file from the Hugging Face hub: checked, retried, whole or not there."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub  # its sub-modules are imported where used: they bring in an HTTP client

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
        afresh = False
        for attempt in range(self.attempts):
            if attempt > 0:
                time.sleep(min(self.backoff_seconds * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS))
            try:
                staged = self._load(remote, afresh)
            except Exception as error:
                # Which class stands for a lost connection differs between versions of the hub's
                # client, so everything but a plain "no" is worth another attempt.
                self._raise_if_final(remote, error)
                failure, reason = error, _root_cause(error)
                continue
            try:
                self._accept(staged, destination, check)
                return
            except ValueError as error:
                # The bad file may lie in huggingface_hub's own cache too: pass that by.
                afresh = True
                failure, reason = error, str(error).partition(";")[0]
        raise DownloadError(
            f"{remote} of {self.repo_id} could not be fetched in {self.attempts} attempts "
            f"({reason}); run again, finished files are kept."
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

    def _raise_if_final(self, remote: str, error: Exception) -> None:
        from huggingface_hub import errors

        final = (
            errors.EntryNotFoundError,
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.HFValidationError,
        )
        # "Not found locally" is what the client says of a host that does not answer.
        if isinstance(error, final) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise ValueError(
                f"{remote} of {self.repo_id} at {self.revision} cannot be had "
                f"({_first_line(error)}); check data.source.init_args.repo_id, revision and your "
                "access."
            ) from error

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
    from huggingface_hub import utils

    was_hidden = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not was_hidden:
            utils.enable_progress_bars()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
