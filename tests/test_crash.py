"""Promise: at whatever moment a save dies or fails, the run's folder still holds a whole state.

Every system call of a save is counted, failed and died at; what a loss of power may leave of them
is replayed; real processes are killed and fill real disks.
"""

import errno
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from conftest import load as load_file
from test_checkpoint import META
from test_resume import same, state

import train as script
from folio import checkpoint, run_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
KILLED = ["--max_iters=120", "--eval_interval=15", "--snapshot_interval=20", "--num_samples=0"]
CALLS = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir")


def save(folder: Path, iter_num: int) -> None:
    """A save with everything in it: best, a snapshot, and the removal of an older one."""
    tensors = {"model.a": torch.full((999,), float(iter_num))}
    meta = {**META, "run_id": "id", "progress": {"iter_num": iter_num}}
    run_folder.save_run(folder, tensors, meta, best=True, snapshot=True, keep=2)


def load(folder: Path) -> int:
    """The iteration that a resume would start from; its tensors are checked to be of it."""
    ckpt = run_folder.load_latest(folder)
    iter_num = ckpt.meta["progress"]["iter_num"]
    assert (ckpt.tensors["model.a"] == iter_num).all()
    return iter_num


def patch_os(patch: pytest.MonkeyPatch, fake) -> None:
    """Put `fake` in the place of `os` where checkpoints are written."""
    for module in (checkpoint, run_folder):
        patch.setattr(module, "os", fake)


class Died(BaseException):
    pass


