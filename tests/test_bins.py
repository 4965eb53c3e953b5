"""Promise: what prepare.py wrote is read back as it was, and nothing else is taken for it."""

import json
import mmap
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_bins

import prepare
from data import bins
from data.errors import UserError


@pytest.fixture
def folder(data_dir, tmp_path):
    return shutil.copytree(data_dir / "small", tmp_path / "small")


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def truncate(folder):
    with open(folder / "val.bin", "r+b") as file:
        file.truncate(101)


def too_large_id(folder):
    tokens = np.memmap(folder / "val.bin", "<u2", "r+")
    tokens[5] = 60000
    tokens.flush()
    os.utime(folder / "meta.json")  # as old as it, so that the digest is not checked


@pytest.mark.parametrize(
    "damage, says",
    [
        (truncate, "val.bin has 101 bytes"),
        (too_large_id, "token id 60000 is beyond the vocabulary"),
        (lambda f: (f / "train.bin").unlink(), "train.bin is missing"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
        (lambda f: (f / "meta.json").write_text("[1]"), "meta.json cannot be read"),
        (lambda f: (f / "meta.json").write_bytes(b"\xff"), "meta.json cannot be read"),
        (lambda f: change_meta(f, format=2), "format 2 is not 1"),
        (lambda f: change_meta(f, dtype="float64"), "meta.json cannot be read"),
        (lambda f: change_meta(f, splits={}), "meta.json cannot be read"),
        (lambda f: (f / "meta.json").rename(f / "meta.pkl"), "is a pickle"),
    ],
)
def test_a_damaged_data_set_is_refused_in_one_line(folder, damage, says):
    damage(folder)
    with pytest.raises(UserError, match=says):
        bins.load(folder)


@pytest.mark.parametrize(
    "missing, added",
    [
        (["train.bin"], []),
        (["val.bin", "meta.json"], []),
        (["meta.json"], ["meta.pkl"]),
        (bins.OUR_FILES, ["meta.pkl"]),
        (bins.OUR_FILES, []),
    ],
)
def test_the_advice_to_rebuild_works(folder, monkeypatch, missing, added):
    """Also of nanoGPT's data sets, which prepare.py does not replace."""
    for name in missing:
        (folder / name).unlink()
    for name in added:
        (folder / name).touch()
    with pytest.raises(UserError) as caught:
        bins.load(folder)
    monkeypatch.chdir(folder.parent)
    Path("FILE").write_text("some text")
    command = str(caught.value).partition("python prepare.py ")[2]
    assert prepare.main([*command.split(), "--data_dir=."]) == 0


def test_an_id_beyond_the_vocabulary_is_noticed_when_it_is_drawn(folder, monkeypatch):
    monkeypatch.setattr(bins, "CHECKED_IDS", 0)  # as in a split too large to check whole
    too_large_id(folder)
    dataset = bins.load(folder)
    dataset.val.batch(np.array([6]), 10)
    with pytest.raises(UserError, match="token id 60000"):
        dataset.val.batch(np.array([0]), 10)


def test_nanogpt_bins_are_gpt2_tokens(tmp_path):
    for split in bins.SPLITS:
        np.arange(1000, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    dataset = bins.load(tmp_path)
    assert dataset.vocab_size == 50257 and dataset.tokenizer == {"kind": "gpt2"}
    assert dataset.val.tokens[999] == 999 and dataset.val.n_bytes is None


def test_large_vocabularies_take_four_bytes(tmp_path):
    ids = np.array([0, 65536, 3], np.uint32)
    write_bins(tmp_path / "large", ids, 65537)
    dataset = bins.load(tmp_path / "large")
    assert dataset.train.tokens.dtype == np.uint32
    assert dataset.train.tokens.tolist() == ids.tolist()


def test_the_bigram_baseline_is_the_entropy_of_pairs():
    """On the text it counted, and with many of each pair, the smoothing does not matter."""
    tokens = np.tile(np.array([0, 1, 0, 2], np.uint16), 5000)  # after 0: 1 or 2; after them: 0
    assert bins.bigram_loss(tokens, tokens, 3) == pytest.approx(np.log(2) / 2, abs=1e-3)


def test_the_bigram_baseline_survives_pairs_never_seen():
    seen, unseen = np.zeros(100, np.uint16), np.arange(5, dtype=np.uint16)
    assert np.isfinite(bins.bigram_loss(seen, unseen, 5))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_read_does_not_stay_in_memory(tmp_path):
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    path, n_tokens = tmp_path / "train.bin", 2**25
    np.zeros(n_tokens, "<u2").tofile(path)
    split = bins.Split(path, np.memmap(path, "<u2", "r"), 2, None)
    before, starts = resident_bytes(), np.arange(0, n_tokens, 2048)
    for i in range(0, len(starts), 64):
        split.batch(starts[i : i + 64], 16)
    assert resident_bytes() - before < path.stat().st_size / 4
