"""What ranks compare when they start."""

import torch

from callbacks import WallClockBudget
from pgl.fingerprint import (
    code_fingerprint,
    disagreement,
    files_fingerprint,
    settings_of,
    weights_fingerprint,
)


def test_settings_are_the_constructors_arguments():
    settings = settings_of(WallClockBudget(seconds=None, steps=5), "budget")
    assert settings["budget.steps"] == "5"
    assert "budget.elapsed" not in settings


def test_what_has_an_address_for_text_is_left_out():
    class Holder:
        def __init__(self, thing):
            self.thing = thing

    assert settings_of(Holder(object()), "x") == {}


def test_files_differ_by_length_and_by_either_end(tmp_path):
    names = {"same": b"ab", "start": b"xb", "end": b"ax", "longer": b"abb"}
    prints = set()
    for folder, content in names.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.bin").write_bytes(content[:1] + bytes(200_000) + content[1:])
        prints.add(files_fingerprint([tmp_path / folder / "x.bin"])["x.bin"])
    assert len(prints) == 4


def test_the_smallest_change_of_one_weight_shows():
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    before = weights_fingerprint(module)
    assert before == weights_fingerprint(module)
    with torch.no_grad():
        module.bias[1] = torch.nextafter(module.bias[1], torch.tensor(9.0, dtype=torch.bfloat16))
    after = weights_fingerprint(module)
    assert [name for name in before if before[name] != after[name]] == ["bias"]


def test_the_code_has_a_version():
    code = code_fingerprint()
    assert code == code_fingerprint()
    assert {"source", "python", "torch", "lightning"} == set(code)


def test_a_disagreement_names_kind_setting_and_ranks():
    ranks = [{"config": {"a": "1", "b": "2"}} for _ in range(3)]
    assert disagreement(ranks) is None
    ranks[2] = {"config": {"a": "5"}}
    assert disagreement(ranks) == (
        "config a: 5 on rank 2, 1 on rank 0; config b: nothing on rank 2, 2 on rank 0"
    )
