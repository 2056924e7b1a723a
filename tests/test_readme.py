import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "seconds=30" in example
    exec(example.replace("seconds=30", "seconds=None, steps=2"), {})
    assert "tensor(" in capsys.readouterr().out


def test_every_file_it_links_to_exists():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
