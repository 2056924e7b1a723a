import zipfile

from pgl.artifact import save
from pgl.quant import GROUPS, QuantizationError


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


def test_table(tmp_path, tiny_config, tiny_stored):
    report = save(tmp_path / "m", tiny_config, tiny_stored)
    error = QuantizationError(error=0.01, energy=1.0, output_error=0.0004, output_energy=1.0)
    lines = report.table({"mlp": error}).splitlines()
    ends = {line.index(f"{g.packed_bytes:,}") + len(f"{g.packed_bytes:,}") for g in report.groups
            for line in lines if line.startswith(g.name)}  # fmt: skip
    assert len(ends) == 1  # the numbers are aligned
    [mlp] = [line for line in lines if line.startswith("mlp")]
    assert mlp.split()[-4:] == ["10.00%", "2.00%", "int6", "zstd"]
    for word in ("attention", "row scales", "source code", "container", "total", "headroom"):
        assert sum(word in line for line in lines) == 1
    assert f"{report.total_bytes:,}" in report.table()
    free = save(tmp_path / "m", tiny_config, tiny_stored, limit_bytes=None)
    assert free.headroom_bytes is None
    assert "headroom" not in free.table()
