"""Promise: a damaged checkpoint is always noticed, and the newest that is whole takes its place."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load

import runs
import sample
from data.errors import UserError
from folio import checkpoint, run_folder

LATEST = Path("run/ckpt.safetensors")


@pytest.fixture
def run(train_small, capsys):
    """A run with snapshots of iterations 10, 20 and 30, the best of which is the last."""
    assert train_small("--max_iters=30", "--snapshot_interval=10", "--num_samples=0") == 0
    capsys.readouterr()


def damage(path: Path, change) -> None:
    """Change a file under this name alone, not under its other names."""
    data = bytearray(path.read_bytes())
    change(data)
    path.unlink()
    path.write_bytes(data)


def flip(place: int, bit: int = 0):
    def change(data):
        data[place] ^= 1 << bit

    return change


def test_truncations_and_flipped_bits_are_all_noticed(run):
    rng, data = random.Random(0), LATEST.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    copy = Path("copy.safetensors")
    lengths = [*range(12), header - 1, header, header + 1, len(data) - 33, len(data) - 32]
    lengths += [len(data) - 1, *(rng.randrange(len(data)) for _ in range(64))]
    for length in lengths:
        copy.write_bytes(data[:length])
        with pytest.raises(UserError):
            checkpoint.load(copy)
    places = [rng.randrange(header) for _ in range(128)]
    places += [rng.randrange(header, len(data)) for _ in range(128)] + [len(data) - 1, 0, 7]
    for place in places:
        changed = bytearray(data)
        flip(place, rng.randrange(8))(changed)
        copy.write_bytes(changed)
        with pytest.raises(UserError):
            checkpoint.load(copy)
    copy.write_bytes(bytes(len(data)))
    with pytest.raises(UserError):
        checkpoint.load(copy)
    copy.write_bytes(data)
    checkpoint.load(copy)


@pytest.mark.parametrize(
    "change",
    [flip(-5000), flip(3), lambda data: data.__delitem__(slice(4000, None)), bytearray.clear],
    ids=["bit", "header", "cut", "empty"],
)
def test_the_newest_whole_one_takes_its_place(run, resume_run, capsys, change):
    whole, _ = load(LATEST)
    damage(LATEST, change)
    damage(Path("run/best.safetensors"), change)
    damage(Path("run/snapshots/iter_000030.safetensors"), change)
    assert resume_run() == 0
    out = capsys.readouterr().out
    assert "run/ckpt.safetensors is not a usable checkpoint" in out
    assert "resuming from run/snapshots/iter_000020.safetensors, iteration 20" in out
    again, _ = load(LATEST)
    assert all((whole[name] == again[name]).all() for name in whole)
    assert [load(p)[1]["progress"]["iter_num"] for p in run_folder.snapshots(Path("run"))]


def test_a_missing_latest_is_no_fresh_start(run, resume_run, capsys):
    LATEST.unlink()
    assert resume_run() == 0
    out = capsys.readouterr().out
    assert "cannot open checkpoint run/ckpt.safetensors" in out and "iteration 30" in out


def test_a_bad_sector_is_damage_too(run, resume_run, monkeypatch, capsys):
    def open_file(path, mode):
        if path == LATEST:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(path, mode)

    monkeypatch.setattr(checkpoint, "open", open_file, raising=False)
    assert runs.main(["verify", "run"]) == 2
    out = capsys.readouterr().out
    assert "cannot open checkpoint run/ckpt.safetensors: Input/output error" in out
    assert out.count(": OK") == 4
    assert resume_run() == 0
    assert "iteration 30" in capsys.readouterr().out


def test_with_none_that_is_whole_nothing_is_done(run, resume_run, capsys):
    for path in Path("run").rglob("*.safetensors"):
        damage(path, flip(-5000))
    assert resume_run() == 2
    captured = capsys.readouterr()
    assert "none of the 4 others can be used either" in captured.err
    assert captured.err.count("\n") == 1
    assert "plan:" not in captured.out


def test_another_runs_file_is_not_taken_for_this_runs(run, train_small, resume_run, capsys):
    assert train_small("--out_dir=other", "--max_iters=40", "--num_samples=0") == 0
    LATEST.unlink()
    shutil.copy("other/ckpt.safetensors", LATEST)
    assert resume_run() == 0
    out = capsys.readouterr().out
    assert "run/ckpt.safetensors belongs to another run" in out and "iteration 30" in out


def test_nothing_that_is_replaced_is_lost(run, train_small, resume_run):
    """Another run's checkpoint that was moved into the folder is whole somewhere afterwards."""
    assert train_small("--out_dir=other", "--max_iters=7", "--num_samples=0") == 0
    other = Path("other/ckpt.safetensors").read_bytes()
    LATEST.unlink()
    shutil.copy("other/ckpt.safetensors", LATEST)
    assert resume_run() == 0
    assert other in [path.read_bytes() for path in Path("run").rglob("*.safetensors")]


def test_a_checkpoint_of_no_run_and_of_another_run(run, train_small, capsys):
    import train as script

    Path("keep").mkdir()
    shutil.copy(LATEST, "keep/x.safetensors")
    Path("keep/metrics.csv").write_text("date,price")
    assert train_small("--out_dir=other", "--max_iters=7", "--num_samples=0") == 0
    shutil.copy("other/ckpt.safetensors", "run/foreign.safetensors")
    before = LATEST.read_bytes()
    for path, says in (
        (
            "keep/x.safetensors",
            "is not in a run's folder; to start from it: --init_from=keep/x.saf",
        ),
        ("run/foreign.safetensors", "run/foreign.safetensors belongs to another run"),
        ("keep", "cannot open checkpoint keep: no such file"),
    ):
        capsys.readouterr()
        assert script.main(["--init_from=resume", f"--checkpoint={path}"]) == 2
        assert says in capsys.readouterr().err
    assert Path("keep/metrics.csv").read_text() == "date,price" and LATEST.read_bytes() == before
    snapshot = Path("run/snapshots/iter_000010.safetensors").absolute()
    argv = ["--init_from=resume", f"--checkpoint={snapshot}", "--out_dir=run", "--max_iters=12"]
    assert script.main(argv) == 0


