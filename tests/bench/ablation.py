"""What each modern part gains: the recipe less one part, and GPT-2 with one part, over seeds.

    python tests/bench/ablation.py INPUT [SEEDS] [UPDATES]

INPUT is tiny Shakespeare's input.txt. The recipe is config/shakespeare_char_cpu.py, with fewer
updates; where AdamW updates all of the weights it gets the learning rate that suits it better.
Printed are the seconds of training, medians of the loss after the last update on the whole
validation text and on either half, and the largest less the smallest loss over the seeds; then,
trained anew by as many updates as take the recipe's time, these updates and their loss. Seeds take
turns.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from shakespeare import ROOT, Result, prepare, train

OFF = {  # what takes a part out
    "Muon": "--optimizer=adamw --learning_rate=4e-3",
    "rotary positions": "--rotary=False",
    "QK-norm": "--qk_norm=False",
    "key shift": "--key_shift=False",
    "convolution": "--conv=1",
    "exact GELU": "--activation=gelu_tanh",
}
GPT2 = " ".join(OFF.values())
VARIANTS = {
    "the recipe": "",
    **{f"less {part}": words for part, words in OFF.items()},
    "with RMSNorm": "--norm=rmsnorm",
    "with ReLU^2": "--activation=relu2",
    "with SwiGLU": "--activation=swiglu",
    "with one key, value": "--n_kv_head=1",
    "GPT-2": GPT2,
    **{f"GPT-2, {p}": " ".join(w for q, w in OFF.items() if q != p) for p in OFF},
}


def main() -> None:
    text = Path(sys.argv[1]).resolve()
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    updates = int(sys.argv[3]) if len(sys.argv) > 3 else 150
    recipe = [str(ROOT / "config/shakespeare_char_cpu.py"), f"--max_iters={updates}"]
    equal_tokens, equal_time = ({name: [] for name in VARIANTS} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), text)
        for seed in range(1337, 1337 + seeds):
            for name, words in VARIANTS.items():
                options = [*recipe, *words.split(), f"--seed={seed}", "--eval_interval=1000000"]
                result = train(Path(folder), *options)
                equal_tokens[name].append(result)
                share = equal_tokens["the recipe"][-1].training / result.training
                options.append(f"--max_iters={round(updates * share)}")
                equal_time[name].append(train(Path(folder), *options))
    print(f"{'':26}{'':47}{'in the time of the recipe':>28}")
    print(f"{'':26}{'training':>10}{'loss':>9}{'halves':>17}{'spread':>9}", end="")
    print(f"{'updates':>12}{'training':>10}{'loss':>9}{'spread':>9}")
    for name in VARIANTS:
        tokens, time = equal_tokens[name], equal_time[name]
        print(
            f"{name:26}{median(tokens, 'training'):8.1f} s{median(tokens, 'loss'):9.4f}"
            f"{median(tokens, 'first'):9.4f}{median(tokens, 'second'):8.4f}{spread(tokens):9.4f}"
            f"{statistics.median(r.options['max_iters'] for r in time):12.0f}"
            f"{median(time, 'training'):8.1f} s{median(time, 'loss'):9.4f}{spread(time):9.4f}"
        )


def median(runs: list[Result], field: str) -> float:
    return statistics.median(getattr(r, field) for r in runs)


def spread(runs: list[Result]) -> float:
    return max(r.loss for r in runs) - min(r.loss for r in runs)


if __name__ == "__main__":
    main()
