"""A disk that refuses, and data that goes away: one sentence, and nothing is lost."""

import builtins
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import pgl.io
from callbacks import RunCheckpoint
from callbacks.run_checkpoint import checkpoint_bytes
from pgl.cli import main
from pgl.data import Shards, TokenDataModule
from pgl.data.shards import ShardError, write_shard
from pgl.data.stream import TokenStream
from pgl.errors import DiskError
from pgl.io import atomic_write, check_folder, remove_stale


class FullDisk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, path, mode: str, room_bytes: int) -> None:
        self._file = builtins.open(path, mode)  # noqa: SIM115
        self._room_bytes = room_bytes

    def write(self, data) -> int:
        self._room_bytes -= len(data)
        if self._room_bytes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def fill_disk(monkeypatch, room_bytes: int = 20_000) -> None:
    monkeypatch.setattr(
        pgl.io, "open", lambda path, mode: FullDisk(path, mode, room_bytes), raising=False
    )


class FillDiskAfter(Callback):
    def __init__(self, monkeypatch, step: int) -> None:
        self.monkeypatch = monkeypatch
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            fill_disk(self.monkeypatch)


def test_a_full_disk_in_a_checkpoint_leaves_and_names_the_one_before(golf_run, monkeypatch):
    extra = (FillDiskAfter(monkeypatch, 3),)
    run = golf_run(fit=False, checkpoint=RunCheckpoint(every_steps=2), extra=extra)
    with pytest.raises(
        DiskError, match=r"No space left on device; the file .* before is whole"
    ) as e:
        run.trainer.fit(run.module, datamodule=run.data)
    path = run.folder / "last.ckpt"
    assert f"of step 2: resume with --ckpt_path {path}" in e.value.__notes__[0]
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert not list(run.folder.glob(".*.tmp"))
    monkeypatch.undo()
    again = golf_run("again", ckpt_path=path)
    assert torch.equal(parameters(again), parameters(golf_run("whole")))


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.module.gpt.parameters()])


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_file_that_cannot_be_opened_is_one_sentence(tmp_path, monkeypatch, number):
    def refuse(path, mode):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pgl.io, "open", refuse, raising=False)
    text = f"cannot write .*x.bin: {os.strerror(number)}$"
    with pytest.raises(DiskError, match=text), atomic_write(tmp_path / "x.bin") as file:
        file.write(b"abc")


def test_another_error_keeps_its_own_text(tmp_path):
    def missing():
        with atomic_write(tmp_path / "x.bin"):
            raise FileNotFoundError(errno.ENOENT, "what is read meanwhile")

    with pytest.raises(FileNotFoundError, match="what is read meanwhile"):
        missing()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_takes_no_file_is_refused_before_training(golf_run, monkeypatch, number):
    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    run = golf_run(fit=False)
    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(DiskError, match=f"cannot write to .*run .{os.strerror(number)}."):
        run.trainer.fit(run.module, datamodule=run.data)
    assert run.trainer.global_step == 0


def test_room_for_checkpoints_and_artifact_is_checked_before_training(golf_run, monkeypatch):
    run = golf_run(fit=False)
    usage = shutil.disk_usage(run.trainer.default_root_dir)._replace(free=16_100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskError, match=r"has 16.1 MB free but two checkpoints and the artifact"):
        run.trainer.fit(run.module, datamodule=run.data)
    assert run.trainer.global_step == 0


def test_the_estimate_is_close_to_the_checkpoint(golf_run):
    run = golf_run()
    tensors = checkpoint_bytes(run.trainer, run.module)
    assert tensors <= (run.folder / "last.ckpt").stat().st_size <= tensors + 100_000


def test_there_is_room_for_nothing(tmp_path):
    check_folder(tmp_path / "new", 0, "nothing")
    assert list((tmp_path / "new").iterdir()) == []


