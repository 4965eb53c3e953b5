"""All that is measured on a GPU, in one run.

    python tests/bench/gpu.py NANOGPT INPUT [GPT_FAST]
    python tests/bench/gpu.py --dry-run [NANOGPT]      tiny shapes, on any machine

NANOGPT is a checkout of github.com/karpathy/nanoGPT, of which only model.py is imported, GPT_FAST
one of github.com/pytorch-labs/gpt-fast; INPUT is tiny Shakespeare's input.txt. Each case is a
process with a time limit. Prints for GPT-2 (124M) and for the baby GPT: tokens a second, MFU, the
most memory held while training and what Folio estimated, by dtype, with and without torch.compile
and CUDA graphs, beside nanoGPT; then tokens a second in sampling 1, 10 and 100 texts of 300 tokens,
beside gpt-fast with a Llama of GPT-2's size; then the seconds to a loss of 1.4697, as a whole
process.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from noise import make_run, noise
from sampling import SHAPES, seconds
from shakespeare import ROOT, prepare, train
from time_to_loss import ROWS

import train as script
from folio import generation
from folio.generation import prepare_for_sampling
from folio.machine import find_device, memory_needed, peak_flops
from model import GPT

BABY = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "bias": False}
MODELS = {  # options, number of ids, sequences at a time
    "GPT-2": ({"bias": False}, 50304, 32),
    "baby": (BABY, 65, 64),
    "tiny": ({**BABY, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}, 65, 4),
}
MODERN = {"rotary": True, "qk_norm": True, "conv": 3, "activation": "gelu", "optimizer": "muon"}
CASES = [  # program, model, dtype, how, seconds allowed
    ("Folio", "GPT-2", "bfloat16", "compiled, graphs", 120),
    ("nanoGPT", "GPT-2", "bfloat16", "compiled", 120),
    ("Folio", "GPT-2", "bfloat16", "compiled", 120),
    ("Folio, modern", "GPT-2", "bfloat16", "compiled, graphs", 120),
    ("Folio", "GPT-2", "bfloat16", "eager", 60),
    ("Folio", "baby", "bfloat16", "compiled, graphs", 60),
    ("nanoGPT", "baby", "bfloat16", "compiled", 60),
    ("Folio", "baby", "bfloat16", "eager, graphs", 40),
    ("Folio", "baby", "bfloat16", "eager", 40),
    ("Folio, modern", "baby", "bfloat16", "compiled, graphs", 60),
    ("Folio, modern", "baby", "bfloat16", "eager, graphs", 40),
    ("Folio", "baby", "float16", "compiled", 60),
    ("Folio", "baby", "float32", "compiled, graphs", 60),
]
DRY_CASES = [(p, "tiny", "float32", "eager", 60) for p in ("Folio", "Folio, modern", "nanoGPT")]
WARM_UP, UPDATES = 5, 20
SAMPLED = 300  # tokens of a text
NANOGPT = """  # the body of its training loop
import json, statistics, time, torch
from model import GPT, GPTConfig
(options, vocab_size, batch, dtype, how), device, warm_up, updates = {}, "{}", {}, {}
model = GPT(GPTConfig(**options, vocab_size=vocab_size, dropout=0.0)).to(device)
optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
called = torch.compile(model) if "compiled" in how else model
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
ids = torch.randint(vocab_size, (batch, model.config.block_size + 1), device=device)
times = []
for _ in range(warm_up + updates):
    began = time.perf_counter()
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        logits, loss = called(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device != "cpu":
        torch.accelerator.synchronize()
    times.append(time.perf_counter() - began)
held = torch.accelerator.max_memory_allocated() / 2**30 if device != "cpu" else 0.0
print(json.dumps({{"seconds": statistics.median(times[warm_up:]), "GiB": held}}))
"""


GPT_FAST = """  # what its generate.py does with --compile, for random weights
import json, statistics, time, torch, generate
from model import ModelArgs, Transformer
device, B, n = "{}", {}, {}
config = ModelArgs(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, dim=768)
model = Transformer(config).to(device, torch.bfloat16).eval()
generate.decode_one_token = torch.compile(
    generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
prompt = torch.zeros(1, dtype=torch.int, device=device)
times = []
for _ in range(5):
    began = time.perf_counter()
    generate.generate(model, prompt, n, B, interactive=False, draft_model=None, temperature=0.8,
        top_k=200)
    torch.accelerator.synchronize()
    times.append(time.perf_counter() - began)
print(json.dumps({{"rate": B * n / statistics.median(times[2:])}}))
"""


def now(device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def folio_case(options: dict, vocab_size: int, batch: int, dtype: str, how: str) -> dict:
    options |= {"vocab_size": vocab_size, "batch_size": batch, "micro_batch_size": batch}
    with noise(vocab_size, 2_000_000) as folder:
        run = make_run(folder, **options, dtype=dtype, compile="compiled" in how)
        run.graphs = {} if "graphs" in how else None
        result = measure(run.cfg.device, lambda: script.update(run))
        return result | {"estimate": memory_needed(run.model, run.cfg) / 2**30}


def measure(device: str, update: Callable[[], object]) -> dict:
    """Seconds of an update, and GiB held at most."""
    for _ in range(WARM_UP):
        update()
    times = []
    for _ in range(UPDATES):
        began = now(device)
        update()
        times.append(now(device) - began)
    held = torch.accelerator.max_memory_allocated() / 2**30 if device != "cpu" else 0.0
    return {"seconds": statistics.median(times), "GiB": held}


def sampling_case(shape: str, batches: tuple[int, ...], n: int, graph: bool) -> dict:
    if not graph:
        generation.GRAPH_DEVICES = ()
    model = GPT(SHAPES[shape]).to(find_device("auto")).eval()
    prepare_for_sampling(model)
    seconds(model, 10, 20)
    return {
        str(B): B * n / statistics.median(sum(seconds(model, B, n)) for _ in range(3))
        for B in batches
    }


def gpt_fast_case(checkout: str, B: int) -> dict:
    """The tokens a second of B texts."""
    code = GPT_FAST.format(str(find_device("auto")), B, SAMPLED)
    return child([sys.executable, "-c", code], 240, checkout)


def case(words: list, limit: int) -> dict:
    """Run a function of this file in a process of its own; {} if it fails or takes too long."""
    return child([sys.executable, __file__, "--case", json.dumps(words)], limit)


def nanogpt_case(checkout: str, words: list, limit: int) -> dict:
    """As case(["folio_case", *words])."""
    code = NANOGPT.format(words, str(find_device("auto")), WARM_UP, UPDATES)
    return child([sys.executable, "-c", code], limit, checkout)


def child(command: list[str], limit: int, folder: str | None = None) -> dict:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        print(f"more than {limit} s: {command[-1][:100]}")
    except (IndexError, ValueError):
        print(f"failed: {done.stderr.strip().splitlines()[-1:]}")
    return {}


def main() -> None:
    if sys.argv[1] == "--case":
        name, *arguments = json.loads(sys.argv[2])
        print(json.dumps(globals()[name](*arguments)))
        return
    dry, began = sys.argv[1] == "--dry-run", time.perf_counter()
    checkout = (sys.argv[2:] or [None])[0] if dry else sys.argv[1]
    device = find_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}")
    print(f"{'':50}{'tokens/s':>12}{'MFU':>8}{'GiB':>8}{'estimate':>10}")
    for program, model, dtype, how, limit in DRY_CASES if dry else CASES:
        options, vocab_size, batch = MODELS[model]
        extra = MODERN if "modern" in program else {}
        words = [options | extra, vocab_size, batch, dtype, how]
        if program == "nanoGPT" and not checkout:
            continue
        if program == "nanoGPT":
            result = nanogpt_case(checkout, words, limit)
        else:
            result = case(["folio_case", *words], limit)
        if result:
            config = script.TrainConfig(**options, vocab_size=vocab_size)
            tokens = batch * config.block_size / result["seconds"]
            peak = peak_flops(str(device))
            with torch.device("meta"):
                flops = GPT(config).flops_per_token()
            mfu = f"{tokens * flops / peak:8.1%}" if peak else f"{'':8}"
            name = f"{program}, {model}, {dtype}, {how}"
            estimate = f"{result['estimate']:10.1f}" if "estimate" in result else ""
            print(f"{name:50}{tokens:12,.0f}{mfu}{result['GiB']:8.1f}{estimate}", flush=True)
    shape, batches, n = ("small", (1, 2), 10) if dry else ("GPT-2", (1, 10, 100), SAMPLED)
    print(f"sampling, tokens/s{'':32}" + "".join(f"{B:>12}" for B in batches))
    for name, graph in {"CUDA graph": True, "kernel by kernel": False}.items():
        result = case(["sampling_case", shape, batches, n, graph], 90)
        print(f"{name:50}" + "".join(f"{rate:12,.0f}" for rate in result.values()), flush=True)
    if len(sys.argv) > 3 and not dry:
        rates = [gpt_fast_case(sys.argv[3], B).get("rate", math.nan) for B in batches]
        print(f"{'gpt-fast':50}" + "".join(f"{rate:12,.0f}" for rate in rates), flush=True)
    if not dry:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), Path(sys.argv[2]).resolve())
            recipe, *words = ROWS["1.4697"].split()
            for how in ("--compile=False", "--compile=True"):
                r = train(Path(folder), str(ROOT / "config" / recipe), *words, how)
                print(f"to 1.4697, {how}: {r.wall:.1f} s, training {r.training:.1f}: {r.loss:.4f}")
    print(f"all of this took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
