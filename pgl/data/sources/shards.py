"""A directory that already holds shards."""

from pathlib import Path

from pgl.data.sources.base import Corpus, Source


class Shards(Source):
    """Shards that are already on disk, in the challenge's layout or in a directory of their own.

    The layout is ``DIR/datasets/<name>/fineweb_{train,val}_*.bin`` and ``DIR/tokenizers/*.model``.

    Args:
        directory: Either ``DIR``, or the directory that holds the ``.bin`` files.
        tokenizer_path: The SentencePiece model of the shards. None looks in ``DIR/tokenizers`` and
            beside the shards, where it must be the only one.
        max_train_shards: Use only the first so many training shards. None uses all.

    Raises:
        ValueError: If ``max_train_shards`` is not positive.
    """

    def __init__(
        self,
        directory: str,
        tokenizer_path: str | None = None,
        max_train_shards: int | None = None,
    ) -> None:
        if max_train_shards is not None and max_train_shards < 1:
            raise ValueError(
                f"data.source.init_args.max_train_shards is {max_train_shards}; give at least 1, "
                "or null for all shards."
            )
        self.directory = Path(directory)
        self.tokenizer_path = None if tokenizer_path is None else Path(tokenizer_path)
        self.max_train_shards = max_train_shards

    def prepare(self) -> None:
        """Check that everything is there: every header, every length, the tokenizer."""
        self.corpus()

    def corpus(self) -> Corpus:
        """Return the shards.

        Raises:
            ShardError: If a split has no shard, or a shard is not valid.
            ValueError: If the directory holds several data sets, or the tokenizer is not clear.
        """
        shards = self._find_shards()
        tokenizer = self.tokenizer_path or self._find_tokenizer(shards)
        return Corpus.from_directory(
            shards.resolve().name, shards, tokenizer, max_train_shards=self.max_train_shards
        )

    def _find_shards(self) -> Path:
        if not self.directory.is_dir():
            raise ValueError(
                f"{self.directory} is not a directory; set data.source.init_args.directory to the "
                "one with the shards."
            )
        if any(self.directory.glob("fineweb_*.bin")):
            return self.directory
        found = sorted({path.parent for path in self.directory.glob("datasets/*/fineweb_*.bin")})
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(path) for path in found)
            raise ValueError(
                f"{self.directory} holds several data sets ({names}); "
                "set data.source.init_args.directory to one of them."
            )
        raise ValueError(
            f"{self.directory} has neither fineweb_*.bin nor datasets/*/fineweb_*.bin; "
            "set data.source.init_args.directory to the one with the shards."
        )

    def _find_tokenizer(self, shards: Path) -> Path:
        # DIR/datasets/<name> lies two levels below DIR.
        places = [shards, shards.resolve().parent.parent / "tokenizers"]
        found = sorted(path for place in places for path in place.glob("*.model"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(path) for path in found)
            raise ValueError(
                f"several tokenizers fit {shards} ({names}); set "
                "data.source.init_args.tokenizer_path."
            )
        raise ValueError(
            f"no *.model in {places[0]} or {places[1]}; "
            "set data.source.init_args.tokenizer_path to the shards' tokenizer."
        )
