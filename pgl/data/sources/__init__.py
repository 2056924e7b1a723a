"""Sources of text: each one class whose arguments are its configuration."""

from pgl.data.sources.base import Corpus, Source
from pgl.data.sources.fineweb import FineWeb
from pgl.data.sources.hub import DownloadError
from pgl.data.sources.shards import Shards
from pgl.data.sources.stdlib import Stdlib
from pgl.data.sources.text import Text

__all__ = ["Corpus", "DownloadError", "FineWeb", "Shards", "Source", "Stdlib", "Text"]
