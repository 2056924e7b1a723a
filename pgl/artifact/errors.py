"""What can be wrong with an artifact."""


class ArtifactError(ValueError):
    """A file is not an artifact that this pgl can read."""


class ArtifactTooLarge(ValueError):
    """A model does not fit into the size limit."""


class CodecError(ValueError):
    """A compressed stream is damaged, or holds more or less than was announced."""
