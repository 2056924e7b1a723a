"""The rules of the challenge in numbers; docs/legality.md has them in words."""

ARTIFACT_LIMIT_BYTES = 16_000_000
"""Largest artifact, code included."""

TRAINING_LIMIT_SECONDS = 600.0
"""Longest training, on 8 H100."""

EVALUATION_LIMIT_SECONDS = 600.0
"""Longest evaluation, on 8 H100."""

CHALLENGE_TEXT = "fineweb10B_"
"""What the names of the challenge's data begin with."""
