"""The Markdown report and the closing summary."""

import copy
import subprocess

import pytest

from pgl import report as report_module
from pgl.report import environment, summary, to_markdown

REPORT = {
    "name": "quick",
    "training": {
        "steps": 1200,
        "batch_tokens": 8192,
        "tokens": 9_830_400,
        "seconds": 110.02,
        "tokens_per_second": 89351,
        "devices": 1,
    },
    "scores": [
        {"weights": w, "windows": k, "bpb": b, "loss": 2 * b, "tokens": 999, "bytes": 4321}
        for w, k, b in (("raw", "chunked", 2.1), ("quantised", "sliding", 2.0123456))
    ],
    "budget": {
        "phases": {
            "train": {"seconds": 110.02, "counts": True},
            "pack": {"seconds": 0.5, "counts": False},
        }
    },
    "artifact": {
        "total_bytes": 1_234_567,
        "limit_bytes": 4_000_000,
        "code_bytes": 45_000,
        "container_bytes": 321,
        "groups": [
            {"name": "mlp", "parameters": 1000, "packed_bytes": 800, "bits_per_weight": 6.4}
        ],
    },
    "techniques": [{"technique": "SmearGate", "setting": "True", "acted": "every step"}],
    "data": {"source": "stdlib", "val_xz_bits_per_byte": 2.4, "train_shards": {"a": "f" * 64}},
    "environment": {"python": "3.11"},
}


def test_markdown_holds_every_part():
    text = to_markdown(REPORT)
    for part in (
        "# Run report: quick",
        "1,200 steps of 8,192 tokens (9.83 M) in 110.0 s of training, 89,351 tokens/s, 1 device(s)",
        "| quantised | sliding | 2.012346 | 4.024691 | 999 | 4,321 |",
        "| train | 110.02 | yes |",
        "| pack | 0.50 | no |",
        "| mlp | 1,000 | 800 | 6.400 |",
        "| source code | | 45,000 | |",
        "| **total** | | **1,234,567** | |",
        "| SmearGate | True | every step |",
        "- train_shards: a ffffffffffffffff\n",
        "- python: 3.11",
    ):
        assert part in text


def test_the_summary_compares_with_xz():
    text = summary(REPORT)
    assert "2.012346 bits/byte" in text
    assert "2.0123 is below the 2.4000 bits per byte of xz -9e" in text
    assert "1,234,567 of 4,000,000 bytes" in text
    worse = copy.deepcopy(REPORT)
    worse["data"]["val_xz_bits_per_byte"] = 1.9
    assert "2.0123 is NOT below the 1.9000" in summary(worse)


def test_the_comparison_with_xz_is_of_the_last_legal_score():
    report = copy.deepcopy(REPORT)
    report["scores"].append(
        {**REPORT["scores"][-1], "windows": "not legal", "bpb": 0.5, "legal": False}
    )
    assert "2.0123 is below the 2.4000" in summary(report)
    assert "2.0123 is below the 2.4000" in to_markdown(report)
    report["scores"] = report["scores"][-1:]
    assert "xz -9e" not in summary(report)


@pytest.mark.parametrize("key", ["artifact", "scores"])
def test_a_report_without_a_part_is_still_a_report(key):
    partial = {**copy.deepcopy(REPORT), key: type(REPORT[key])()}
    assert "# Run report" in to_markdown(partial)
    assert summary(partial)


def test_the_environment_names_versions():
    found = environment("cpu", 2)
    assert found["packages"]["torch"]
    assert found["pgl"]
    revision = found["git_revision"]
    assert revision is None or len(revision.removesuffix("-dirty")) == 40


def test_a_cpu_run_on_a_gpu_machine_names_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert environment("cpu", 2)["device"].startswith("2 x cpu (")
    assert environment("cuda", 4)["device"] == "4 x NVIDIA H200"


def test_the_revision_is_of_pgls_own_checkout_and_says_if_it_was_changed(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    assert report_module._git_revision(tmp_path) is None  # no checkout
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_text("one")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert len(report_module._git_revision(tmp_path)) == 40
    assert report_module._git_revision(tmp_path / "inside") is None  # the checkout of another
    (tmp_path / "inside" / "file").write_text("two")
    assert report_module._git_revision(tmp_path).endswith("-dirty")


def test_the_budget_says_whether_it_was_kept():
    assert "budget." not in summary(REPORT)
    for seconds, within, verdict in (
        (598.36, True, "within budget"),
        (600.04, True, "within budget but for its last step"),
        (630.0, False, "OVER budget"),
    ):
        report = copy.deepcopy(REPORT)
        report["budget"] |= {
            "budget_seconds": 600.0,
            "counted_seconds": seconds,
            "within_budget": within,
        }
        line = f"{seconds:.1f} s count against the budget of 600.0 s: {verdict}."
        assert line in to_markdown(report)
        assert line in summary(report)


def test_no_comparison_with_xz_without_its_size():
    report = copy.deepcopy(REPORT)
    report["data"]["val_xz_bits_per_byte"] = None
    assert "xz -9e" not in summary(report)
