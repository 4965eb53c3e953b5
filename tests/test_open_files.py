"""Promise: no file is renamed, replaced or deleted while it is open, which Windows does not allow.

The rule is emulated by looking at what this process has open.
"""

import os
import sys
from pathlib import Path

import pytest
from conftest import SMALL

import prepare
import train
from data import writer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self")


def open_below(path: os.PathLike) -> set[str]:
    """The open or mapped files that are `path`, or inside it."""
    path, found = os.path.realpath(path), set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass  # that of the listing itself
    maps = Path("/proc/self/maps").read_text().splitlines()
    found |= {"/" + line.partition("/")[2] for line in maps if "/" in line}
    return {name for name in found if name == path or name.startswith(path + "/")}


@pytest.fixture
def windows_rule(monkeypatch):
    for name in ("rename", "replace", "unlink", "rmdir"):
        call = getattr(os, name)

        def checked(*paths, call=call, **kwargs):
            for path in paths:
                if "dir_fd" not in kwargs and (held := open_below(path)):
                    raise PermissionError(13, f"open: {held}", str(path))
            return call(*paths, **kwargs)

        monkeypatch.setattr(os, name, checked)


def test_the_emulation_notices_an_open_file(windows_rule, tmp_path):
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "folder/file", "w"), pytest.raises(PermissionError):
        (tmp_path / "folder").rename(tmp_path / "other")
    (tmp_path / "folder").rename(tmp_path / "other")


def test_prepare_train_and_resume(windows_rule, tmp_path, text, monkeypatch):
    """Each twice, so that older data sets and runs are moved aside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    Path("small.txt").write_text(text)
    for _ in range(2):
        assert prepare.main(["--name=small", "--input=small.txt"]) == 0
    argv = [*SMALL, "--snapshot_interval=4", "--keep_snapshots=2", "--sample_interval=10"]
    for _ in range(2):
        assert train.main(argv) == 0
    resume = ["--init_from=resume", "--out_dir=run"]
    assert train.main([*resume, "--max_iters=30"]) == 0
    snapshot = "--checkpoint=run/snapshots/iter_000024.safetensors"
    assert train.main([*resume, snapshot, "--max_iters=26"]) == 0
    assert Path("run.1/ckpt.safetensors").exists() and Path("data/small.1/train.bin").exists()
