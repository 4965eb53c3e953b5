"""nanoGPT's recipes, trained on this CPU by nanoGPT and by Folio in turn.

    python tests/bench/nanogpt_cpu.py NANOGPT INPUT [RUNS] [small|baby]

NANOGPT is a checkout of github.com/karpathy/nanoGPT, which is copied and not changed; INPUT is
tiny Shakespeare's input.txt. Run i uses seed 1337 + i in both. Prints for each run the wall seconds
of the whole command, milliseconds per update, and the loss over the whole validation split in
non-overlapping windows; then the medians and their ratio.

small is what nanoGPT's README has for CPUs. nanoGPT evaluates as it is told there, 9 times 20
batches of either split; Folio twice, the whole of either split. baby is the GPT that it has for
GPUs, for 8 of its updates: only the time of an update means something.
"""

import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from shakespeare import ROOT, prepare, run, train

RECIPES = {  # the words that both take, then nanoGPT's alone, then Folio's
    "small": (
        "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --dropout=0.0 "
        "--max_iters=2000",
        "--lr_decay_iters=2000 --eval_iters=20",
        "--eval_interval=1000 --log_interval=50",
    ),
    "baby": (
        "--max_iters=8 --eval_interval=8",
        "--eval_iters=1",
        "--log_interval=1",
    ),
}
EITHER = "--device=cpu --compile=False"
NANOGPT_EVALUATION = """
import sys, numpy, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"])).eval()
model.load_state_dict(saved["model"])
T = model.config.block_size
ids = torch.from_numpy(numpy.fromfile("data/shakespeare_char/val.bin", "uint16").astype("int64"))
total = 0.0
with torch.no_grad():
    for i in range(0, len(ids) - 1, T):
        window = ids[None, i : i + T + 1]
        total += model(window[:, :-1], window[:, 1:])[1].item() * (window.shape[1] - 1)
print("loss", total / (len(ids) - 1))
"""


def train_nanogpt(checkout: Path, text: Path, seed: int, words: str) -> tuple[str, float, float]:
    """What nanoGPT prints, the seconds that it takes, and its loss at the end."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(checkout, Path(folder) / "nanoGPT"))
        script = copy / "train.py"
        script.write_text(script.read_text().replace("manual_seed(1337", f"manual_seed({seed}"))
        shutil.copy(text, copy / "data/shakespeare_char/input.txt")
        run(copy / "data/shakespeare_char", "prepare.py")
        options = ["config/train_shakespeare_char.py", "--log_interval=1", *words.split()]
        output, seconds = run(copy, "train.py", *options)
        evaluation, _ = run(copy, "-c", NANOGPT_EVALUATION)
    return output, seconds, float(re.search(r"loss ([\d.]+)", evaluation)[1])


def nanogpt(checkout: Path, text: Path, recipe: str, seed: int) -> tuple[float, float, float]:
    both, alone, _ = RECIPES[recipe]
    words = f"{EITHER} {both} {alone}"
    output, seconds, loss = train_nanogpt(checkout, text, seed, words)
    times = [float(ms) for ms in re.findall(r"iter \d+: loss .* time ([\d.]+)ms", output)]
    return seconds, statistics.median(times), loss


def folio(text: Path, recipe: str, seed: int) -> tuple[float, float, float]:
    both, _, alone = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), text)
        options = f"{EITHER} {both} {alone} --seed={seed}".split()
        result = train(Path(folder), str(ROOT / "config/shakespeare_char_gpt2.py"), *options)
    tokens = result.options["batch_size"] * result.options["block_size"]
    return result.wall, 1000 * tokens / result.speed, result.loss


def main() -> None:
    checkout, text = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    runs = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    recipe = sys.argv[4] if len(sys.argv) > 4 else "small"
    table = {"nanoGPT": [], "Folio": []}
    for seed in range(1337, 1337 + runs):
        for name, result in (
            ("nanoGPT", nanogpt(checkout, text, recipe, seed)),
            ("Folio", folio(text, recipe, seed)),
        ):
            table[name].append(result)
            wall, ms, loss = result
            line = (
                f"{name:8} seed {seed}: {wall:6.1f} s wall, {ms:6.1f} ms an update, loss {loss:.4f}"
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
