"""Where the bytes of an artifact go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pgl.artifact.container import MAIN, SOURCE, PackedArchive
from pgl.artifact.manifest import StreamRecord
from pgl.artifact.streams import SCALES, TableEntry
from pgl.quant.groups import GROUPS
from pgl.quant.losses import QuantizationLoss


@dataclass(frozen=True)
class GroupSize:
    """What the tensors of one group take; their row scales are counted on a line of their own."""

    name: str
    parameters: int
    raw_bytes: int
    packed_bytes: int
    kinds: tuple[str, ...] = ()
    """What its tensors are stored as, e.g. int6 and float16."""
    codecs: tuple[str, ...] = ()
    """What its streams are compressed with."""
    order0_bytes: float = 0.0
    """Entropy of its streams without context: what a perfect coder of single bytes would take."""

    @property
    def bits_per_weight(self) -> float:
        """Packed bits for each weight; 0 for a line without weights."""
        return 8 * self.packed_bytes / self.parameters if self.parameters else 0.0

    @property
    def order0_bits_per_weight(self) -> float:
        """Bits of entropy without context for each weight; 0 for a line without weights."""
        return 8 * self.order0_bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class SizeReport:
    """The length of an artifact, split up. Nothing is estimated: each group is its own streams."""

    groups: tuple[GroupSize, ...]
    """Tensor groups, then the row scales of all of them."""

    code_bytes: int
    """Deflated source, `__main__.py` included."""

    overhead_bytes: int
    """Manifest, zip headers and checksum."""

    total_bytes: int
    """Length of the file."""

    limit_bytes: int | None
    """What it may be; None if there is no limit."""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(group.parameters for group in self.groups)

    @property
    def headroom_bytes(self) -> int | None:
        """Bytes left below the limit, negative beyond it."""
        return None if self.limit_bytes is None else self.limit_bytes - self.total_bytes

    def table(self, losses: Mapping[str, QuantizationLoss] | None = None) -> str:
        """Return the report as text: 80 columns, more where a group is stored in many ways.

        Args:
            losses: What quantisation lost, by group, as a share of the weights and, where the
                layers' inputs are known, of their outputs.
        """
        lines = [
            f"{'':<15}{'weights':>11}{'bytes':>11}{'bits':>6}{'order0':>7}{'error':>7}"
            f"{'output':>7} stored as"
        ]
        for group in self.groups:
            weights = f"{group.parameters:,}" if group.parameters else "-"
            bits = f"{group.bits_per_weight:.2f}" if group.parameters else "-"
            order0 = f"{group.order0_bits_per_weight:.2f}" if group.parameters else "-"
            loss = (losses or {}).get(group.name)
            outputs = None if loss is None else loss.output_relative
            lines.append(
                f"{group.name:<15}{weights:>11}{group.packed_bytes:>11,}{bits:>6}"
                f"{order0:>7}{_percent(None if loss is None else loss.relative):>7}"
                f"{_percent(outputs):>7} {'+'.join(map(_short, group.kinds))}"
                f" {'+'.join(group.codecs)}"
            )
        lines.append(f"{'source code':<15}{'':>11}{self.code_bytes:>11,}")
        lines.append(f"{'container':<15}{'':>11}{self.overhead_bytes:>11,}")
        bits = 8 * self.total_bytes / max(self.parameters, 1)
        lines.append(f"{'total':<15}{self.parameters:>11,}{self.total_bytes:>11,}{bits:>6.2f}")
        if self.limit_bytes is not None:
            lines.append(f"{'limit':<15}{'':>11}{self.limit_bytes:>11,}")
            lines.append(f"{'headroom':<15}{'':>11}{self.headroom_bytes:>11,}")
        return "\n".join(lines)


def measure(
    archive: PackedArchive,
    table: Sequence[TableEntry],
    streams: Mapping[str, StreamRecord],
    limit_bytes: int | None,
    order0: Mapping[str, float],
) -> SizeReport:
    """Split the length of a finished archive into its parts.

    Args:
        archive: The archive.
        table: Its tensors.
        streams: Its streams by name.
        limit_bytes: What its length may be, None for any.
        order0: Entropy of each stream, see :func:`order0_bytes`.
    """
    groups = []
    for group in GROUPS:
        entries = [entry for entry in table if entry.group == group]
        if entries:
            names = sorted({entry.stream for entry in entries})
            records = [streams[name] for name in names]
            kinds = tuple(sorted({entry.kind for entry in entries}))
            numel = sum(entry.numel for entry in entries)
            entropy = sum(order0[name] for name in names)
            groups.append(_sum(group, numel, records, kinds, entropy))
    if SCALES in streams:
        groups.append(_sum("row scales", 0, [streams[SCALES]], ("float16",), order0[SCALES]))
    code_bytes = sum(
        size
        for name, size in archive.member_bytes.items()
        if name == MAIN or name.startswith(SOURCE)
    )
    packed_bytes = sum(group.packed_bytes for group in groups)
    total_bytes = len(archive.data)
    overhead_bytes = total_bytes - packed_bytes - code_bytes
    return SizeReport(tuple(groups), code_bytes, overhead_bytes, total_bytes, limit_bytes)


def order0_bytes(stream: bytes) -> float:
    """Return the entropy of a stream's bytes as independent draws, in bytes."""
    count = np.bincount(np.frombuffer(stream, dtype=np.uint8), minlength=256)
    count = count[count > 0]
    return float(-(count * np.log2(count / len(stream))).sum() / 8)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}" if share < 0.1 else f"{share:.1%}"


def _short(kind: str) -> str:
    return kind.replace("float", "f")


def _sum(
    name: str,
    parameters: int,
    records: Sequence[StreamRecord],
    kinds: tuple[str, ...],
    entropy: float,
) -> GroupSize:
    raw_bytes = sum(record.raw_bytes for record in records)
    packed_bytes = sum(record.packed_bytes for record in records)
    codecs = tuple(sorted({record.codec for record in records}))
    return GroupSize(name, parameters, raw_bytes, packed_bytes, kinds, codecs, entropy)
