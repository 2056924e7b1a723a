from pgl.artifact.codecs import CODECS
from pgl.artifact.describe import describe
from pgl.artifact.errors import ArtifactError, ArtifactTooLarge
from pgl.artifact.fit import Fit, fit_to_limit
from pgl.artifact.format import Artifact, Packed, is_artifact, load, pack_model, save
from pgl.artifact.size import GroupSize, SizeReport

__all__ = [
    "CODECS",
    "Artifact",
    "ArtifactError",
    "ArtifactTooLarge",
    "Fit",
    "GroupSize",
    "Packed",
    "SizeReport",
    "describe",
    "fit_to_limit",
    "is_artifact",
    "load",
    "pack_model",
    "save",
]
