"""Promise: whatever the bytes of a file, it is loaded whole or refused in one line."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_bins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model
from data import bins, tokenizer
from data.errors import UserError
from folio import checkpoint, run_folder
from folio.generation import generate

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "sha256", "model.a"])
quick = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150)


def load_or_refuse(load, *args) -> None:
    try:
        load(*args)
    except UserError as error:
        assert len(str(error)) < 2000


@quick
@given(st.binary(max_size=300))
def test_random_bytes_as_a_checkpoint(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt.safetensors"
        path.write_bytes(data)
        load_or_refuse(checkpoint.load, path)
        load_or_refuse(run_folder.load_latest, Path(folder))
        load_or_refuse(tokenizer.stored_in, path)


@quick
@given(st.dictionaries(FIELDS, JSON | st.dictionaries(FIELDS, JSON)), st.binary(max_size=80))
def test_random_headers(header, rest):
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        load_or_refuse(checkpoint.load, path)


@quick
@given(st.dictionaries(st.sampled_from(list(checkpoint.META)), JSON))
def test_a_checkpoint_with_random_meta(meta):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt.safetensors"
        checkpoint.save(path, {"model.a": torch.zeros(2)}, meta)
        load_or_refuse(checkpoint.load, path)
        load_or_refuse(run_folder.load_latest, Path(folder))


META_FIELDS = ["format", "dtype", "vocab_size", "tokenizer", "splits", "train", "val", "tokens"]


@quick
@given(
    st.dictionaries(st.sampled_from(META_FIELDS), JSON | st.dictionaries(st.text(), JSON))
    | st.binary(max_size=50),
    st.binary(max_size=50),
)
def test_random_meta_json_and_bins(meta, data):
    with tempfile.TemporaryDirectory() as folder:
        text = meta if type(meta) is bytes else json.dumps({"format": 1, **meta}).encode()
        (Path(folder) / "meta.json").write_bytes(text)
        for split in bins.SPLITS:
            (Path(folder) / f"{split}.bin").write_bytes(data)
        load_or_refuse(bins.load, Path(folder))
        load_or_refuse(tokenizer.stored_in, Path(folder))


PLACES = [("format",), ("dtype",), ("vocab_size",), ("tokenizer",), ("splits",), ("sources",)]
PLACES += [("splits", "val"), *(("splits", "val", x) for x in ("tokens", "bytes", "sha256"))]


@quick
@given(st.sampled_from(PLACES), JSON | st.sampled_from([0, -1, 10**400, "uint32", "7"]))
def test_a_meta_json_with_one_thing_changed(place, value):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "data"
        write_bins(folder, np.arange(40) % 7, 7)
        meta = json.loads((folder / "meta.json").read_text())
        about = meta
        for key in place[:-1]:
            about = about[key]
        about[place[-1]] = value
        (folder / "meta.json").write_text(json.dumps(meta))
        try:
            dataset = bins.load(folder)
        except UserError as error:
            assert "data" in str(error)
            return
        idx, _ = dataset.val.batch(np.array([0, 35]), 8)
        assert idx.max() < dataset.vocab_size <= 2**32
        assert dataset.val.n_bytes is None or 0 < len(idx) / dataset.val.n_bytes < np.inf
        load_or_refuse(tokenizer.load, dataset.tokenizer)


def test_a_meta_json_too_deep_to_read(tmp_path):
    for split in bins.SPLITS:
        (tmp_path / f"{split}.bin").write_bytes(b"")
    (tmp_path / "meta.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="meta.json cannot be read"):
        bins.load(tmp_path)


@quick
@given(JSON | st.dictionaries(st.sampled_from(["kind", "characters", "tokens", "normalize"]), JSON))
def test_random_tokenizers(meta):
    load_or_refuse(tokenizer.load, meta)


@quick
@given(st.binary(max_size=60))
def test_random_bytes_as_runs_record(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / run_folder.RECORD).write_bytes(data)
        load_or_refuse(run_folder.load_latest, Path(folder))


@quick
@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_the_likeliest_id_three_ways(seed, vocab_size):
    """top_k=1 is temperature 0 is argmax, where no two logits are equal."""
    torch.manual_seed(seed)
    config = model.GPTConfig(1, 1, 8, 8, vocab_size)
    gpt = model.GPT(config).eval()
    idx = torch.randint(vocab_size, (2, 5))
    uniforms = torch.from_numpy(np.random.default_rng(seed).random((2, 6)))
    by_top_k = torch.stack(list(generate(gpt, idx, uniforms, top_k=1)))
    greedy = torch.stack(list(generate(gpt, idx, uniforms, temperature=0)))
    assert torch.equal(by_top_k, greedy)
    assert torch.equal(greedy[0], gpt(idx)[0][:, -1].argmax(-1))


@pytest.mark.soak
@settings(deadline=None, max_examples=20_000)
@given(st.binary(max_size=3000))
def test_many_random_bytes(data):
    test_random_bytes_as_a_checkpoint.hypothesis.inner_test(data)
