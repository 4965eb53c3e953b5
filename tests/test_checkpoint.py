"""Promise: a checkpoint is a plain safetensors file that is loaded only when it is whole."""

import hashlib
import os
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import load

import runs
from data.errors import UserError
from folio import checkpoint, run_folder
from folio.checkpoint import Checkpoint

TENSORS = {
    "model.a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "model.byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "model.half": torch.randn(3, 1).bfloat16(),
    "optimizer.step.a": torch.tensor(7.0),
    "model.long": torch.tensor([2**40]),
    "model.empty": torch.empty(0, 4),
}
META = {key: kind() for key, kind in checkpoint.META.items()}
META |= {"progress": {"iter_num": 3, "val_loss": 0.1 + 0.2}, "run_id": "é\n"}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "ckpt.safetensors", TENSORS, META)
    return tmp_path / "ckpt.safetensors"


def test_what_was_saved_is_loaded(path):
    tensors, meta = load(path)
    assert meta == {"format": 1, **META}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def test_any_safetensors_reader_reads_it(path):
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == TENSORS.keys() | {"sha256"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(path, "pt") as file:
        assert '"iter_num": 3' in file.metadata()["folio"]


def test_the_last_tensor_is_the_digest_of_the_rest(path):
    data = path.read_bytes()
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]


def test_views_are_saved_as_what_they_show(tmp_path):
    path = tmp_path / "x.safetensors"
    table = torch.arange(12.0).view(3, 4)
    checkpoint.save(path, {"model.column": table[:, 1], "model.t": table.T}, META)
    tensors, _ = load(path)
    assert torch.equal(tensors["model.column"], table[:, 1])
    assert torch.equal(tensors["model.t"], table.T)


def test_saving_leaves_no_other_file(path):
    checkpoint.save(path, TENSORS, META)
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.safetensors"]


def test_every_length_but_the_whole_is_refused(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a usable checkpoint"):
            checkpoint.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError):
        checkpoint.load(path)


def test_every_changed_byte_is_noticed(path):
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        with pytest.raises(UserError):
            checkpoint.load(path)


def rewrite(path, old, new):
    """Change the header and make the digest right again, as a hostile file would."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(old, new)
    body = struct.pack("<Q", len(header)) + header + data[8 + length : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"shape": [2, 3]', b'"shape": [2, 4]'),
        (b'"shape": [2, 3]', b'"shape": [-2, -3]'),
        (b'"shape": [2, 3]', b'"shape": [2000000000000, 3]'),
        (b'"shape": [2, 3]', b'"shape": ["2", 3]'),
        (b'"shape": [2, 3]', b'"shape": 6'),
        (b'"dtype": "F32"', b'"dtype": "F64"'),
        (b'"dtype": "F32"', b'"dtype": "X"'),
        (b'"data_offsets": [0, 8]', b'"data_offsets": [8, 0]'),
        (b'"data_offsets": [0, 8]', b'"data_offsets": [0]'),
        (b'"data_offsets": [0, 8]', b'"data_offsets": [0, 1e99]'),
        (b'"__metadata__"', b'"_"'),
        (b'"folio"', b'"other"'),
        (b'\\"format\\": 1', b'\\"format\\": 2'),
        (b'"sha256"', b'"sha255"'),
        (b'\\"threads\\": 0', b'\\"threads\\": {}'),
        (b'\\"model_config\\"', b'\\"model_confib\\"'),
    ],
)
def test_a_header_that_lies_is_refused(path, old, new):
    assert old in path.read_bytes()
    rewrite(path, old, new)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        checkpoint.load(path)


def test_bytes_that_the_header_does_not_name_are_refused(path):
    body = path.read_bytes()[:-32] + b"\0" * 64
    path.write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(UserError, match="longer than its header says"):
        checkpoint.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other"
    safetensors.torch.save_file({"a": torch.ones(100)}, path)
    with pytest.raises(UserError, match="it has no digest"):
        checkpoint.load(path)
    torch.save({"a": torch.ones(100)}, path)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        checkpoint.load(path)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot open"):
            checkpoint.load(missing)


def save_run(folder, iter_num, best=False, snapshot=False, keep=0):
    tensors = {"model.a": torch.full((3,), float(iter_num))}
    meta = {**META, "progress": {"iter_num": iter_num}, "threads": iter_num}
    run_folder.save_run(folder, tensors, meta, best, snapshot, keep)


def iterations(folder):
    files = sorted(folder.rglob("*.safetensors"))
    return {str(p.relative_to(folder)): load(p)[1]["threads"] for p in files}


def test_best_and_snapshots_stay_while_the_latest_moves_on(tmp_path):
    save_run(tmp_path, 1, best=True, snapshot=True)
    save_run(tmp_path, 2)
    save_run(tmp_path, 3, snapshot=True)
    assert iterations(tmp_path) == {
        "best.safetensors": 1,
        "ckpt.safetensors": 3,
        "snapshots/iter_000001.safetensors": 1,
        "snapshots/iter_000003.safetensors": 3,
    }
    best, first = tmp_path / "best.safetensors", tmp_path / "snapshots/iter_000001.safetensors"
    assert os.path.samefile(best, first), "one file under two names"
    assert not list(tmp_path.rglob("*.partial"))


def test_linking_what_is_linked_already_harms_nothing(tmp_path):
    save_run(tmp_path, 1, best=True, snapshot=True)
    run_folder.link_latest(tmp_path, 1, best=True, snapshot=True)
    save_run(tmp_path, 2)
    assert sorted(iterations(tmp_path).values()) == [1, 1, 2]


def test_where_links_fail_copies_serve(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    save_run(tmp_path, 1, best=True)
    save_run(tmp_path, 2)
    assert iterations(tmp_path) == {"best.safetensors": 1, "ckpt.safetensors": 2}


def test_only_the_newest_snapshots_are_kept(tmp_path):
    for iter_num in (999_998, 999_999, 1_000_000, 1_000_001):
        save_run(tmp_path, iter_num, snapshot=True, keep=2)
    kept = iterations(tmp_path / "snapshots")
    assert sorted(kept.values()) == [1_000_000, 1_000_001]


def test_a_model_of_another_shape_is_named():
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    for tensors, says in [
        ({"model.a": torch.ones(2, 3)}, "lacks tensor model.b"),
        ({"model.a": torch.ones(3, 2), "model.b": torch.ones(1)}, r"\(3, 2\) of .*, not \(2, 3\)"),
        ({f"model.{n}": torch.ones(1) for n in "abc"}, "unknown tensor model.c"),
    ]:
        with pytest.raises(UserError, match=says):
            checkpoint.restore(Checkpoint("x", tensors, {}), "model.", params)


def test_verify_reads_nothing_where_a_path_means_nothing(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save_run(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / name) for name in ("run", "empty")]
    assert runs.main(["verify", *paths]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("empty is a folder without checkpoints\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        checkpoint.load(tmp_path / "f.safetensors")
