"""Generate text from a checkpoint.

    python sample.py --prompt "ROMEO:"                            from the newest run in out/
    python sample.py --checkpoint out/shakespeare_char --num_samples 3 --temperature 0.8
    python sample.py --prompt FILE:start.txt --stop "\\n\\n" --device cpu
    python sample.py --num_samples 1000 --output samples.jsonl
    echo "To be" | python sample.py --prompt -
    python sample.py --checkpoint gpt2-xl --prompt "The answer to life, the universe and everything"
    python sample.py --interactive                                a prompt per line, until Ctrl-D
    python sample.py --serve                                      a page to type prompts into

    prompt -> Tokenizer.encode -> ids (T,) -> generate() -> ids (B,) -> TextStream -> text

Text goes to standard output, everything else to standard error. A single sample is printed as it is
generated. Several are generated in batches that fit in memory. A sample ends early at --stop, which
is not printed, or at the end-of-text token.
"""

from folio.process import script  # isort: skip  (first, for Ctrl-C during other imports)
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

from data.errors import UserError
from data.tokenizer import Tokenizer
from folio import run_folder
from folio.ensemble import Ensemble, load_models
from folio.generation import (
    CHUNK_TOKENS,
    Sampling,
    TextStream,
    batches,
    encode_prompt,
    generate_texts,
    prepare_for_sampling,
)
from folio.machine import find_device
from folio.options import PathStr, build_options, expand_path, read_options, unescape
from model import Bigram, LanguageModel


@dataclass
class SampleConfig(Sampling):
    num_samples: Annotated[int, "[1, 1e6]"] = 1  # number of samples from the same prompt
    output: PathStr = ""  # write them to this new file, as JSON lines (prompt, text, tokens, ...)

    # the prompt: text with the escapes \n, \t, \r and \\; FILE:path; - for standard input
    prompt: str = ""  # empty: start from end-of-text, a newline, or a random token
    interactive: bool = False  # read prompts from the terminal instead
    serve: bool = False  # read them from a web page instead, until Ctrl-C
    host: str = "127.0.0.1"  # the page's address; 0.0.0.0: also for others, by IP address
    port: Annotated[int, "[0, 65535]"] = 8000  # its port; 0: any free one

    # the model
    checkpoint: PathStr = ""  # file, folder or Hub id; a,b: their mean; empty: the newest run
    cache_dir: PathStr = ""  # folder for models of the Hub; empty: Hugging Face's default cache
    device: str = "auto"  # cuda, mps, cpu; auto: the first that exists
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: 16 bits where that is faster


NANOGPT = {"start": "use prompt", "out_dir": "use checkpoint"}  # its names, with advice


