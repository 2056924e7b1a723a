"""Where the bytes of an artifact go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pgl.artifact.container import MAIN, SOURCE, PackedArchive
from pgl.artifact.manifest import StreamRecord
from pgl.artifact.streams import SCALES, TableEntry
from pgl.quant.errors import QuantizationError
from pgl.quant.groups import GROUPS


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

    @property
    def bits_per_weight(self) -> float:
        """Packed bits for each weight; 0 for a line without weights."""
        return 8 * self.packed_bytes / self.parameters if self.parameters else 0.0


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

    def table(self, errors: Mapping[str, QuantizationError] | None = None) -> str:
        """Return the report as text.

        Args:
            errors: What quantisation lost, by group.
        """
        lines = [
            f"{'':<18}{'weights':>12}{'packed bytes':>14}{'bits/weight':>13}"
            f"{'error':>9}{'of outputs':>12}  stored as"
        ]
        for group in self.groups:
            weights = f"{group.parameters:,}" if group.parameters else "-"
            bits = f"{group.bits_per_weight:.3f}" if group.parameters else "-"
            error = (errors or {}).get(group.name)
            outputs = None if error is None else error.output_relative
            lines.append(
                f"{group.name:<18}{weights:>12}{group.packed_bytes:>14,}{bits:>13}"
                f"{_percent(None if error is None else error.relative):>9}{_percent(outputs):>12}"
                f"  {'+'.join(group.kinds)} {'+'.join(group.codecs)}"
            )
        lines.append(f"{'source code':<18}{'':>12}{self.code_bytes:>14,}")
        lines.append(f"{'container':<18}{'':>12}{self.overhead_bytes:>14,}")
        bits = 8 * self.total_bytes / max(self.parameters, 1)
        lines.append(f"{'total':<18}{self.parameters:>12,}{self.total_bytes:>14,}{bits:>13.3f}")
        if self.limit_bytes is not None:
            lines.append(f"{'limit':<18}{'':>12}{self.limit_bytes:>14,}")
            lines.append(f"{'headroom':<18}{'':>12}{self.headroom_bytes:>14,}")
        return "\n".join(lines)


def measure(
    archive: PackedArchive,
    table: Sequence[TableEntry],
    streams: Mapping[str, StreamRecord],
    limit_bytes: int | None,
) -> SizeReport:
    """Split the length of a finished archive into its parts."""
    groups = []
    for group in GROUPS:
        entries = [entry for entry in table if entry.group == group]
        if entries:
            records = [streams[name] for name in sorted({entry.stream for entry in entries})]
            kinds = tuple(sorted({entry.kind for entry in entries}))
            groups.append(_sum(group, sum(entry.numel for entry in entries), records, kinds))
    if SCALES in streams:
        groups.append(_sum("row scales", 0, [streams[SCALES]], ("float16",)))
    code_bytes = sum(
        size
        for name, size in archive.member_bytes.items()
        if name == MAIN or name.startswith(SOURCE)
    )
    packed_bytes = sum(group.packed_bytes for group in groups)
    total_bytes = len(archive.data)
    overhead_bytes = total_bytes - packed_bytes - code_bytes
    return SizeReport(tuple(groups), code_bytes, overhead_bytes, total_bytes, limit_bytes)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _sum(
    name: str, parameters: int, records: Sequence[StreamRecord], kinds: tuple[str, ...]
) -> GroupSize:
    raw_bytes = sum(record.raw_bytes for record in records)
    packed_bytes = sum(record.packed_bytes for record in records)
    codecs = tuple(sorted({record.codec for record in records}))
    return GroupSize(name, parameters, raw_bytes, packed_bytes, kinds, codecs)
