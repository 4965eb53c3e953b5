"""The tables of docs/scale.md: memory and traffic per GPU, from the formulas, not measured.

python tests/bench/scale.py
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from folio import checkpoint, distributed, machine  # noqa: E402
from model import GPTConfig  # noqa: E402

WORLD_SIZE = 8
GPUS = (24, 80, 141)  # GB
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and fragmentation
SHAPES = {  # block_size is GPT-2's
    "124M": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "1.5B": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "7B": GPTConfig(n_layer=32, n_head=32, n_embd=4096),
}


def main() -> None:
    distributed.world_size = lambda: WORLD_SIZE
    print("| model | | weights and optimizer | a sequence: none | half | full | moved per update |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name, shape in SHAPES.items():
        model = checkpoint.empty_model("gpt", shape)
        for fsdp in (False, True):
            cfg = train.TrainConfig(**vars(shape), device="cuda", dtype="bfloat16", fsdp=fsdp)

            def needed(size: int, mode: str = "none", model=model, cfg=cfg) -> int:
                cfg = replace(cfg, micro_batch_size=size, activation_checkpointing=mode)
                return machine.memory_needed(model, cfg)

            state = needed(0)
            modes = ("none", "half", "full")
            per_sequence = {mode: needed(1, mode) - needed(0, mode) for mode in modes}
            cells = " | ".join(f"{size / 1e9:.2f} GB" for size in per_sequence.values())
            kind, n = "FSDP2" if fsdp else "DDP", model.n_params()
            share = (WORLD_SIZE - 1) / WORLD_SIZE
            rest = n - sum(p.numel() for p in model.h.parameters())
            moved = (8 * n + 4 * rest * fsdp) * share / 1e9
            each = " per micro-step" if fsdp else ""
            print(f"| {name} | {kind} | {state / 1e9:.1f} GB | {cells} | {moved:.1f} GB{each} |")
            fits = []
            for gpu in GPUS:
                left = USABLE * gpu * 1e9 - state
                fits.append(", ".join(str(max(0, int(left // s))) for s in per_sequence.values()))
            rows.append(f"| {name} | {kind} | {' | '.join(fits)} |")
    print("\n| model | | 24 GB | 80 GB | 141 GB |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
