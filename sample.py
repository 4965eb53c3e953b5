"""A checkpoint in, text out.

    python sample.py --prompt "ROMEO:"                            from the newest run in out/
    python sample.py --checkpoint out/shakespeare_char --num_samples 3 --temperature 0.8
    python sample.py --prompt FILE:start.txt --stop "\\n\\n" --device cpu
    echo "To be" | python sample.py --prompt -
    python sample.py --checkpoint gpt2-xl --prompt "The answer to life, the universe and everything"
    python sample.py --interactive                                a prompt a line, until Ctrl-D

    prompt -> Tokenizer.encode -> idx (B, T) -> GPT.generate -> ids (B,) -> text, piece by piece

The text goes to standard output, everything else to standard error. A single sample appears as it
is made. A sample ends early at --stop, which is not shown, or at the end-of-text token.
"""

import codecs
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

import checkpoint
import config
from config import UserError
from data import tokenizer
from data.download import GPT2, pretrained_folder
from data.tokenizer import Tokenizer
from model import GPT, MODELS, GPTConfig, LanguageModel, outline

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


NANOGPT = {"start": "write prompt", "out_dir": "write checkpoint"}  # what it calls them


@dataclass
class SampleConfig:
    # what speaks
    checkpoint: str = ""  # a file, a run's folder, one of transformers' or gpt2*; empty: newest run
    cache_dir: str = ""  # where gpt2* is kept; empty: Hugging Face's usual cache
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them that is there

    # what it continues: text with \n, \t, \r and \\; FILE:path; - for standard input
    prompt: str = ""  # empty: begins after end-of-text, a newline, or a token drawn by the seed

    # how
    num_samples: Annotated[int, "[1, 1e4]"] = 1  # how many, all from the same prompt
    max_new_tokens: Annotated[int, "[1, 1e5]"] = 500  # length of each, in tokens
    temperature: Annotated[float, "[0, inf)"] = 0.8  # 0: always the likeliest token
    top_k: Annotated[int, "[1, inf)"] = 200  # draw from the k likeliest tokens only
    top_p: Annotated[float, "(0, 1]"] = 1.0  # and from the fewest that hold this share
    stop: str = ""  # end a sample before this text (escapes as in the prompt)
    interactive: bool = False  # read prompts from the terminal, one after another
    seed: Annotated[int, "[0, inf)"] = 1337  # the same seed, the same text


@config.script
def main(argv: list[str]) -> None:
    options = config.build(SampleConfig, config.read(SampleConfig, argv, instead=NANOGPT))
    if options.interactive and options.prompt:
        raise UserError("--interactive reads its prompts from the terminal: leave --prompt out")
    device = find_device(options.device)
    prompt = read_prompt(options.prompt)
    options.stop = unescape(options.stop)
    name = options.checkpoint or str(checkpoint.newest_run(Path("out")))
    model, meta = load_model(name, device, options.cache_dir)
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
            prompt = unescape(input("> "))
        except EOFError:
            print()
            return
        try:
            show(model, tok, prompt, start_ids(tok, prompt, options.seed), options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def show(
    model: LanguageModel, tok: Tokenizer, prompt: str, ids: np.ndarray, options: SampleConfig
) -> None:
    """Print a prompt and what the model makes of its `ids` (T,): a single sample as it comes."""
    if len(ids) > (longest := model.config.block_size):
        print(
            f"of the prompt's {len(ids)} tokens the model sees the last {longest}", file=sys.stderr
        )
    pieces = complete(model, tok, ids, options)
    if options.num_samples == 1:
        print(prompt, end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        for text in map("".join, zip(*pieces, strict=True)):
            print(prompt + text, "-" * 80, sep="\n")


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
    model = MODELS[meta["model"]](cfg)
    checkpoint.restore(dict(model.named_parameters()), tensors, "model.", path)
    return model.to(device).eval(), meta


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
    model: LanguageModel, tok: Tokenizer, ids: np.ndarray, options: SampleConfig
) -> Iterator[list[str]]:
    """Yield, one position after the other, the text that each of the samples gains."""
    device = next(model.parameters()).device
    idx = torch.from_numpy(ids.astype(np.int64)).to(device).expand(options.num_samples, -1)
    n = options.max_new_tokens
    # each sample has its own stream: sample 7 is the same among 10 or 1000
    streams = [np.random.default_rng((options.seed, i)) for i in range(options.num_samples)]
    uniforms = torch.from_numpy(np.stack([s.random(n) for s in streams]))
    texts = [TextStream(tok, options.stop) for _ in range(options.num_samples)]
    for new in model.generate(
        idx, uniforms, options.temperature, options.top_k, options.top_p, tok.vocab_size
    ):
        yield [text.add(i) for text, i in zip(texts, new.tolist(), strict=True)]
        if all(text.ended for text in texts):
            return
    yield [text.finish() for text in texts]


class TextStream:
    """Turns ids into text that may be shown at once: whole characters, and nothing of `stop`."""

    def __init__(self, tok: Tokenizer, stop: str = ""):
        self.tok, self.stop, self.held, self.ended = tok, stop, "", False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, i: int) -> str:
        """The text that has become certain with one more id."""
        if self.ended:
            return ""
        if i == self.tok.end_of_text:
            return self.finish()
        self.held += self._utf8.decode(self.tok.decode_bytes([i]))
        before, found, _ = self.held.partition(self.stop) if self.stop else (self.held, "", "")
        if found:
            self.ended = True
            return before
        keep = max(
            (n for n in range(1, len(self.stop)) if self.held.endswith(self.stop[:n])), default=0
        )
        shown = self.held[: len(self.held) - keep]
        self.held = self.held[len(shown) :]
        return shown

    def finish(self) -> str:
        """What was held back, when nothing more can come."""
        if self.ended:
            return ""
        self.ended = True
        return self.held + self._utf8.decode(b"", final=True)


if __name__ == "__main__":
    raise SystemExit(main())
