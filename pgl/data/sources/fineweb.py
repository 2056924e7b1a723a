"""The challenge's own data: FineWeb, tokenised, from the Hugging Face hub."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from pgl.data.shards import ShardError, check_tokens, read_shard
from pgl.data.sources.base import Corpus, Source, one_at_a_time
from pgl.data.sources.hub import HubFiles, hub_progress_hidden
from pgl.data.tokenizer import load_tokenizer

MANIFEST = "manifest.json"
MAX_FILES = 100_000
STAGING = "tmp"


class FineWeb(Source):
    """The shards that the challenge trains and scores on, downloaded once.

    Every file is checked after it has been loaded (header, length, tokens within the vocabulary)
    and appears under its name only then. An interrupted download goes on where it stopped; without
    anything to load no network is used. The files lie in ``cache_dir/<repository>/<revision>`` in
    the challenge's layout. The validation split is always whole.

    Args:
        cache_dir: Where the files are kept: about 200 MB for each training shard.
        repo_id: Data set repository on the hub.
        revision: Branch, tag or commit; a commit makes the data immutable.
        variant: Which tokenisation: ``sp1024`` has a vocabulary of 1,024 pieces, and so on.
        train_shards: Number of training shards, from the first one on. The challenge's runs had 80.
        remote_prefix: Folder of the repository that holds the manifest, the data sets and the
            tokenizers.
        download_threads: Files that are loaded at a time.
        attempts: Number of times that a file is tried.
        backoff_seconds: Pause before the second attempt; it doubles from one to the next.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        cache_dir: str = "data/fineweb",
        repo_id: str = "willdepueoai/parameter-golf",
        revision: str = "main",
        variant: Literal["sp1024", "sp4096", "sp8192"] = "sp1024",
        train_shards: int = 80,
        remote_prefix: str = "datasets",
        download_threads: int = 4,
        attempts: int = 5,
        backoff_seconds: float = 1.0,
    ) -> None:
        for name, value, least in (
            ("train_shards", train_shards, 1),
            ("download_threads", download_threads, 1),
            ("attempts", attempts, 1),
            ("backoff_seconds", backoff_seconds, 0),
        ):
            if value < least:
                raise ValueError(f"data.source.init_args.{name} is {value}; give at least {least}.")
        self.dataset = f"fineweb10B_{variant}"
        self.train_shards = train_shards
        self.remote_prefix = PurePosixPath(remote_prefix)
        self.download_threads = download_threads
        self.root = Path(cache_dir, repo_id.replace("/", "--"), revision.replace("/", "--"))
        self.hub = HubFiles(repo_id, revision, self.root / STAGING, attempts, backoff_seconds)

    def prepare(self) -> None:
        """Download what is missing or damaged.

        Raises:
            ValueError: If the repository does not hold what is asked for.
            DownloadError: If a file could not be loaded after all attempts.
        """
        if self._is_complete():
            return
        with one_at_a_time(self.root / ".lock", f"downloading into {self.root}"):
            if self._is_complete():
                return
            with hub_progress_hidden():
                self._download()
            shutil.rmtree(self.root / STAGING, ignore_errors=True)

    def corpus(self) -> Corpus:
        """Return the downloaded shards; reads a header of each and no network."""
        path = self.root / MANIFEST
        if not path.is_file():
            raise ValueError(f"{self.root} has not been downloaded; call prepare() first.")
        listing = self._listing(read_manifest(path))
        return Corpus.from_files(
            self.dataset,
            [self.root / name for name in listing.train],
            [self.root / name for name in listing.val],
            self.root / listing.tokenizer,
        )

    def _is_complete(self) -> bool:
        try:
            self.corpus()
        except ValueError:
            return False
        return True

    def _download(self) -> None:
        self._fetch(MANIFEST, read_manifest)
        listing = self._listing(read_manifest(self.root / MANIFEST))
        self._fetch(listing.tokenizer, load_tokenizer)
        vocab_size = load_tokenizer(self.root / listing.tokenizer).vocab_size()

        def check(path: Path) -> None:
            check_tokens(read_shard(path), vocab_size, path)

        wanted = [name for name in listing.val + listing.train if not self._is_shard(name)]
        with _progress() as progress, ThreadPoolExecutor(self.download_threads) as pool:
            task = progress.add_task(f"downloading {self.dataset}", total=len(wanted))
            pending = [pool.submit(self._fetch, name, check) for name in wanted]
            try:
                for finished in as_completed(pending):
                    finished.result()
                    progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch(self, name: str, check: Callable[[Path], object]) -> None:
        self.hub.fetch(str(self.remote_prefix / name), self.root / name, check)

    def _is_shard(self, name: str) -> bool:
        try:
            read_shard(self.root / name)
        except ShardError:
            return False
        return True

    def _listing(self, manifest: dict[str, Any]) -> "Listing":
        listing = list_files(manifest, self.dataset, self.hub.repo_id)
        if self.train_shards > len(listing.train):
            raise ValueError(
                f"data.source.init_args.train_shards is {self.train_shards}, but "
                f"{self.hub.repo_id} has {len(listing.train)} training shards of {self.dataset}; "
                "lower it."
            )
        return Listing(listing.train[: self.train_shards], listing.val, listing.tokenizer)


