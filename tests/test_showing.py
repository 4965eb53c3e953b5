"""Promise: what a run prints, draws and keeps shows how it learns, and is right."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, load, script

import runs
from folio import checkpoint, metrics, plot, samples
from folio.samples import Sample

# ---- samples.txt


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("To be", " or not\nto be"),
        ("", "\n\n"),
        ('"quoted"\n', '    indented\niter 3, val loss 1.0000, after ""\n'),
        ("é\u2028\u3000", "\r\n\x0b\x85 x\t"),
    ],
)
def test_samples_are_read_as_they_were_written(tmp_path, prompt, text):
    written = [Sample(i, 1.25, prompt, text) for i in (5, 10, 15)]
    for sample in written:
        samples.append(tmp_path, sample)
    assert samples.read(tmp_path) == written
    samples.rewind(tmp_path, 10)
    assert samples.read(tmp_path) == written[:2]


@pytest.mark.parametrize("extra", ["garbage", 'iter 3, val loss 1.0000, after "\\q"\n    x\n'])
def test_samples_that_were_cut_off_or_edited_do_no_harm(tmp_path, extra):
    samples.append(tmp_path, Sample(1, 2.0, "a", "b"))
    with open(tmp_path / samples.FILE, "a") as file:
        file.write(extra)
    assert samples.read(tmp_path)[0] == Sample(1, 2.0, "a", "b")


@pytest.fixture
def patient(monkeypatch):
    """As if samples and pictures took no time."""
    monkeypatch.setattr(metrics, "MAX_SHARE", 100.0)


def test_every_evaluation_continues_the_same_prompt(train_small, resume_run, patient, text):
    """The beginning of the validation text; and a resumed run keeps what it had."""
    assert train_small("--snapshot_interval=10") == 0
    whole = samples.read(Path("run"))
    assert [sample.iter_num for sample in whole] == [10, 20]
    _, meta = load("run/ckpt.safetensors")
    assert whole[1].val_loss == pytest.approx(meta["progress"]["val_loss"], abs=1e-4)
    assert whole[0].prompt == whole[1].prompt == text[17_999:][:32].rpartition(" ")[0]
    assert all(len(sample.text) == 100 for sample in whole) and whole[0].text != whole[1].text
    assert resume_run("--checkpoint=run/snapshots/iter_000010.safetensors") == 0
    assert samples.read(Path("run")) == whole


def test_a_prompt_of_ones_own_is_continued(train_small, patient):
    assert train_small("--sample_prompt=The\\n") == 0
    assert [sample.prompt for sample in samples.read(Path("run"))] == ["The\n"] * 2


def test_the_last_evaluation_always_has_a_sample(train_small, monkeypatch):
    monkeypatch.setattr(metrics.Share, "allows", lambda _: False)
    assert train_small() == 0
    assert [sample.iter_num for sample in samples.read(Path("run"))] == [20]


def test_showing_takes_a_fiftieth_of_the_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    share, done = metrics.Share(0.02), []
    for _ in range(1000):  # an evaluation a second, each sample takes one
        now += 1
        if share.allows():
            done.append(now)
            with share.spend():
                now += 1
    assert len(done) == pytest.approx(0.02 * now, abs=2)


# ---- pictures


def test_a_smoothed_curve_is_the_mean_of_a_twentieth():
    values = [float(i % 2) for i in range(400)]
    smoothed = plot.smooth(values)
    assert smoothed[0] == values[0] and smoothed[-1] == values[-1]
    assert all(abs(value - 0.5) < 0.03 for value in smoothed[10:-10])
    line = [0.5 * i for i in range(100)]
    assert plot.smooth(line) == pytest.approx(line)


def test_a_minute_has_fifty_points_and_the_picture_is_new_at_each_evaluation(
    train_small, patient, monkeypatch
):
    import train

    drawn, plot_losses = [], train.plot_losses

    def noted(out_dir, baselines):
        plot_losses(out_dir, baselines)
        rows = metrics.read_metrics(out_dir / "metrics.csv")
        drawn.append((len(plot.points(rows, "loss")[0]), Path("run/loss.png").stat().st_mtime_ns))

    monkeypatch.setattr(train, "plot_losses", noted)
    assert train_small("--max_iters=100", "--eval_interval=0", "--log_interval=0") == 0
    assert [points for points, _ in drawn] == [20, 40, 60, 80, 100]
    assert len({time for _, time in drawn}) == 5


# ---- lines


def test_the_last_lines_say_what_the_loss_means(train_small, capsys):
    assert train_small("--max_iters=10") == 0
    _, meta = load("run/ckpt.safetensors")
    line = re.search(r"loss:.*", capsys.readouterr().out)[0]
    best, uniform, bigram = map(float, re.findall(r"\d+\.\d+", line))
    assert best == pytest.approx(meta["progress"]["best_val_loss"], abs=1e-3)
    assert uniform > bigram > 1 and "nats per character" in line


def test_lines_in_a_pipe_are_few_and_aligned(data_dir, tmp_path):
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--data_dir={data_dir}"]
    command += ["--max_iters=1200", "--log_interval=12", "--eval_interval=400", "--num_samples=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("iter")]
    assert len(lines) == 10 + 3
    assert {line.index(":") for line in lines} == {len("iter 1,200")}
    assert all(len(line) <= 80 and "\r" not in line for line in lines)


def test_a_terminal_of_80_columns_is_enough(data_dir, tmp_path):
    """Nothing wraps, and the bar is one line that is drawn over."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--data_dir={data_dir}"]
    command += ["--max_iters=1200", "--log_interval=10", "--eval_interval=400", "--num_samples=0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b""
    while True:
        try:
            output += os.read(master, 4096)
        except OSError:  # the end
            break
    assert process.wait() == 0
    drawn = re.split(r"\r\n|\r|\n|\x1b\[A", output.decode())
    lines = [line for line in drawn if not line.startswith("data:")]
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    bars = [line for line in lines if re.match(r" *\d+% \|", line)]
    assert bars and re.search(r"1200/1200.* left, loss \d\.\d+, [\d,]+ tokens/s *$", bars[-1])


# ---- runs.py list


def test_seeds_of_the_same_options_are_summed_up(train_small, capsys):
    for name, argv in {
        "a": ("--seed=1",),
        "b": ("--seed=2",),
        "c": ("--seed=3", "--learning_rate=2e-3"),
    }.items():
        assert train_small("--max_iters=10", f"--out_dir=out/{name}", *argv) == 0
    capsys.readouterr()
    assert runs.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [load(f"out/{name}/ckpt.safetensors")[1]["progress"]["best_val_loss"] for name in "ab"]
    mean, half = sum(losses) / 2, abs(losses[0] - losses[1]) / 2**0.5
    assert lines[-1] == (
        f"2 seeds of the options of out/a: best loss {mean:.4f}, standard deviation {half:.4f}"
    )
    assert len(lines) == 5 and all(len(line) <= 80 for line in lines[:-1])


def test_seeds_that_minutes_gave_other_lengths_are_of_the_same_options(train_small, capsys):
    for seed, max_iters in ((1, 5), (2, 6)):
        folder = f"out/{seed}"
        assert train_small(f"--max_iters={max_iters}", f"--out_dir={folder}", f"--seed={seed}") == 0
        record = json.loads(Path(folder, "run.json").read_text())
        Path(folder, "run.json").write_text(json.dumps({**record, "minutes": 1.0}))
    capsys.readouterr()
    assert runs.main([]) == 0
    assert "2 seeds of the options of out/1" in capsys.readouterr().out


def test_a_header_with_a_loss_that_is_no_number(train_small, capsys):
    assert train_small("--max_iters=5", "--out_dir=out/a") == 0
    tensors, meta = load("out/a/ckpt.safetensors")
    meta["progress"]["best_val_loss"] = "low"
    meta.pop("format")
    checkpoint.save(Path("out/a/ckpt.safetensors"), tensors, meta)
    capsys.readouterr()
    assert runs.main([]) == 0
    assert "unreadable" in capsys.readouterr().out


def test_a_seed_that_was_run_twice_counts_once(train_small, capsys):
    for folder in ("out/a", "out/b"):
        assert train_small("--max_iters=5", f"--out_dir={folder}") == 0
    capsys.readouterr()
    assert runs.main([]) == 0
    assert "seeds" not in capsys.readouterr().out


@pytest.mark.parametrize("given, minutes", [((), 1.5), (("--max_iters=7",), 0.0)])
def test_a_resume_keeps_the_minutes_unless_it_changes_the_length(
    train_small, resume_run, given, minutes
):
    assert train_small("--max_iters=5") == 0
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**record, "minutes": 1.5}))
    assert resume_run(*given) == 0
    assert json.loads(Path("run/run.json").read_text())["minutes"] == minutes


