"""A checkpoint in, text out.

    python sample.py --prompt "ROMEO:"                            from the newest run in out/
    python sample.py --checkpoint out/shakespeare_char --num_samples 3 --temperature 0.8
    python sample.py --prompt FILE:start.txt --stop "\\n\\n" --device cpu
    python sample.py --num_samples 1000 --output samples.jsonl
    echo "To be" | python sample.py --prompt -
    python sample.py --checkpoint gpt2-xl --prompt "The answer to life, the universe and everything"
    python sample.py --interactive                                a prompt a line, until Ctrl-D

    prompt -> Tokenizer.encode -> idx (B, T) -> GPT.generate -> ids (B,) -> text, piece by piece

The text goes to standard output, everything else to standard error. A single sample appears as it
is made; of several as many are made together as memory allows. A sample ends early at --stop, which
is not shown, or at the end-of-text token.
"""

import codecs
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import checkpoint
import config
from config import UserError
from data import tokenizer
from data.download import GPT2, pretrained_folder
from data.tokenizer import Tokenizer
from graphs import Captured
from model import GPT, MODELS, GPTConfig, LanguageModel, assemble, outline, pack

WIDE = 256  # n_embd from which a CPU multiplies a few rows faster in bfloat16
TOGETHER = 32  # tokens of each sample that are made before their text is looked at
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
CGROUP_LIMITS = (  # of a container's memory; versions 2 and 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)

NANOGPT = {"start": "write prompt", "out_dir": "write checkpoint"}  # what it calls them


@dataclass
class SampleConfig:
    # what speaks
    checkpoint: str = ""  # a file, a run's folder, one of transformers' or gpt2*; empty: newest run
    cache_dir: str = ""  # where gpt2* is kept; empty: Hugging Face's usual cache
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is faster
    cuda_graphs: bool = False  # launch a token's kernels together, on CUDA

    # what it continues: text with \n, \t, \r and \\; FILE:path; - for standard input
    prompt: str = ""  # empty: begins after end-of-text, a newline, or a token drawn by the seed

    # how
    num_samples: Annotated[int, "[1, 1e6]"] = 1  # how many, all from the same prompt
    max_new_tokens: Annotated[int, "[1, 1e5]"] = 500  # length of each, in tokens
    temperature: Annotated[float, "[0, inf)"] = 0.8  # 0: always the likeliest token
    top_k: Annotated[int, "[1, inf)"] = 200  # draw from the k likeliest tokens only
    top_p: Annotated[float, "(0, 1]"] = 1.0  # and from the fewest that hold this share
    stop: str = ""  # end a sample before this text (escapes as in the prompt)
    seed: Annotated[int, "[0, inf)"] = 1337  # the same seed, the same text
    interactive: bool = False  # read prompts from the terminal, one after another
    output: str = ""  # a new file: a JSON line for each sample (prompt, text, tokens, seed, number)


@config.script
def main(argv: list[str]) -> None:
    options = config.build(SampleConfig, config.read(SampleConfig, argv, instead=NANOGPT))
    if options.interactive and options.prompt:
        raise UserError("--interactive reads its prompts from the terminal: leave --prompt out")
    if options.interactive and options.output:
        raise UserError("--interactive shows its samples: leave --output out")
    device = find_device(options.device)
    if options.cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs needs CUDA; on {device.type} leave it out")
    prompt = read_prompt(options.prompt)
    options.stop = unescape(options.stop)
    name = options.checkpoint or str(checkpoint.newest_run(Path("out")))
    model, meta = load_model(name, device, options.cache_dir)
    make_fast(model, options)
    tok = tokenizer.load(meta["tokenizer"])
    ids = start_ids(tok, prompt, options.seed)

    iter_num, val_loss = meta["progress"].get("iter_num"), meta["progress"].get("val_loss")
    iteration = "" if iter_num is None else f"iteration {iter_num}, "
    loss = f"validation loss {val_loss:.4f}, " if type(val_loss) is float else ""
    print(f"{name}: {iteration}{loss}{device}", file=sys.stderr)
    if not options.interactive:
        return show(model, tok, prompt, ids, options)
    print("a prompt, then Enter; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            prompt = unescape(input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            print(file=sys.stderr)
            return
        try:
            show(model, tok, prompt, start_ids(tok, prompt, options.seed), options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends this answer alone
            print()
        options.seed += 1  # asked again, it answers anew


def show(
    model: LanguageModel, tok: Tokenizer, prompt: str, ids: np.ndarray, options: SampleConfig
) -> None:
    """Print a prompt and what the model makes of its `ids` (T,): a single sample as it comes."""
    longest = model.config.block_size if isinstance(model, GPT) else 1
    if len(ids) > longest > 1:
        print(
            f"of the prompt's {len(ids)} tokens the model sees the last {longest}", file=sys.stderr
        )
    if options.output:
        write_samples(model, tok, prompt, ids, options)
    elif options.num_samples == 1:
        print(prompt, end="", flush=True)
        stream = TextStream(tok, options.stop)
        for _ in complete(model, [stream], ids, options, at_a_time=1):
            print(stream.take(), end="", flush=True)
        print()
    else:
        for stream in make_samples(model, tok, ids, options):
            tqdm.write(f"{prompt}{stream.take()}\n{'-' * 80}")


def write_samples(
    model: LanguageModel, tok: Tokenizer, prompt: str, ids: np.ndarray, options: SampleConfig
) -> None:
    """Write the samples to --output, which must be new: a JSON line each, batch after batch."""
    try:
        file = open(options.output, "xb")
    except OSError as error:
        reason = error.strerror.lower()
        raise UserError(f"--output={options.output}: {reason}; choose another name") from None
    size = 0  # of the lines that are whole
    try:
        with file:
            for number, stream in enumerate(make_samples(model, tok, ids, options)):
                about = {"prompt": prompt, "text": stream.take(), "tokens": stream.ids}
                about |= {"seed": options.seed, "number": number}
                line = json.dumps(about, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                file.flush()
                size += len(line)
    except OSError as error:
        error.filename = options.output
        raise
    finally:
        if size:
            os.truncate(options.output, size)
        else:  # the same command can be given again
            os.unlink(options.output)
    print(f"saved: {options.output}, {options.num_samples} samples", file=sys.stderr)


def make_samples(
    model: LanguageModel, tok: Tokenizer, ids: np.ndarray, options: SampleConfig
) -> Iterator["TextStream"]:
    """Make all samples, in batches, under a progress bar; yield them in their order."""
    total = options.num_samples * options.max_new_tokens
    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar:
        for numbers in batches(model, len(ids), options):
            streams = [TextStream(tok, options.stop) for _ in numbers]
            for _ in complete(model, streams, ids, options, numbers.start):
                bar.update(len(numbers) * TOGETHER)
            bar.update(numbers.stop * options.max_new_tokens - bar.n)
            yield from streams


def batches(model: LanguageModel, n_prompt: int, options: SampleConfig) -> Iterator[range]:
    """The numbers of the samples, in parts that fit into a quarter of the memory."""
    available = memory(next(model.parameters()).device) or 2**32
    of_one = 4 * model.numbers_to_generate(n_prompt + options.max_new_tokens)
    of_one += 40 * options.max_new_tokens  # its draws and its ids
    at_once = max(1, available // 4 // of_one)
    for first in range(0, options.num_samples, at_once):
        yield range(first, min(first + at_once, options.num_samples))


def memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or that this machine has; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = []
    if hasattr(os, "sysconf"):  # all but Windows
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # it is not there, or "max"
            sizes.append(int(Path(limit).read_text()))
    return min(sizes, default=None)


def find_device(name: str) -> torch.device:
    """The device of that name, or the best there is for "auto"; UserError where it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    names = [kind for kind, is_there in there.items() if is_there]
    if name == "auto":
        name = names[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"no device {name!r}; this machine has {', '.join(names)}") from None
    if not there.get(device.type):
        raise UserError(
            f"device {name!r} is not on this machine, which has {', '.join(names)}: "
            f"--device={names[0]}"
        )
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"device {name!r}: this machine has {count} of them")
    return device


def fast_dtype(device: torch.device) -> str:
    """The dtype in which a device multiplies large matrices fastest."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    is_fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    return "bfloat16" if is_fast else "float32"


def make_fast(model: LanguageModel, options: SampleConfig) -> None:
    """Bring a model into the dtype and the layout in which it samples fastest (README)."""
    device, dtype = next(model.parameters()).device, options.dtype
    if dtype == "auto":
        wide = isinstance(model, GPT) and (device.type != "cpu" or model.config.n_embd >= WIDE)
        dtype = "bfloat16" if fast_dtype(device) == "bfloat16" and wide else "float32"
    if dtype == "bfloat16" and isinstance(model, GPT):
        # logits less their mean: the same draws, and numbers that bfloat16 rounds the least
        head = model.lm_head.weight.detach()
        model.lm_head.weight = nn.Parameter(head - head.mean(0))
    model.to(getattr(torch, dtype))
    if device.type == "cpu":
        pack(model)


def load_model(name: str, device: torch.device, cache_dir: str = "") -> tuple[LanguageModel, dict]:
    """A model in evaluation mode on `device`, and the meta that a checkpoint of it would have.

    `name` is what --checkpoint takes; UserError where it is not there or cannot be used.
    """
    if loaded := load_pretrained(name, cache_dir):
        model, meta = loaded
        return model.to(device).eval(), meta
    path = checkpoint.find(name, (checkpoint.BEST, checkpoint.LATEST))
    tensors, meta = checkpoint.load(path)
    cfg = check_model(tensors, meta, path)
    weights = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    return assemble(meta["model"], cfg, weights).to(device).eval(), meta


def check_model(tensors: dict[str, Tensor], meta: dict, path: Path) -> GPTConfig:
    """The config of a checkpoint's model; UserError where its tensors are not of such a one.

    To be called before anything of the size that the config claims is allocated.
    """
    cfg = config.build(GPTConfig, meta["model_config"], source=str(path))
    if meta["model"] not in MODELS:
        raise UserError(f"{path} holds a model of kind {meta['model']!r}; known are gpt, bigram")
    checkpoint.match(dict(outline(meta["model"], cfg).named_parameters()), tensors, "model.", path)
    return cfg


def load_pretrained(name: str, cache_dir: str) -> tuple[GPT, dict] | None:
    """GPT-2 by its name, or the model in a folder of transformers'; None where it is neither."""
    folder = pretrained_folder(name, cache_dir)
    if folder is None:
        return None
    try:
        model = GPT.from_pretrained(folder)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{name} is no model that can be used: {error}") from None
    tok = {"kind": "gpt2"} if name in GPT2 else tokenizer.stored_in(folder)
    meta = {
        "model": "gpt",
        "model_config": asdict(model.config),
        "tokenizer": tok,
        "progress": {},
    }
    return model, meta


def read_prompt(prompt: str) -> str:
    """The text that --prompt means."""
    if prompt != "-" and not prompt.startswith("FILE:"):
        return unescape(prompt)
    path = prompt.removeprefix("FILE:")
    try:
        data = sys.stdin.buffer.read() if prompt == "-" else Path(path).read_bytes()
        return data.decode()
    except UnicodeDecodeError as error:
        path = "standard input" if prompt == "-" else path
        raise UserError(f"--prompt: {path} is not UTF-8 at offset {error.start}") from None
    except OSError as error:
        raise UserError(f"--prompt: {path}: {error.strerror}") from None


def unescape(text: str) -> str:
    return re.sub(r"\\[ntr\\]", lambda match: ESCAPES[match[0]], text)


def start_ids(tok: Tokenizer, prompt: str, seed: int) -> np.ndarray:
    """The ids (T,) that a sample continues: the prompt's; for an empty prompt one to begin with.

    That is end-of-text where there is one, else a newline, else an id drawn by `seed`.
    """
    if prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not Unicode at character {error.start + 1}") from None
        return tok.encode(prompt)
    if tok.end_of_text is not None:
        return np.array([tok.end_of_text])
    try:
        return tok.encode("\n")
    except UserError:
        return np.random.default_rng(seed).integers(tok.vocab_size, size=1)


def complete(
    model: LanguageModel,
    streams: "list[TextStream]",
    ids: np.ndarray,
    options: SampleConfig,
    first: int = 0,
    at_a_time: int = TOGETHER,
) -> Iterator[None]:
    """Bring the samples of the numbers `first` and following to their ends, yielding now and then.

    Each number has random numbers of its own, so that sample 7 is the same among 10 or 1000, but
    for rounding.
    """
    numbers = range(first, first + len(streams))
    device = next(model.parameters()).device
    idx = torch.from_numpy(ids.astype(np.int64))[None].to(device)
    n = options.max_new_tokens
    draws = [np.random.default_rng((options.seed, i)).random(n, np.float32) for i in numbers]
    steps = model.generate(
        idx,
        torch.from_numpy(np.stack(draws)),
        options.temperature,
        options.top_k,
        options.top_p,
        streams[0].tok.vocab_size,
        capture=partial(Captured, device=device) if options.cuda_graphs else None,
    )
    while some := list(islice(steps, at_a_time)):  # (B,) each
        for new in torch.stack(some).tolist():
            for stream, i in zip(streams, new, strict=True):
                stream.add(i)
        if all(stream.ended for stream in streams):
            break
        yield
    for stream in streams:
        stream.finish()
    yield


class TextStream:
    """Turns ids into text that may be shown at once: whole characters, and nothing of `stop`."""

    def __init__(self, tok: Tokenizer, stop: str = ""):
        self.tok, self.stop, self.ids, self.ended = tok, stop, [], False
        self._ready, self._held = [], ""  # what has become certain, what may yet be `stop`
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, i: int) -> None:
        """One more id."""
        if self.ended:
            return
        self.ids.append(i)
        if i == self.tok.end_of_text:
            return self.finish()
        self._held += self._utf8.decode(self.tok.decode_bytes([i]))
        before, found, _ = self._held.partition(self.stop) if self.stop else (self._held, "", "")
        if found:
            self.ended = True
            self._ready.append(before)
            return
        keep = max(
            (n for n in range(1, len(self.stop)) if self._held.endswith(self.stop[:n])), default=0
        )
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        self._ready.append(shown)

    def finish(self) -> None:
        """Nothing more can come: what was held back is text."""
        if not self.ended:
            self.ended = True
            self._ready.append(self._held + self._utf8.decode(b"", final=True))

    def take(self) -> str:
        """The text that has become certain since the last call."""
        text = "".join(self._ready)
        self._ready.clear()
        return text


if __name__ == "__main__":
    raise SystemExit(main())
