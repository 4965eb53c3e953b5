"""Promise: a data set does not depend on how many processes make it, nor on how often they die."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import ROOT, needs_gpt2_vocabulary

import prepare
from data import bins, workers, writer

pytestmark = needs_gpt2_vocabulary
# a large corpus, so to speak: worker processes, and a record of the progress after every batch, and
# a pause, so that the process is not done before it is killed
RUN = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import prepare
from data import writer
prepare.LARGE_BYTES = writer.SAVE_SECONDS = 0
save = writer.Writer.save
writer.Writer.save = lambda *args: (save(*args), time.sleep(0.1))[0]
sys.exit(prepare.main(sys.argv[1:]))
"""
ARGV = ["--name=mine", "--input", "a.jsonl", "b.txt", "--separator=\n\n", "--tokenizer=gpt2"]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with JSON lines and a plain file, 3 MB of words, and the data set of them."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    documents = [" ".join(rng.choices(words, k=400)) for _ in range(1200)]
    lines = [json.dumps({"text": document}) + "\n" for document in documents[:700]]
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.txt").write_text("\n\n".join(documents[700:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert prepare.main([*ARGV, "--workers=1"]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """An empty folder with the same text, in which the test runs."""
    for name in ("a.jsonl", "b.txt"):
        shutil.copy2(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    return tmp_path


def start(*argv: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, *ARGV, *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


def interrupted(n_batches: int, act=subprocess.Popen.kill, code: int = -signal.SIGKILL) -> str:
    """Start the command, act on its process after that many records of progress, and return what
    it printed on stderr."""
    process, seen = start("--workers=2"), set()
    while len(seen) < n_batches:
        assert process.poll() is None, process.stderr.read()
        for record in Path().glob("data/.mine.*.partial/progress.json"):
            seen.add(record.read_text())
    act(process)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    return err


def children(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in found.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_the_same(made: Path) -> bool:
    """Whether the data set here is the one that was made in one go; and nothing else is left."""
    same = all(
        Path("data/mine", name).read_bytes() == (made / "data/mine" / name).read_bytes()
        for name in ("train.bin", "val.bin", "meta.json")
    )
    return same and [path.name for path in Path("data").iterdir()] == ["mine"]


@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_any_number_of_processes(made, here, n_workers):
    process = start(f"--workers={n_workers}")
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert is_the_same(made)


@pytest.mark.parametrize("seed", range(2))
def test_killed_and_started_again(made, here, seed, capsys):
    rng = random.Random(f"{seed} {time.time()}")
    for _ in range(2):
        n_batches, delay = rng.randint(1, 3), rng.random() / 10

        def later(process, delay=delay):
            time.sleep(delay)
            process.kill()

        interrupted(n_batches, later)
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    assert "continuing after" in capsys.readouterr().out
    assert is_the_same(made)


def test_what_is_finished_is_not_encoded_again(made, here, monkeypatch, capsys):
    interrupted(5)
    encode_batch, n_bytes = workers.encode_batch, []

    def counted(tok, batch):
        n_bytes.append(sum(len(text.text) for text in batch))
        return encode_batch(tok, batch)

    monkeypatch.setattr(workers, "encode_batch", counted)
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    out = capsys.readouterr().out
    megabytes = float(out.partition("continuing after ")[2].partition(" MB")[0])
    splits = json.loads(Path("data/mine/meta.json").read_text())["splits"]
    total = sum(entry["bytes"] for entry in splits.values())
    assert megabytes > 1 and abs(sum(n_bytes) / 1e6 + megabytes - total / 1e6) < 0.06
    assert is_the_same(made)


def test_a_file_that_is_done_is_not_opened_again(made, here, monkeypatch, capsys):
    n_bytes = Path("a.jsonl").stat().st_size
    interrupted(n_bytes // prepare.PIECE_BYTES + 2)
    read = []

    def noted(path, *args, utf8_blocks=prepare.Texts.pieces.__globals__["formats"].utf8_blocks):
        read.append(path.name)
        return utf8_blocks(path, *args)

    monkeypatch.setattr("data.formats.utf8_blocks", noted)
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    assert set(read) == {"b.txt"}
    assert is_the_same(made)


@pytest.mark.parametrize("change", ["option", "input"])
def test_another_command_starts_anew(made, here, change, capsys):
    interrupted(3)
    argv = ARGV
    if change == "option":
        argv = [*ARGV, "--normalize=NFC"]
    else:
        text = Path("b.txt").read_bytes()
        Path("b.txt").write_bytes(text[:-1] + b"!")
    assert prepare.main([*argv, "--workers=1"]) == 0
    out = capsys.readouterr().out
    assert "continuing" not in out and "an unfinished data/mine of another command" in out
    train, val = (Path("data/mine", f"{split}.bin").read_bytes() for split in bins.SPLITS)
    assert (train[:999] == (made / "data/mine/train.bin").read_bytes()[:999]) and val
    assert [path.name for path in Path("data").iterdir()] == ["mine"]


def test_a_record_of_more_than_there_is(made, here, capsys):
    """As when the disk lost what was not written yet."""
    interrupted(3)
    (bin_,) = Path().glob("data/.mine.*.partial/train.bin")
    os.truncate(bin_, 10)
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    assert "continuing" not in capsys.readouterr().out
    assert is_the_same(made)


def test_a_lock_file_that_was_deleted_when_it_was_released(made, here, capsys):
    """As filelock does on Windows, and in some versions elsewhere."""
    interrupted(3)
    (lock,) = Path().glob("data/.mine.*.partial/folio.lock")
    lock.unlink()
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    assert "continuing after" in capsys.readouterr().out
    assert is_the_same(made)


def test_a_data_set_of_a_similar_name_stays_unfinished(made, here, capsys):
    interrupted(3)
    (partial,) = Path().glob("data/.mine.*.partial")
    partial.rename(str(partial).replace(".mine.", ".mine.v2."))
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    assert "continuing" not in capsys.readouterr().out
    assert list(Path().glob("data/.mine.v2.*.partial"))


@pytest.mark.parametrize("obstacle", ["mine", "mine.1", "mine/val.bin"])
def test_a_whole_build_is_kept_if_it_cannot_get_its_name(made, here, monkeypatch, capsys, obstacle):
    """The folder, an older one, or the second of three files beside a user's cannot be moved."""
    obstacle, finish = Path("data", obstacle), writer.Writer.finish
    if obstacle.name != "mine":
        Path("data/mine").mkdir(parents=True)
    if obstacle.name == "val.bin":
        Path("data/mine/notes.txt").write_text("the user's")

    def obstructed(*args):
        if obstacle.name == "val.bin":
            obstacle.mkdir()
        else:
            obstacle.symlink_to("nowhere")
        return finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "finish", obstructed)
        assert prepare.main([*ARGV, "--workers=1"]) == 2
    assert "the same command continues" in capsys.readouterr().out
    obstacle.rmdir() if obstacle.name == "val.bin" else obstacle.unlink()
    monkeypatch.setattr(workers, "encode_batch", None)  # it is not encoded again
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    for name in ("train.bin", "val.bin", "meta.json"):
        assert Path("data/mine", name).read_bytes() == (made / "data/mine" / name).read_bytes()
    assert not list(Path("data").glob(".*"))


