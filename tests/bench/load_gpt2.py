"""Seconds and peak memory to load a file of GPT-2's shape, here and in transformers, in turn.

    python tests/bench/load_gpt2.py [ROUNDS]

The weights are random and written by transformers first; each load is a process of its own, timed
without the imports, its memory without what the imports took.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITE = """
import sys, transformers
transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(sys.argv[1])
"""
LOAD = """
import json, resource, sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
{prepare}
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
peak, done = [resident()], threading.Event()
def watch():
    while not done.wait(0.001):
        peak.append(resident())
before = resident()
thread = threading.Thread(target=watch); thread.start()
began = time.perf_counter()
model = {load}
seconds = time.perf_counter() - began
done.set(); thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(json.dumps([seconds, max(peak) - before, weights]))
"""
WAYS = {
    "Folio": (
        "from folio import checkpoint, gpt2",
        "checkpoint.build_model(gpt2.load(sys.argv[1], Path(sys.argv[1])))",
    ),
    "transformers": (
        "from transformers import GPT2LMHeadModel",
        "GPT2LMHeadModel.from_pretrained(sys.argv[1])",
    ),
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", WRITE, folder], check=True, capture_output=True)
        results = {name: [] for name in WAYS}
        for _ in range(rounds):
            for name, (prepare, load) in WAYS.items():
                code = LOAD.format(root=str(ROOT), prepare=prepare, load=load)
                done = subprocess.run(
                    [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
                )
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
    for name, rows in results.items():
        seconds, peak, weights = map(statistics.median, zip(*rows, strict=True))
        print(
            f"{name:13} {seconds:6.2f} s, {peak:6.0f} MiB at most, {peak / weights:.2f} of weights"
        )


if __name__ == "__main__":
    main()
