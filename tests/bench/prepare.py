"""How fast prepare.py makes tokens, beside tiktoken alone on the same text; and in what memory.

    python tests/bench/prepare.py [MEGABYTES] [ROUNDS]

The text is the source of Python's own library, file after file as JSON lines, again and again until
there is enough of it. Each row times the whole command, start and writing included: char and byte
on one core, gpt2 and bpe on all. tiktoken's column times only its encode_ordinary_batch, on texts
that are in memory, with as many threads; the two take turns. bpe encodes with a tokenizer of 4,096
ids that was trained before. "one file" is the same text as a single document.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import tokenizer  # noqa: E402
from data.documents import Corpus  # noqa: E402

CORES = os.cpu_count() or 1
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


def run(*command: str, cores: int = CORES) -> tuple[float, float, str]:
    """Seconds that `python COMMAND` takes, its peak memory in MiB, and what it prints."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)[:200]} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024, output


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    library = [b"".join(d.blocks()).decode() for d in Corpus(("pystdlib",), Path())]
    with tempfile.TemporaryDirectory() as folder:
        lines, one = Path(folder) / "lines.jsonl", Path(folder) / "one.txt"
        size = 0
        with open(lines, "w", encoding="utf-8") as file, open(one, "w", encoding="utf-8") as whole:
            while size < megabytes * 1e6:
                for text in library:
                    file.write(json.dumps({"text": text}) + "\n")
                    whole.write(text + "\n")
                    size += len(text.encode())
        prepare = [str(ROOT / "prepare.py"), f"--data_dir={folder}"]
        run(*prepare, "--name=trained", "--input=pystdlib", "--tokenizer=bpe")
        print(f"{size / 1e6:.0f} MB, medians of {rounds}")
        print("tokenizer  input       cores     MB/s   tiktoken alone   ratio   peak MiB")
        for kind, source in itertools.product(("char", "byte", "gpt2", "bpe"), (lines, one)):
            beside_tiktoken = kind in ("gpt2", "bpe")
            cores = CORES if beside_tiktoken else 1
            stored = f"{folder}/trained" if kind == "bpe" else kind
            argv = [f"--name={kind}", f"--input={source}", f"--tokenizer={stored}"]
            ours, alone = [], []
            for _ in range(rounds):
                seconds, peak, _ = run(*prepare, *argv, cores=cores)
                ours.append(size / 1e6 / seconds)
                if beside_tiktoken:
                    meta = json.dumps(tokenizer.stored_in(Path(folder) / kind))
                    code = ALONE.format(root=str(ROOT), meta=meta, path=str(lines), threads=cores)
                    alone.append(size / 1e6 / float(run("-c", code)[2]))
            speed = statistics.median(ours)
            beside = " " * 25
            if alone:
                beside = f"{statistics.median(alone):17.1f}{speed / statistics.median(alone):8.2f}"
            name = "one file" if source == one else "JSON lines"
            print(f"{kind:11}{name:11}{cores:6}{speed:9.1f}{beside}{peak:11.0f}", flush=True)


if __name__ == "__main__":
    main()
