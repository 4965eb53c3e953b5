"""nanoGPT's recipe for CPUs, trained by nanoGPT and by Folio in turn, on this machine.

    python tests/bench/nanogpt_cpu.py NANOGPT INPUT [RUNS]

NANOGPT is a checkout of github.com/karpathy/nanoGPT, which is copied and not changed; INPUT is
tiny Shakespeare's input.txt. Run i uses seed 1337 + i in both. Prints for each run the wall seconds
of the whole command, milliseconds per update, and the loss over the whole validation split in
non-overlapping windows; then the medians and their ratio. nanoGPT evaluates as its README has it, 9
times 20 batches of either split; Folio twice, the whole of either split.
"""

import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from shakespeare import ROOT, prepare, run, train

SHAPE = ["--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=64", "--batch_size=12"]
RECIPE = [*SHAPE, "--max_iters=2000", "--dropout=0.0", "--device=cpu", "--compile=False"]
NANOGPT_EVALUATION = """
import sys, numpy, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"])).eval()
model.load_state_dict(saved["model"])
ids = torch.from_numpy(numpy.fromfile("data/shakespeare_char/val.bin", "uint16").astype("int64"))
total = 0.0
with torch.no_grad():
    for i in range(0, len(ids) - 1, 64):
        window = ids[None, i : i + 65]
        total += model(window[:, :-1], window[:, 1:])[1].item() * (window.shape[1] - 1)
print("loss", total / (len(ids) - 1))
"""


def nanogpt(checkout: Path, text: Path, seed: int) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(checkout, Path(folder) / "nanoGPT"))
        script = copy / "train.py"
        script.write_text(script.read_text().replace("manual_seed(1337", f"manual_seed({seed}"))
        shutil.copy(text, copy / "data/shakespeare_char/input.txt")
        run(copy / "data/shakespeare_char", "prepare.py")
        recipe = "config/train_shakespeare_char.py"
        options = [*RECIPE, "--lr_decay_iters=2000", "--eval_iters=20", "--log_interval=1"]
        output, seconds = run(copy, "train.py", recipe, *options)
        times = [float(ms) for ms in re.findall(r"iter \d+: loss .* time ([\d.]+)ms", output)]
        evaluation, _ = run(copy, "-c", NANOGPT_EVALUATION)
    return seconds, statistics.median(times), float(re.search(r"loss ([\d.]+)", evaluation)[1])


def folio(text: Path, seed: int) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), text)
        recipe = str(ROOT / "config/shakespeare_char_gpt2.py")
        options = [*RECIPE, "--eval_interval=1000", "--log_interval=50", f"--seed={seed}"]
        result = train(Path(folder), recipe, *options)
    return result.wall, 1000 * 12 * 64 / result.speed, result.loss


def main() -> None:
    checkout, text = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    runs = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    table = {"nanoGPT": [], "Folio": []}
    for seed in range(1337, 1337 + runs):
        for name, result in (
            ("nanoGPT", nanogpt(checkout, text, seed)),
            ("Folio", folio(text, seed)),
        ):
            table[name].append(result)
            wall, ms, loss = result
            line = (
                f"{name:8} seed {seed}: {wall:6.1f} s wall, {ms:5.1f} ms an update, loss {loss:.4f}"
            )
            print(line, flush=True)
    medians = {
        name: [statistics.median(c) for c in zip(*rows, strict=True)]
        for name, rows in table.items()
    }
    for name, (wall, ms, loss) in medians.items():
        print(f"{name:8} median   : {wall:6.1f} s wall, {ms:5.1f} ms an update, loss {loss:.4f}")
    ratios = [a / b for a, b in zip(medians["nanoGPT"], medians["Folio"], strict=True)]
    print(f"nanoGPT / Folio : {ratios[0]:.2f} of the wall time, {ratios[1]:.2f} of an update's")


if __name__ == "__main__":
    main()
