"""A run's samples.txt: the same prompt, continued by the model at every evaluation.

    iter 164, val loss 1.7712, after "Speak, speak."
        Speak, speak.
        ...

Lines of text are indented by four spaces. The first line of a sample has its prompt, quoted as in
JSON.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from folio.checkpoint import TEMPORARY

FILE = "samples.txt"
HEADER = re.compile(r'iter (\d+), val loss (\d+\.\d+), after (".*")')


class Sample(NamedTuple):
    iter_num: int
    val_loss: float  # nats per token
    prompt: str
    text: str  # what the model wrote after the prompt

    def __str__(self) -> str:
        header = f"iter {self.iter_num}, val loss {self.val_loss:.4f}, after "
        lines = f"{self.prompt}{self.text}".split("\n")
        return f"{header}{json.dumps(self.prompt)}\n" + "".join(f"    {line}\n" for line in lines)


def append(out_dir: Path, sample: Sample) -> None:
    """Append a sample to a run's samples.txt."""
    with open(out_dir / FILE, "a", encoding="utf-8", errors="replace", newline="") as file:
        file.write(str(sample))


def read(out_dir: Path) -> list[Sample]:
    """The samples of a run, the oldest first; [] if it has none."""
    try:
        text = (out_dir / FILE).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    blocks = []  # (header, lines)
    for line in text.split("\n")[:-1]:
        if header := HEADER.fullmatch(line):
            blocks.append((header, []))
        elif blocks:
            blocks[-1][1].append(line[4:])
    samples = []
    for header, lines in blocks:
        with suppress(ValueError):  # somebody edited it
            prompt, text = json.loads(header[3]), "\n".join(lines)
            if text.startswith(prompt):
                loss, text = float(header[2]), text.removeprefix(prompt)
                samples.append(Sample(int(header[1]), loss, prompt, text))
    return samples


def rewind(out_dir: Path, iter_num: int) -> None:
    """Remove the samples after `iter_num`, where a run is resumed."""
    if not (out_dir / FILE).exists():
        return
    kept = "".join(str(sample) for sample in read(out_dir) if sample.iter_num <= iter_num)
    (out_dir / TEMPORARY).write_bytes(kept.encode())
    os.replace(out_dir / TEMPORARY, out_dir / FILE)
