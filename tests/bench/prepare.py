"""How fast prepare.py makes tokens, beside tiktoken alone on the same text; and in what memory.

    python tests/bench/prepare.py [MEGABYTES] [ROUNDS]      200 MB, medians of 3
    python tests/bench/prepare.py --large                   2 GB, each process limited to 2 GiB

The text is made here, from English that comes with Python: the language reference and the
docstrings of the standard library. A Markov chain over its words (the next one is drawn from those
that follow the last one somewhere) writes documents of 20 to 2,000 words. One word in fifty is a
new one, made of two halves of others, so that the vocabulary grows with the text, as it does in a
real corpus.

Each row times the whole command, start and writing included: char and byte on one core, gpt2 and
bpe on all. The column of tiktoken times only its encode_ordinary_batch, on texts in memory, with
as many threads; the two take turns. bpe encodes with a tokenizer of 4,096 ids that was trained
before. "one file" is the same text as a single document. Peak memory is that of the parent, of the
largest worker, and of the sum of all at one moment (RSS in /proc, so shared pages count in each).
The last lines time Tokenizer.encode alone, on one core, on pieces that are in memory.
"""

import ast
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import tokenizer  # noqa: E402
from data.documents import PIECE_BYTES, Corpus  # noqa: E402

CORES = len(os.sched_getaffinity(0))
LIMIT = 2 << 30  # of --large, in bytes of address space
ALONE = """
import json, sys, time
sys.path.insert(0, {root!r})
from data import tokenizer
tok = tokenizer.load(json.loads({meta!r}))
texts = [json.loads(line)["text"] for line in open({path!r}, encoding="utf-8")]
began = time.perf_counter()
tok._encoding.encode_ordinary_batch(texts, num_threads={threads})
print(time.perf_counter() - began)
"""


# ---- the text -----------------------------------------------------------------------------------