@dataclass(frozen=True)
class Listing:
    """The files of one data set, as paths below the remote prefix."""

    train: list[str]
    val: list[str]
    tokenizer: str


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a repository's manifest.

    Raises:
        ValueError: If it is not a JSON object with lists of data sets and tokenizers.
    """
    try:
        manifest = json.loads(path.read_bytes())
        for kind in ("datasets", "tokenizers"):
            _ = [entry["name"] for entry in manifest[kind]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not list datasets and tokenizers by name ({error!r}); "
            "check data.source.init_args.repo_id and remote_prefix."
        ) from error
    return manifest


def list_files(manifest: dict[str, Any], dataset: str, repo_id: str) -> Listing:
    """Return the files that a manifest has for a data set.

    Raises:
        ValueError: If the data set or its tokenizer is not there, or not fully described.
    """
    entry = _named(manifest["datasets"], dataset, "data set", repo_id)
    counts = []
    for key in ("files_train", "files_val"):
        count = (entry.get("stats") or {}).get(key)
        if not isinstance(count, int) or not 1 <= count <= MAX_FILES:
            raise ValueError(
                f"the manifest of {repo_id} gives stats.{key}={count!r} for {dataset}; "
                "use a repository whose manifest counts its files."
            )
        counts.append(count)
    tokenizer = _named(manifest["tokenizers"], entry.get("tokenizer_name"), "tokenizer", repo_id)
    model = tokenizer.get("model_path") or tokenizer.get("path")
    path = PurePosixPath(str(model))
    if path.suffix != ".model" or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"the manifest of {repo_id} gives {model!r} as the model of tokenizer "
            f"{tokenizer['name']}; use a repository with a SentencePiece .model file."
        )
    return Listing(
        [f"datasets/{dataset}/fineweb_train_{index:06d}.bin" for index in range(counts[0])],
        [f"datasets/{dataset}/fineweb_val_{index:06d}.bin" for index in range(counts[1])],
        str(path),
    )


def _named(entries: list[dict[str, Any]], name: Any, kind: str, repo_id: str) -> dict[str, Any]:
    for entry in entries:
        if entry["name"] == name:
            return entry
    names = ", ".join(str(entry["name"]) for entry in entries) or "none"
    raise ValueError(
        f"{repo_id} has no {kind} {name}, it has {names}; choose another "
        "data.source.init_args.variant or repo_id."
    )


def _progress() -> Progress:
    return Progress(
        *Progress.get_default_columns()[:3],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
