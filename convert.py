"""Import nanoGPT's checkpoints, and export models to transformers.

    python convert.py out/mine hf/mine              for transformers' from_pretrained("hf/mine")
    python convert.py ckpt.pt out/imported          a nanoGPT checkpoint with GPT-2's tokenizer
    python convert.py ckpt.pt out/imported --dataset=shakespeare_char       or a data set's

A source that ends in .pt is nanoGPT's, and becomes a run's folder to sample from or to finetune.
Any other source that sample.py accepts becomes a folder for transformers, if the model has only
GPT-2's parts. The tokenizer is exported if transformers supports its kind (gpt2, bpe).
"""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors.torch
import torch

from data import tokenizer
from data.errors import UserError
from folio import checkpoint, gpt2, run_folder
from folio.checkpoint import Checkpoint
from folio.options import PathStr, build_options, read_options
from folio.process import script
from model import GPT, GPTConfig


@dataclass
class ConvertConfig:
    source: PathStr = ""  # nanoGPT's ckpt.pt, or anything that sample.py --checkpoint accepts
    target: PathStr = ""  # the folder to create
    dataset: PathStr = ""  # for ckpt.pt: the data set it was trained on; empty: GPT-2's tokenizer
    data_dir: PathStr = "data"  # the parent folder of all data sets
    cache_dir: PathStr = ""  # download folder for gpt2*; empty: Hugging Face's default cache


@script
def main(argv: list[str]) -> None:
    given, _ = read_options(ConvertConfig, argv, positional=("source", "target"))
    options = build_options(ConvertConfig, given)
    if not options.source or not options.target:
        raise UserError("usage: python convert.py SOURCE TARGET")
    target = Path(options.target)
    if target.exists():
        raise UserError(f"{target} exists already; use another name")
    if options.source.endswith(".pt"):
        import_nanogpt(Path(options.source), target, options)
    else:
        export(options.source, target, options.cache_dir)


def export(source: str, target: Path, cache_dir: str) -> None:
    """Write a model as a folder for transformers, atomically."""
    ckpt = run_folder.open_checkpoint(source, cache_dir)
    model = checkpoint.build_model(ckpt)
    if not isinstance(model, GPT):
        raise UserError(f"{source} is a {ckpt.meta['model']} model, which transformers lacks")
    tok = tokenizer.load(ckpt.meta["tokenizer"])
    try:
        config = gpt2.config_to_gpt2(model.config)
    except ValueError as error:
        raise UserError(f"{source}: {error}; only GPT-2's parts can be exported") from None
    config |= dict.fromkeys(("bos_token_id", "eos_token_id"), tok.end_of_text)
    files = {"config.json": config, tokenizer.EXPORTED: tok.meta()}
    if isinstance(tok, tokenizer.BytePairTokenizer):
        end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.END_OF_TEXT)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": model.config.block_size,
            "add_prefix_space": False,
            **end,
        }
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        if isinstance(tok, tokenizer.BytePairTokenizer):
            for name, data in tok.files().items():
                (partial / name).write_bytes(data)
        tensors = gpt2.tensors_to_gpt2(model)
        path = partial / "model.safetensors"
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{target}: {model.n_params():,} parameters and {', '.join(sorted(files))}")


def import_nanogpt(path: Path, target: Path, options: ConvertConfig) -> None:
    """Convert nanoGPT's ckpt.pt to a run's folder."""
    saved = load_nanogpt(path)
    try:
        known = {field.name for field in fields(GPTConfig)}
        sizes = {k: v for k, v in saved["model_args"].items() if k in known}
        config = build_options(GPTConfig, {**sizes, "activation": "gelu"}, str(path))
        # torch.compile adds a prefix
        state = {k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()}
        tensors = {
            "model." + name.removeprefix("transformer."): tensor.float()
            for name, tensor in state.items()
            if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
        }
        progress = {"iter_num": int(saved["iter_num"]), "val_loss": float(saved["best_val_loss"])}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a nanoGPT checkpoint ({reason})") from None
    tok_meta = {"kind": "gpt2"}
    if options.dataset:
        tok_meta = tokenizer.stored_in(Path(options.data_dir) / options.dataset)
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
    if tok.vocab_size > config.vocab_size:
        raise UserError(
            f"{path} has {config.vocab_size} ids and the {tok.kind} tokenizer {tok.vocab_size}: "
            "use --dataset=NAME with the data set that it was trained on"
        )
    target.mkdir(parents=True)
    run_folder.save_run(target, tensors, meta, best=True, snapshot=False, keep=0)
    loss = progress["val_loss"]
    n_params = sum(tensor.numel() for tensor in tensors.values())
    print(f"{target}: {n_params:,} parameters, validation loss {loss:.4f} according to nanoGPT")


def load_nanogpt(path: Path) -> dict:
    """Load a file of torch.save, if it has nothing but tensors and plain values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from None
    except Exception:  # what torch.load raises for other files is not documented
        raise UserError(
            f"{path} is not a nanoGPT checkpoint: it is damaged, or contains more than tensors "
            "and plain values"
        ) from None
    if type(saved) is not dict:
        kind = type(saved).__name__
        raise UserError(f"{path} is not a nanoGPT checkpoint: it contains a {kind}")
    return saved


if __name__ == "__main__":
    raise SystemExit(main())