@script
def main(argv: list[str]) -> None:
    given, _ = read_options(SampleConfig, argv, hints=NANOGPT)
    options = build_options(SampleConfig, given)
    if options.interactive and options.prompt:
        raise UserError("--interactive reads prompts from the terminal; it does not take --prompt")
    if options.interactive and options.output:
        raise UserError("--interactive prints its samples; it does not take --output")
    if options.serve and (options.interactive or options.output or options.num_samples > 1):
        raise UserError("--serve does not take --interactive, --output or --num_samples")
    if not options.serve and (unused := given.keys() & {"host", "port"}):
        raise UserError(f"--{min(unused)} needs --serve")
    device = find_device(options.device)
    prompt = read_prompt(options.prompt)
    options.stop = tuple(map(unescape, options.stop))
    name = options.checkpoint or str(run_folder.newest_run(Path("out")))
    model, tok, ckpt = load_models(name, options.cache_dir)
    model.to(device)
    prepare_for_sampling(model, options.dtype, single=options.num_samples == 1)
    ids = encode_prompt(tok, prompt, options.seed)

    iter_num, val_loss = (ckpt.meta["progress"].get(key) for key in ("iter_num", "val_loss"))
    iteration = "" if iter_num is None else f"iteration {iter_num}, "
    loss = f"validation loss {val_loss:.4f}, " if type(val_loss) is float else ""
    about = "the mean of several models, " if isinstance(model, Ensemble) else iteration + loss
    about = f"{name}: {about}{device}"
    print(about, file=sys.stderr)
    if options.serve:
        from folio.serve import serve  # http.server takes a while to import

        return serve(model, tok, about, prompt, options, options.host, options.port)
    if not options.interactive:
        return print_samples(model, tok, prompt, ids, options)
    print("type a prompt and press Enter; Ctrl-D ends (Windows: Ctrl-Z)", file=sys.stderr)
    while True:
        try:
            prompt = unescape(input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            print(file=sys.stderr)
            return
        try:
            ids = encode_prompt(tok, prompt, options.seed)
            print_samples(model, tok, prompt, ids, options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends this sample only
            print()
        options.seed += 1  # a repeated prompt gets another answer


def read_prompt(prompt: str) -> str:
    """Resolve --prompt to text."""
    if prompt != "-" and not prompt.startswith("FILE:"):
        return unescape(prompt)
    path = expand_path(prompt.removeprefix("FILE:"))
    try:
        data = sys.stdin.buffer.read() if prompt == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as error:
        path = "standard input" if prompt == "-" else path
        raise UserError(f"--prompt: {path} is not UTF-8 at offset {error.start}") from None
    except OSError as error:
        raise UserError(f"--prompt: {path}: {error.strerror}") from None


def print_samples(
    model: LanguageModel, tok: Tokenizer, prompt: str, ids: np.ndarray, options: SampleConfig
) -> None:
    """Generate from the prompt's `ids` (T,), to the terminal or to --output."""
    longest = model.config.block_size
    if not isinstance(model, Bigram) and len(ids) > longest:
        shortened = f"the prompt has {len(ids)} tokens; only the last {longest} are used"
        print(shortened, file=sys.stderr)
    if options.output:
        write_samples(model, tok, prompt, ids, options)
    elif options.num_samples == 1:
        print(prompt, end="", flush=True)
        generate_texts(model, tok, ids, options, range(1), print_new_text, chunk_tokens=1)
        print()
    else:
        for stream in generate_all(model, tok, ids, options):
            tqdm.write(f"{prompt}{stream.take()}\n{'-' * 80}")


def print_new_text(streams: list[TextStream]) -> None:
    print(streams[0].take(), end="", flush=True)


def generate_all(
    model: LanguageModel, tok: Tokenizer, ids: np.ndarray, options: SampleConfig
) -> Iterator[TextStream]:
    """Generate all samples, in batches, with a progress bar; yield them in order."""
    n, total = options.max_new_tokens, options.num_samples * options.max_new_tokens
    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar:

        def advance(streams: list[TextStream]) -> None:
            bar.update(len(streams) * CHUNK_TOKENS)

        for samples in batches(model, len(ids), options.num_samples, n):
            yield from generate_texts(model, tok, ids, options, samples, advance)
            bar.update(samples.stop * n - bar.n)


def write_samples(
    model: LanguageModel, tok: Tokenizer, prompt: str, ids: np.ndarray, options: SampleConfig
) -> None:
    """Write all samples to --output, a new file, as JSON lines. `tokens` are all ids that were
    generated, also of --stop and end-of-text; `text` ends before these.

    After an error it keeps only complete lines, and is removed if there are none.
    """
    try:
        file = open(options.output, "xb")
    except OSError as error:
        reason = error.strerror.lower()
        raise UserError(f"--output={options.output}: {reason}; use another name") from None
    n_bytes = 0  # in complete lines
    try:
        with file:
            for number, stream in enumerate(generate_all(model, tok, ids, options)):
                record = {"prompt": prompt, "text": stream.take(), "tokens": stream.ids}
                record |= {"seed": options.seed, "number": number}
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                file.flush()
                n_bytes += len(line)
    except OSError as error:
        error.filename = options.output
        raise
    finally:
        if n_bytes:
            os.truncate(options.output, n_bytes)
        else:
            os.unlink(options.output)
    print(f"saved: {options.output}, {options.num_samples} samples", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
