import json
import subprocess
import sys

import pytest

from pgl.reporting.command import main
from pgl.tools import run_tool


def test_report_prints_markdown(make_run, tmp_path, capsys):
    make_run("base", 1)
    assert main([str(tmp_path)]) == 0
    assert "| base | 1 | 1.20000 |" in capsys.readouterr().out


def test_report_writes_json_to_a_file(make_run, tmp_path, capsys):
    make_run("base", 1)
    output = tmp_path / "new" / "table.json"
    assert main([str(tmp_path / "runs"), "--format", "json", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["groups"][0]["label"] == "base"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"wrote {output}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["absent"], "absent is not a folder"),
        (["RUNS", "--baseline", "nobody"], "--baseline nobody is not one of the groups: base"),
        (["RUNS", "--margin-nats", "0.005"], "--margin-nats needs --baseline"),
        (["RUNS", "--group-by", "model.x"], "no run has such a setting"),
        (["RUNS", "--format", "html"], "invalid choice: 'html'"),
        (["RUNS", "--base", "base"], "unrecognized arguments"),
        (["RUNS", "--plots", "x"], "no run has TensorBoard events"),
    ],
)
def test_a_mistake_is_one_line(make_run, tmp_path, capsys, options, message):
    make_run("base", 1)
    given = [str(tmp_path) if option == "RUNS" else option for option in options]
    with pytest.raises(SystemExit) as stop:
        run_tool(["report", *given])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pgl: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_report_imports_neither_torch_nor_lightning(make_run, tmp_path):
    make_run("base", 1)
    code = (
        "import sys, pgl.tools\n"
        "try:\n"
        f"    pgl.tools.run_tool(['report', {str(tmp_path)!r}])\n"
        "finally:\n"
        "    assert not {'torch', 'lightning'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| base |" in done.stdout
