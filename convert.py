"""Import nanoGPT's checkpoints, and export models to transformers.

    python convert.py out/mine hf/mine              for transformers' from_pretrained("hf/mine")
    python convert.py ckpt.pt out/imported          a nanoGPT checkpoint with GPT-2's tokenizer
    python convert.py ckpt.pt out/imported --dataset=shakespeare_char       or a data set's

A file written by torch.save() is taken for nanoGPT's, and becomes a run's folder to sample from or
to finetune. Any other model that sample.py accepts becomes a folder for transformers, if it has
only GPT-2's parts. Its tokenizer goes with it, and gives the same ids there.
"""

from folio.process import script  # isort: skip  (first, for Ctrl-C during other imports)
import json
import math
import re
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch

from data import bins, tokenizer
from data.errors import UserError
from folio import checkpoint, gpt2, hf_tokenizer, run_folder
from folio.checkpoint import Checkpoint, is_torch_file
from folio.options import PathStr, build_options, read_options
from model import GPT, GPTConfig

NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
END_OF_TEXT_ROLES = ("bos_token", "eos_token", "unk_token")  # all the same token, as in GPT-2


@dataclass
class ConvertConfig:
    source: PathStr = ""  # nanoGPT's ckpt.pt, or one model that sample.py --checkpoint accepts
    target: PathStr = ""  # the folder to create
    dataset: PathStr = ""  # for ckpt.pt: the data set it was trained on; empty: GPT-2's tokenizer
    data_dir: PathStr = "data"  # the parent folder of all data sets
    cache_dir: PathStr = ""  # folder for models of the Hub; empty: Hugging Face's default cache


@script
def main(argv: list[str]) -> None:
    given, _ = read_options(ConvertConfig, argv, positional=("source", "target"))
    options = build_options(ConvertConfig, given)
    if not options.source or not options.target:
        raise UserError("usage: python convert.py SOURCE TARGET")
    target = Path(options.target)
    if target.exists():
        raise UserError(f"{target} exists already; use another name")
    if is_torch_file(Path(options.source)):
        import_nanogpt(Path(options.source), target, options)
    elif options.dataset:
        raise UserError(f"--dataset is for nanoGPT's checkpoints; {options.source} has a tokenizer")
    else:
        export(options.source, target, options.cache_dir)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Create a folder atomically: yield a temporary one, then rename it to `target`."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(source: str, target: Path, cache_dir: str) -> None:
    """Export a model to a folder that transformers can load."""
    ckpt = run_folder.open_checkpoint(source, cache_dir)
    model = checkpoint.build_model(ckpt)
    if not isinstance(model, GPT):
        raise UserError(f"{source} is a {ckpt.meta['model']} model, which transformers lacks")
    tok = checkpoint.load_tokenizer(ckpt)
    try:
        config = gpt2.config_to_gpt2(model.config)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    config |= dict.fromkeys(("bos_token_id", "eos_token_id"), tok.end_of_text)
    files, has_end = hf_tokenizer.files(tok), tok.end_of_text is not None
    settings = {
        "tokenizer_class": "GPT2Tokenizer" if "vocab.json" in files else "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(END_OF_TEXT_ROLES if has_end else (), tokenizer.END_OF_TEXT),
    }
    for name, content in {
        "config.json": config,
        "tokenizer_config.json": settings,
        hf_tokenizer.OURS: tok.meta(),
    }.items():
        files[name] = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    with new_folder(target) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        tensors = gpt2.tensors_to_gpt2(model)
        path = folder / "model.safetensors"
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    print(f"{target}: {model.n_params():,} parameters and {', '.join(sorted(files))}")


def import_nanogpt(path: Path, target: Path, options: ConvertConfig) -> None:
    """Convert nanoGPT's ckpt.pt to a run's folder."""
    saved = load_nanogpt(path)
    try:
        state = {gpt2.plain_name(name): t.float() for name, t in saved["model"].items()}
        sizes = {"bias": "ln_f.bias" in state, **saved["model_args"]}
        if unknown := sorted(sizes.keys() - NANOGPT_ARGS):
            raise UserError(f"{path} is not nanoGPT's model: it has {', '.join(unknown)}")
        config = build_options(GPTConfig, {**sizes, "activation": "gelu"}, str(path))
        loss = float(saved["best_val_loss"])  # 1e9: it was not evaluated
        progress = {"iter_num": int(saved["iter_num"]), "val_loss": loss if loss < 1e9 else None}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a nanoGPT checkpoint ({reason})") from None
    try:
        tensors = {f"model.{name}": t for name, t in gpt2.tie_head(state).items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    tok_meta = {"kind": "gpt2"}
    if options.dataset:
        tok_meta = tokenizer.stored_in(bins.find(Path(options.data_dir), options.dataset))
    meta = {
        "run_id": "nanogpt",
        "model": "gpt",
        "model_config": asdict(config),
        "run_config": {},
        "tokenizer": tok_meta,
        "dataset": "",
        "progress": progress,
        "scaler": {},
        "threads": torch.get_num_threads(),
    }
    checkpoint.check_model(Checkpoint(path, tensors, meta))
    tok = tokenizer.load(tok_meta)
    padded = 64 * math.ceil(tok.vocab_size / 64)  # as nanoGPT pads GPT-2's vocabulary
    if config.vocab_size not in (tok.vocab_size, padded if tok.kind == "gpt2" else 0):
        raise UserError(
            f"{path} has {config.vocab_size} ids and the {tok.kind} tokenizer {tok.vocab_size}: "
            "use --dataset=NAME with the data set that it was trained on"
        )
    with new_folder(target) as folder:
        run_folder.save_run(folder, tensors, meta, best=True, snapshot=False, keep=0)
    n_params = sum(tensor.numel() for tensor in tensors.values())
    loss = "never evaluated"
    if progress["val_loss"] is not None:
        loss = f"validation loss {progress['val_loss']:.4f} according to nanoGPT"
    print(f"{target}: {n_params:,} parameters, {loss}")


def load_nanogpt(path: Path) -> dict:
    """Load a file of torch.save, if it has nothing but tensors and plain values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for other files is not documented
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = found[1] if found else "something else"
        reason = f"only tensors and plain values are loaded, and it contains {what}"
        if not zipfile.is_zipfile(path):
            reason = "it is damaged, or cut short"
        raise UserError(f"{path} is not a nanoGPT checkpoint: {reason}") from None
    if type(saved) is not dict:
        kind = type(saved).__name__
        raise UserError(f"{path} is not a nanoGPT checkpoint: it contains a {kind}")
    return saved


if __name__ == "__main__":
    raise SystemExit(main())
