"""Subcommands that need no Trainer."""

import sys

import pytest

from pgl import cli, tools


def test_help_of_pgl_names_the_tools(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, purpose) in tools.TOOLS.items():
        assert f"pgl {name} ({purpose})" in text


def test_what_is_no_tool_is_left_to_the_trainer():
    assert tools.run_tool(["fit", "report"]) is None
    assert tools.run_tool([]) is None


def test_the_command_line_of_the_process_is_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pgl", "ablate", "--list"])
    with pytest.raises(SystemExit) as stop:
        tools.run_tool()
    assert stop.value.code == 0
    assert "xsa" in capsys.readouterr().out.split()


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(tools.TOOLS, "broken", ("json", "a module whose main is a library's"))
    monkeypatch.setattr("json.main", lambda arguments: int("x"), raising=False)
    with pytest.raises(ValueError, match="invalid literal"):
        tools.run_tool(["broken"])
