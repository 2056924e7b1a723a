from pgl.artifact.codecs import CODECS
from pgl.artifact.describe import describe
from pgl.artifact.errors import ArtifactError, ArtifactTooLarge
from pgl.artifact.format import LIMIT_BYTES, Artifact, is_artifact, load, save
from pgl.artifact.size import GroupSize, SizeReport

__all__ = [
    "CODECS",
    "LIMIT_BYTES",
    "Artifact",
    "ArtifactError",
    "ArtifactTooLarge",
    "GroupSize",
    "SizeReport",
    "describe",
    "is_artifact",
    "load",
    "save",
]