@pytest.mark.parametrize(
    "argv, problem",
    [
        ("plot out", "out is not a run's folder"),
        ("plot bad", "has no rows that can be read"),
        ("verify run --output=x.txt", "--output is for plot and report; verify prints"),
        ("plot run --output=no/x.png", "there is no folder no"),
        ("report run --output=x.pdf", "use a name that ends with .html"),
        ("report run --output=no/x.html", "no such file or directory; use another name"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(train_small, capsys, argv, problem):
    assert train_small("--max_iters=5") == 0
    Path("bad").mkdir()
    Path("bad/metrics.csv").write_bytes(bytes(range(256)))
    capsys.readouterr()
    assert runs.main(argv.split()) == 2
    err = capsys.readouterr().err
    assert problem in err and err.count("\n") == 1 and "Errno" not in err


def test_names_of_runs_are_labels_as_they_are(train_small):
    for folder in ("_a", "b$\\frac$"):
        assert train_small("--max_iters=5", f"--out_dir={folder}") == 0
    assert runs.main(["plot", "_a", "b$\\frac$", "--output=ab.svg"]) == 0
    assert Path("ab.svg").stat().st_size > 10_000


def test_a_damaged_record_leaves_the_list_as_it_is(train_small):
    assert train_small("--max_iters=5", "--out_dir=out/a") == 0
    for damage in ("", "{", "[]", '{"options": 3, "minutes": {}}'):
        Path("out/a/run.json").write_text(damage)
        assert script("runs.py", cwd=".").returncode == 0
