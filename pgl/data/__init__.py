"""Tokens: shards, the training stream, and the sources they come from."""

from pgl.data.datamodule import TokenDataModule
from pgl.data.shards import ShardError, list_shards, read_shard, write_shard
from pgl.data.sources import Corpus, FineWeb, Shards, Source, Stdlib, Text
from pgl.data.stream import BatchLayout, TokenStream, TrainLoader

__all__ = [
    "BatchLayout",
    "Corpus",
    "FineWeb",
    "ShardError",
    "Shards",
    "Source",
    "Stdlib",
    "Text",
    "TokenDataModule",
    "TokenStream",
    "TrainLoader",
    "list_shards",
    "read_shard",
    "write_shard",
]
