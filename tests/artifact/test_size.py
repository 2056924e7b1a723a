import zipfile

import pytest
import torch

from pgl.artifact import save
from pgl.artifact.size import GroupSize, SizeReport
from pgl.quant import GROUPS, QuantizationLoss


def test_every_byte_has_its_line(tmp_path, tiny_config, tiny_stored):
    report = save(tmp_path / "m", tiny_config, tiny_stored, limit_bytes=1_000_000)
    total = sum(g.packed_bytes for g in report.groups) + report.code_bytes + report.overhead_bytes
    assert total == report.total_bytes == (tmp_path / "m").stat().st_size
    assert report.headroom_bytes == 1_000_000 - report.total_bytes
    assert report.parameters == sum(t.data.numel() for t in tiny_stored.values())
    with zipfile.ZipFile(tmp_path / "m") as archive:
        sizes = {info.filename: info.compress_size for info in archive.infolist()}
    code = sum(s for n, s in sizes.items() if n.startswith("source/") or n == "__main__.py")
    assert report.code_bytes == code > 10_000
    by_name = {group.name: group for group in report.groups}
    mlp = [t.data.numel() for t in tiny_stored.values() if t.group == "mlp"]
    assert by_name["mlp"].parameters == by_name["mlp"].raw_bytes == sum(mlp)
    assert by_name["mlp"].packed_bytes == sizes["weights/mlp.int6"]
    attention = [size for name, size in sizes.items() if name.startswith("weights/attention.")]
    assert len(attention) == 2  # key and value projections are small enough for float16 here
    assert by_name["attention"].packed_bytes == sum(attention)
    assert by_name["row scales"].packed_bytes == sizes["weights/scales"]
    assert by_name.keys() <= {*GROUPS, "row scales"}
    bits = 8 * by_name["mlp"].packed_bytes / by_name["mlp"].parameters
    assert by_name["mlp"].bits_per_weight == bits
    codes = [t.data.flatten() for t in tiny_stored.values() if t.group == "mlp"]
    _, counts = torch.cat(codes).unique(return_counts=True)
    share = counts / counts.sum()
    order0 = -(share * share.log2()).sum().item()
    assert by_name["mlp"].order0_bits_per_weight == pytest.approx(order0, rel=1e-5)
    assert by_name["row scales"].order0_bytes > 0
    assert by_name["row scales"].order0_bits_per_weight == 0


def test_table(tmp_path, tiny_config, tiny_stored):
    report = save(tmp_path / "m", tiny_config, tiny_stored)
    lost = QuantizationLoss(error=0.01, energy=1.0, output_error=0.0004, output_energy=1.0)
    lines = report.table({"mlp": lost}).splitlines()
    ends = {line.index(f"{g.packed_bytes:,}") + len(f"{g.packed_bytes:,}") for g in report.groups
            for line in lines if line.startswith(g.name)}  # fmt: skip
    assert len(ends) == 1  # the numbers are aligned
    [mlp] = [line for line in lines if line.startswith("mlp")]
    assert mlp.split()[-4:] == ["10.0%", "2.00%", "int6", "zstd"]
    for word in ("attention", "row scales", "source code", "container", "total", "headroom"):
        assert sum(word in line for line in lines) == 1
    assert f"{report.total_bytes:,}" in report.table()
    free = save(tmp_path / "m", tiny_config, tiny_stored, limit_bytes=None)
    assert free.headroom_bytes is None
    assert "headroom" not in free.table()


def test_the_table_of_the_largest_artifact_fits_80_columns():
    kinds = ("bfloat16", "int6")
    group = GroupSize("value_embedding", 99_999_999, 1, 16_000_000, kinds, ("zstd",), 17_000_000)
    report = SizeReport((group,), 50_000, 5_000, 16_000_000, 16_000_000)
    lost = QuantizationLoss(error=1.0, energy=1.0, output_error=0.9, output_energy=1.0)
    lines = report.table({"value_embedding": lost}).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == [
        *("value_embedding", "99,999,999", "16,000,000", "1.28", "1.36", "100.0%", "94.9%"),
        *("bf16+int6", "zstd"),
    ]