def english() -> Iterator[str]:
    """The prose that comes with Python."""
    yield from (b"".join(d.blocks()).decode() for d in Corpus(("pydocs",), Path()))
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    for document in Corpus(("pystdlib",), Path()):
        for node in ast.walk(ast.parse(b"".join(document.blocks()))):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def documents(n_bytes: float, seed: int = 0) -> Iterator[str]:
    """Documents of about that much text in all."""
    words = re.findall(r"\S+\s*", "\n".join(english()))
    names, ids = np.unique(np.array(words, object), return_inverse=True)
    order = np.argsort(ids[:-1], kind="stable")
    followers = ids[1:][order]  # of each word, one after another
    first = np.searchsorted(ids[:-1][order], np.arange(len(names)))
    n_followers = np.bincount(ids[:-1], minlength=len(names)).clip(1)
    rng, size = np.random.default_rng(seed), 0
    while size < n_bytes:
        chains = [ids[rng.integers(0, len(ids), 1024)]]
        for _ in range(1000):
            at = first[chains[-1]] + rng.integers(0, n_followers[chains[-1]])
            chains.append(followers[np.minimum(at, len(followers) - 1)])
        text = names[np.array(chains).T.ravel()]
        new = rng.integers(0, len(text), len(text) // 50)
        halves = names[rng.integers(0, len(names), (2, len(new)))]
        text[new] = [a[: len(a) // 2 + 1].strip() + b[len(b) // 2 :] for a, b in halves.T]
        lengths = (20 + rng.lognormal(5.5, 1, 10_000)).clip(max=2000).astype(int)
        for part in np.split(text, np.cumsum(lengths)):
            if len(part) and size < n_bytes:
                document = "".join(part.tolist())
                size += len(document.encode())
                yield document


def write(folder: Path, n_bytes: float) -> tuple[Path, Path, int]:
    """The text as JSON lines and as one file, and its size."""
    lines, one, size = folder / "lines.jsonl", folder / "one.txt", 0
    with open(lines, "w", encoding="utf-8") as file, open(one, "w", encoding="utf-8") as whole:
        for text in documents(n_bytes):
            file.write(json.dumps({"text": text}) + "\n")
            whole.write(text + "\n")
            size += len(text.encode())
    return lines, one, size


# ---- the measurement ----------------------------------------------------------------------------


def memory(pid: int) -> dict[str, float]:
    """The memory of a process in MiB: VmHWM, its peak, and VmRSS."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {k: int(v) / 1024 for k, v in re.findall(r"(VmHWM|VmRSS):\s+(\d+)", status)}


def run(*command: str, cores: int = CORES, limit: int = 0) -> tuple[float, list[float], str]:
    """Seconds that `python COMMAND` takes, its peaks of memory, and what it prints."""

    def prepare_process() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    began, peaks = time.perf_counter(), [0.0, 0.0, 0.0]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, preexec_fn=prepare_process
        )
        while process.poll() is None:
            try:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            except OSError:
                continue
            found = [memory(pid) for pid in (process.pid, *map(int, children.split()))]
            largest = [m.get("VmHWM", 0.0) for m in found]
            now = largest[0], max(largest[1:], default=0.0), sum(m.get("VmRSS", 0.0) for m in found)
            peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        output.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)[:200]} failed")
        return seconds, peaks, output.read()


def compare(folder: Path, n_bytes: float, rounds: int) -> None:
    lines, one, size = write(folder, n_bytes)
    prepare = [str(ROOT / "prepare.py"), f"--data_dir={folder}"]
    run(*prepare, "--name=trained", "--input=pystdlib", "--tokenizer=bpe")
    print(f"{size / 1e6:.0f} MB, medians of {rounds}")
    print("                                                          peak MiB of")
    print("tokenizer  input       cores     MB/s   tiktoken   ratio   parent  worker     sum")
    for kind, source in itertools.product(("char", "byte", "gpt2", "bpe"), (lines, one)):
        beside_tiktoken = kind in ("gpt2", "bpe")
        cores = CORES if beside_tiktoken else 1
        stored = f"{folder}/trained" if kind == "bpe" else kind
        argv = [f"--name={kind}", f"--input={source}", f"--tokenizer={stored}"]
        ours, alone = [], []
        for _ in range(rounds):
            seconds, peaks, _ = run(*prepare, *argv, cores=cores)
            ours.append(size / 1e6 / seconds)
            if beside_tiktoken:
                meta = json.dumps(tokenizer.stored_in(folder / kind))
                code = ALONE.format(root=str(ROOT), meta=meta, path=str(lines), threads=cores)
                alone.append(size / 1e6 / float(run("-c", code)[2]))
        speed, beside = statistics.median(ours), " " * 19
        if alone:
            beside = f"{statistics.median(alone):11.1f}{speed / statistics.median(alone):8.2f}"
        name = "one file" if source == one else "JSON lines"
        memories = "".join(f"{peak:8.0f}" for peak in peaks)
        print(f"{kind:11}{name:11}{cores:6}{speed:9.1f}{beside} {memories}", flush=True)
    text = one.read_text("utf-8")[:20_000_000]
    pieces = [text[i : i + PIECE_BYTES] for i in range(0, len(text), PIECE_BYTES)]
    for tok in (tokenizer.CharTokenizer.train([text]), tokenizer.ByteTokenizer()):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for piece in pieces:
                tok.encode(piece)
            times.append(time.perf_counter() - began)
        speed = len(text.encode()) / 1e6 / statistics.median(times)
        print(f"{tok.kind}: encoding alone {speed:,.0f} MB/s")


def large(folder: Path) -> None:
    lines, _, size = write(folder, 2e9)
    argv = ["--name=large", f"--data_dir={folder}", f"--input={lines}", "--tokenizer=gpt2"]
    seconds, peaks, output = run(str(ROOT / "prepare.py"), *argv, limit=LIMIT)
    print(f"{output}\n{size / 1e6:.0f} MB of text, {size / seconds / 1e6:.1f} MB/s")
    print("peak MiB of parent, worker, sum: " + ", ".join(f"{peak:.0f}" for peak in peaks))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] == ["--large"]:
            large(Path(folder))
        else:
            megabytes, rounds = (*map(int, sys.argv[1:]), *(200, 3)[len(sys.argv) - 1 :])
            compare(Path(folder), megabytes * 1e6, rounds)


if __name__ == "__main__":
    main()