def test_standard_input_is_the_same_if_its_text_is(made, here, monkeypatch, capsys):
    argv, save = [word.replace("b.txt", "-") for word in ARGV], writer.Writer.save

    def saved_once(*args):
        save(*args)
        raise KeyboardInterrupt

    def prepared(text: bytes) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        return prepare.main(argv)

    text = Path("b.txt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "save", saved_once)
        assert prepared(text) == 130
    for copy in Path("data/.downloads").rglob("stdin*"):
        copy.unlink()  # as at the end of the process
    assert prepared(text) == 0
    assert "continuing after" in capsys.readouterr().out
    for name in ("train.bin", "val.bin"):
        assert Path("data/mine", name).read_bytes() == (made / "data/mine" / name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "save", saved_once)
        assert prepared(text) == 130
    assert prepared(text[:-1] + b"!") == 0
    assert "continuing" not in capsys.readouterr().out


@needs_linux
def test_a_worker_that_is_killed(made, here, capsys):
    err = interrupted(3, lambda p: os.kill(children(p)[0], signal.SIGKILL), code=1)
    assert err.startswith("error: a worker process ended (exit code -9)")
    assert err.count("\n") == 1
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    assert "continuing after" in capsys.readouterr().out
    assert is_the_same(made)


@needs_linux
@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_signal_ends_all_processes(made, here, number, code, capsys):
    pids = []

    def act(process):
        pids.extend([process.pid, *children(process)])
        process.send_signal(number)

    interrupted(2, act, code)
    assert len(pids) == 3
    end = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert prepare.main([*ARGV, "--workers=1"]) == 0
    assert "continuing after" in capsys.readouterr().out
    assert is_the_same(made)


def test_bad_input_leaves_nothing_to_continue(here, capsys):
    with open("b.txt", "ab") as file:
        file.write(b"\xff")
    process = start("--workers=2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "b.txt is not UTF-8" in err
    assert list(Path("data").iterdir()) == []


def test_unknown_characters_in_a_process_are_said_where_they_are(made, here, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "LARGE_BYTES", 0)
    assert prepare.main(["--name=few", "--input=a.jsonl", "--tokenizer=bpe"]) == 0
    meta = json.loads(Path("data/few/meta.json").read_text())
    tokens = meta["tokenizer"]["tokens"]
    ids = [*range(256), *range(256, 256 + len(tokens))]
    ids[ord("!")] = -1
    meta["tokenizer"] |= {"ids": ids, "end_of_text": None}
    Path("data/few/meta.json").write_text(json.dumps(meta))
    Path("b.txt").write_text("one two!\n\nthree")
    argv = ["--name=new", "--input", "a.jsonl", "b.txt", "--tokenizer=data/few", "--workers=2"]
    assert prepare.main(argv) == 2
    assert "the vocabulary has no token for the byte 0x21" in capsys.readouterr().err


def test_too_small_a_disk(here, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1_000_000))
    assert prepare.main(ARGV) == 2
    err = capsys.readouterr().err
    assert "data/mine needs about 0.00" in err and "0.001 GB are free" in err
    assert not Path("data").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10_000_000))
    assert prepare.main(ARGV) == 0


def test_the_main_module_is_not_imported_again(made, here):
    """Worker processes do not run a user's script once more, as multiprocessing would."""
    Path("own.py").write_text(f"print('once')\n{RUN}")
    done = subprocess.run(
        [sys.executable, "own.py", *ARGV, "--workers=2"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("once") == 1, done.stderr
    assert is_the_same(made)