class FaultyOS:
    """Stands in for `os`; something happens at the n-th call that changes the disk."""

    def __init__(self, at: int = -1, fault: str = ""):
        self.at, self.fault, self.count = at, fault, 0

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in CALLS:
            return call

        def counted(*args, **kwargs):
            self.count += 1
            if self.count - 1 != self.at:
                return call(*args, **kwargs)
            if self.fault == "die before":
                raise Died
            if self.fault == "die after":
                call(*args, **kwargs)
                raise Died
            if name == "write" and self.fault in ("short", "die within"):
                done = call(args[0], args[1][: len(args[1]) // 2])
                if self.fault == "short":
                    return done
                raise Died
            if self.fault in ("ENOSPC", "EIO"):
                number = getattr(errno, self.fault)
                named = () if name in ("write", "fsync") else (str(args[0]),)  # as the real one
                raise OSError(number, os.strerror(number), *named)
            return call(*args, **kwargs)

        return counted


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run_folder.write_record(folder, {"run_id": "id"})
    for iter_num in (1, 2):
        save(folder, iter_num)
    return folder


def count_calls(folder: Path, monkeypatch) -> int:
    """How many system calls one more save makes."""
    copy = shutil.copytree(folder, folder.with_name("counted"))
    counting = FaultyOS()
    with monkeypatch.context() as patch:
        patch_os(patch, counting)
        save(copy, 3)
    return counting.count


FAULTS = ("ENOSPC", "EIO", "short", "die before", "die after", "die within")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_system_call_of_a_save(folder, tmp_path, monkeypatch, fault):
    calls = count_calls(folder, monkeypatch)
    assert calls > 20
    for at in range(calls):
        copy = shutil.copytree(folder, tmp_path / f"copy{at}")
        with monkeypatch.context() as patch:
            patch_os(patch, FaultyOS(at, fault))
            try:
                save(copy, 3)
                returned = True
            except Died:
                returned = False
            except OSError as error:
                assert error.filename, "it says which file"
                returned = False
        assert load(copy) == 3 if returned else load(copy) in (2, 3), at
        for path in (copy / run_folder.BEST, *run_folder.snapshots(copy)):
            checkpoint.load(path)
        save(copy, 4)
        assert load(copy) == 4 and not list(copy.rglob("*.partial"))
        assert len(run_folder.snapshots(copy)) == 2


# ---- a loss of power ----------------------------------------------------------------------------


class Recorder:
    """Stands in for `os` and notes every change, for Disk to replay."""

    def __init__(self):
        self.log, self.paths = [], {}

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in CALLS:
            return call

        def noted(*args, **kwargs):
            result = call(*args, **kwargs)
            if name == "open":
                self.paths[result] = str(args[0])
                if args[1] & os.O_CREAT:
                    self.log.append(("create", str(args[0])))
            elif name == "write":
                self.log.append(("write", self.paths[args[0]], bytes(args[1][:result])))
            elif name == "fsync":
                self.log.append(("fsync", self.paths[args[0]]))
            else:
                self.log.append((name, *map(str, args)))
            return result

        return noted


class Disk:
    """What a file system promises: data is there once its file was synced, names once their folder
    was; what was not synced may be there, in part or not at all; names change in order."""

    def __init__(self, folder: Path):
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.data = {(p.stat().st_ino): [p.read_bytes(), p.read_bytes()] for p in files}
        self.names = {str(p): p.stat().st_ino for p in files}
        self.pending: list[dict] = []  # the names after each change that is not yet synced
        self.unsynced_folders: set[str] = set()
        self.durable = dict(self.names)
        self.new = itertools.count(-1, -1)

    def do(self, call: str, *args) -> None:
        names = dict(self.names)
        if call == "create":
            names[args[0]] = next(self.new)
            self.data[names[args[0]]] = [b"", b""]
        elif call == "write":
            self.data[names[args[0]]][0] += args[1]
        elif call == "fsync" and args[0] in names:
            data = self.data[names[args[0]]]
            data[1] = data[0]
        elif call == "mkdir":
            self.unsynced_folders.add(args[0])
        elif call == "fsync":  # of a folder: its names, whatever other folders have in mind
            made = {f for f in self.unsynced_folders if str(Path(f).parent) == args[0]}
            self.unsynced_folders -= made
            inside = lambda name: str(Path(name).parent) == args[0]  # noqa: E731
            kept = {k: v for k, v in self.durable.items() if not inside(k)}
            self.durable = kept | {k: v for k, v in names.items() if inside(k)}
            self.pending = []
            if self.durable != names:
                self.pending = [names]
        elif call == "replace":
            if names.get(args[1]) != names[args[0]]:
                names[args[1]] = names.pop(args[0])
        elif call == "link":
            names[args[1]] = names[args[0]]
        elif call == "unlink":
            names.pop(args[0])
        if names != self.names:
            self.names = names
            self.pending.append(names)

    def after_a_crash(self):
        """Every folder that may be found: {name: data}."""
        durable = {
            name: node
            for name, node in self.durable.items()
            if str(Path(name).parent) not in self.unsynced_folders
        }
        for names in (durable, *self.pending):
            for part in (0.0, 0.5, 1.0):
                yield {
                    name: synced + written[len(synced) :][: int(part * len(written))]
                    for name, (written, synced) in ((k, self.data[v]) for k, v in names.items())
                }


@pytest.mark.parametrize("first_snapshot", [False, True])
def test_a_loss_of_power_at_every_moment_of_a_save(folder, tmp_path, monkeypatch, first_snapshot):
    if first_snapshot:
        shutil.rmtree(folder / run_folder.SNAPSHOTS)
    recorder, disk = Recorder(), Disk(folder)
    working = shutil.copytree(folder, tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch_os(patch, recorder)
        save(folder, 3)
    lost = tmp_path / "lost"
    found = {2: 0, 3: 0}
    for number in range(len(recorder.log) + 1):
        for files in disk.after_a_crash():
            shutil.rmtree(lost, ignore_errors=True)
            for name, data in files.items():
                path = lost / Path(name).relative_to(folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            iter_num = load(lost)
            found[iter_num] += 1
            if number == len(recorder.log):
                assert iter_num == 3, "the save had returned"
                assert len(run_folder.snapshots(lost)) >= (1 if first_snapshot else 2)
                for path in (lost / run_folder.BEST, *run_folder.snapshots(lost)):
                    checkpoint.load(path)
        if number < len(recorder.log):
            disk.do(*recorder.log[number])
    assert found[2] > 10 and found[3] > 10
    assert load(working) == 2


# ---- real processes -----------------------------------------------------------------------------


def kill_and_resume(data_dir, tmp_path, rng) -> None:
    """Kill a run at a random moment, again and again until it has come to its end."""
    command = [sys.executable, str(ROOT / "train.py")]
    argv = [*SMALL, *KILLED, f"--data_dir={data_dir}"]
    kills = 0
    while True:
        run = subprocess.Popen(
            [*command, *argv], cwd=tmp_path, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for line in run.stdout:
            if line.startswith("plan:"):
                break
        try:
            run.wait(timeout=rng.uniform(0.05, 1.2) if kills < 3 else 60)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
        run.stdout.close()
        if run.returncode == 0:
            return
        if (tmp_path / "run/ckpt.safetensors").exists():
            argv = ["--init_from=resume", "--out_dir=run"]


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    argv = [*SMALL, *KILLED, f"--data_dir={data_dir}", f"--out_dir={folder / 'run'}"]
    assert script.main(argv) == 0
    return folder / "run"


def check_kills(whole, data_dir, tmp_path, seed):
    kill_and_resume(data_dir, tmp_path, random.Random(seed))
    assert same(state(tmp_path / "run"), state(whole))


def test_three_kills_at_random_moments(whole, data_dir, tmp_path):
    check_kills(whole, data_dir, tmp_path, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 20))
def test_many_kills_at_random_moments(whole, data_dir, tmp_path, seed):
    check_kills(whole, data_dir, tmp_path, seed)


def test_a_full_disk_ends_with_1_and_leaves_the_last_state(train_small, resume_run, tmp_path):
    assert train_small("--max_iters=10", "--num_samples=0") == 0

    def no_file_above_100_kb():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--init_from=resume", "--out_dir=run"]
        + ["--max_iters=20"],
        preexec_fn=no_file_above_100_kb,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "run/ckpt.safetensors" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    _, meta = load_file("run/ckpt.safetensors")
    assert meta["progress"]["iter_num"] == 10
    assert not list(Path("run").rglob("*.partial"))
    assert resume_run("--max_iters=20") == 0


def test_a_disk_without_room_is_said_before_the_run_starts(train_small, monkeypatch, capsys):
    usage = shutil.disk_usage(".")._replace(free=1 << 20)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    assert train_small("--snapshot_interval=1", "--max_iters=20") == 2
    assert "23 checkpoints need about 8 MiB and 1 MiB are free" in capsys.readouterr().err
    assert not Path("run").exists()
    assert train_small("--snapshot_interval=1", "--keep_snapshots=0", "--max_iters=1") == 2


def test_a_resumed_run_needs_no_second_room_for_what_it_saved(train_small, resume_run, monkeypatch):
    words = ("--snapshot_interval=5", "--max_iters=20")
    assert train_small(*words) == 0
    size = Path("run/ckpt.safetensors").stat().st_size
    usage = shutil.disk_usage(".")._replace(free=3 * size)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    assert resume_run(*words) == 0
    assert resume_run("--snapshot_interval=1", "--max_iters=40") == 2, (
        "40 snapshots, and 4 are there"
    )
    assert train_small(*words) == 2, "the older run stays, and takes its room"