def test_only_what_dead_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f".last.ckpt.{pgl.io._host()}.{dead.pid}.tmp": False,
        f".last.ckpt.{pgl.io._host()}.{os.getpid()}.tmp": False,
        f".last.ckpt.{pgl.io._host()}.{os.getppid()}.tmp": True,
        f".last.ckpt.elsewhere.{dead.pid}.tmp": True,
        "last.ckpt": True,
        ".notes.tmp": True,
    }
    for name in names:
        (tmp_path / name).touch()
    assert len(remove_stale(tmp_path)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {n for n, stays in names.items() if stays}


def test_a_run_removes_what_a_killed_one_left(golf_run, tmp_path):
    litter = tmp_path / "run" / f".last.ckpt.{pgl.io._host()}.{os.getpid()}.tmp"
    litter.parent.mkdir()
    litter.touch()
    golf_run()
    assert not litter.exists()


@pytest.fixture
def own_shards(tiny_corpus, tmp_path) -> Shards:
    shutil.copytree(tiny_corpus.directory, tmp_path / "shards")
    return Shards(str(tmp_path / "shards"), tiny_corpus.tokenizer_path)


class Spoil(Callback):
    """Spoils the first training shard after some steps, and waits for the reader to come there."""

    def __init__(self, folder: Path, how: str, step: int) -> None:
        [self.shard, *_] = sorted(folder.glob("fineweb_train_*.bin"))
        self.how = how
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and self.shard.exists():
            if self.how == "deleted":
                self.shard.unlink()
            else:
                os.truncate(self.shard, 2000)


@pytest.mark.parametrize(("how", "says"), [("deleted", "was deleted"), ("cut", "was changed")])
@pytest.mark.parametrize("step", [3, 5])
def test_data_that_goes_away_is_named_and_nothing_is_lost(golf_run, own_shards, how, says, step):
    data = TokenDataModule(
        own_shards,
        seq_len=32,
        batch_tokens=256,
        micro_batch_tokens=64,
        spans_per_batch=4,
        val_batch_windows=8,
        max_val_tokens=400,
    )
    spoil = Spoil(Path(own_shards.directory), how, step)
    run = golf_run(fit=False, data=data, checkpoint=RunCheckpoint(every_steps=2), extra=(spoil,))
    with pytest.raises(ShardError, match=f"{spoil.shard.name} {says} while the run") as caught:
        run.trainer.fit(run.module, datamodule=run.data)
    saved = torch.load(run.folder / "last.ckpt", weights_only=True)["global_step"]
    assert saved >= 2
    assert f"of step {saved}: resume with" in caught.value.__notes__[0]


def test_a_shard_that_is_rewritten_is_noticed_at_the_next_read(tmp_path):
    write_shard(tmp_path / "x.bin", np.arange(100))
    stream = TokenStream([tmp_path / "x.bin"], 100)
    stream.read(0, 10)
    stream.check_unchanged()
    os.utime(tmp_path / "x.bin", ns=(0, 0))
    with pytest.raises(ShardError, match="was changed"):
        stream.read(0, 10)
    with pytest.raises(ShardError, match="was changed"):
        stream.check_unchanged()


def test_the_command_line_says_it_in_one_line(tmp_path, tiny_corpus, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "fit",
        "--data.source=pgl.data.Shards",
        f"--data.source.directory={tiny_corpus.directory}",
        f"--data.source.tokenizer_path={tiny_corpus.tokenizer_path}",
        "--data.seq_len=32",
        "--data.batch_tokens=256",
        "--data.max_val_tokens=400",
        "--model.gpt={vocab_size: 320, num_layers: 2, model_dim: 32, num_heads: 2, "
        "num_kv_heads: 1, mlp_hidden: 48}",
        "--budget={seconds: null, steps: 1, warmup_steps: 0}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--validation.stride_tokens=8",
    ]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "MB free but two checkpoints" in capsys.readouterr().err.splitlines()[-1]