def test_a_damaged_metrics_csv_ends_no_run(run, resume_run):
    path = Path("run/metrics.csv")
    lines = path.read_text().splitlines(keepends=True)
    odd = ["3,abc,xyz,zzz,,,,,,,,1.0\n", '5,"' + "x" * 200_000 + "\n", "\0\0\0\n"]
    path.write_text("".join([*lines, *odd]))
    assert resume_run("--max_iters=32") == 0
    assert "".join(lines) in path.read_text() and "zzz" not in path.read_text()


def test_a_linked_folder_stays_a_link(train_small):
    Path("disk").mkdir()
    Path("link").symlink_to("disk", target_is_directory=True)
    for _ in range(2):
        assert train_small("--out_dir=link", "--max_iters=1", "--num_samples=0") == 0
    assert Path("link").is_symlink() and Path("disk.1/ckpt.safetensors").exists()
    assert Path("disk/ckpt.safetensors").exists()


@pytest.mark.parametrize("name", ["$\\foo$", "床前"])
def test_any_name_can_stand_on_the_picture(train_small, name, recwarn):
    assert train_small(f"--out_dir={name}", "--max_iters=1", "--num_samples=0") == 0
    assert Path(name, "loss.png").exists()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_retention_never_deletes_the_newest_whole_one(train_small, resume_run):
    argv = ("--snapshot_interval=5", "--keep_snapshots=1", "--num_samples=0")
    assert train_small(*argv, "--max_iters=10") == 0
    damage(LATEST, flip(-5000))
    assert resume_run("--max_iters=15") == 0
    damage(LATEST, flip(-5000))
    assert resume_run("--max_iters=20") == 0
    assert len(run_folder.snapshots(Path("run"))) == 1


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t, m: m["model_config"].update(n_embd=4096), ", 4096) of torch.float32"),
        (lambda t, m: m["model_config"].update(n_embd=10**5, n_layer=1000), "lacks tensor model.h"),
        (lambda t, m: m["model_config"].update(block_size=10**7), "not (10000000, 32) of"),
        (lambda t, m: m["model_config"].update(n_layer="2"), "n_layer must be a whole number"),
        (lambda t, m: m["model_config"].update(extra=1), "unknown option 'extra'"),
        (lambda t, m: m.update(model="oracle"), "has a model 'oracle'"),
        (lambda t, m: t.update({"model.ln_f.weight": t["model.ln_f.weight"].int()}), "torch.int32"),
        (lambda t, m: t.pop("model.wte.weight"), "lacks tensor model.wte.weight"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_that_of_its_tensors(
    run, train_small, resume_run, capsys, change, says
):
    """Refused in a line, by whoever loads it, before anything of such a size is allocated."""
    tensors, meta = load(LATEST)
    change(tensors, meta)
    checkpoint.save(LATEST, tensors, meta)  # with a digest that is right
    options = {
        "--checkpoint=run/ckpt.safetensors": sample.main,
        "--init_from=run/ckpt.safetensors": train_small,
    }
    for argv, main in (*options.items(), ("--max_iters=40", resume_run)):
        assert main([argv] if main is sample.main else argv) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err


def test_the_script_shows_and_verifies(run, capsys):
    assert runs.main(["show", "run/ckpt.safetensors"]) == 0
    out = capsys.readouterr().out
    for part in (": OK", "28,000 parameters", "iter_num = 30", "val_loss", "n_embd"):
        assert part in out, part
    assert runs.main(["verify", "run"]) == 0
    assert capsys.readouterr().out.count(": OK") == 5
    damage(Path("run/best.safetensors"), flip(-5000))
    assert runs.main(["verify", "run"]) == 2
    assert capsys.readouterr().out.count("its digest does not match") == 1
    for argv in (["show"], ["burn", "run"], ["show", "nowhere"], ["show", "."]):
        assert runs.main(argv) == 2


LOADING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, train
from data import bins, tokenizer
from folio import checkpoint, run_folder

def load():
    ckpt = run_folder.open_checkpoint("run/best.safetensors")
    checkpoint.build_model(ckpt)
    run_folder.load_latest(Path("run"))
    tokenizer.load(ckpt.meta["tokenizer"])
    tokenizer.stored_in(Path("run"))
    bins.load(Path(sys.argv[2]) / "small")

load()  # what is imported on first use is imported
events = []
watched = ("pickle.find_class", "exec", "compile", "import", "os.system", "subprocess.Popen")
sys.addaudithook(lambda name, args: events.append((name, args)) if name in watched else None)
load()
print(events)
"""


def test_loading_runs_nothing(run, data_dir):
    command = [sys.executable, "-c", LOADING, str(ROOT), str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_script_unpickles_or_evaluates():
    folders = (".", "config", "data", "folio")
    scripts = [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]
    assert len(scripts) > 25
    for path in scripts:
        if path.name == "convert.py":
            continue
        text = path.read_text("utf-8").replace(".eval()", "")
        for word in ("import pickle", "torch.load(", "eval(", "exec(", "allow_pickle"):
            assert word not in text, (path, word)
