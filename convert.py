"""In from nanoGPT, out to transformers.

    python convert.py out/mine hf/mine              for transformers' from_pretrained("hf/mine")
    python convert.py ckpt.pt out/imported          a nanoGPT checkpoint, with GPT-2's tokenizer
    python convert.py ckpt.pt out/imported --dataset=shakespeare_char       or a data set's

What ends in .pt is nanoGPT's and becomes a checkpoint. Everything else that sample.py takes (a run,
a checkpoint, a folder of transformers', gpt2) becomes a folder that transformers loads, with the
tokenizer where that has such a kind (gpt2, bpe), if it has no parts but GPT-2's.
"""

import json
import shutil
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch
import torch

import checkpoint
import config
from config import UserError
from data import tokenizer
from model import GPT, GPTConfig, config_to_gpt2, outline, weights_to_gpt2
from sample import load_model


@dataclass
class ConvertConfig:
    source: str = ""  # nanoGPT's ckpt.pt, or what sample.py --checkpoint takes
    target: str = ""  # the folder to make
    dataset: str = ""  # for nanoGPT's: whose tokenizer it has; empty: GPT-2's
    data_dir: str = "data"  # where data sets lie
    cache_dir: str = ""  # where gpt2* is kept; empty: Hugging Face's usual cache


@config.script
def main(argv: list[str]) -> None:
    options = config.build(
        ConvertConfig, config.read(ConvertConfig, argv, bare=("source", "target"))
    )
    if not options.source or not options.target:
        raise UserError("write: python convert.py SOURCE TARGET")
    target = Path(options.target)
    if target.exists():
        raise UserError(f"{target} is there already; choose another name")
    if options.source.endswith(".pt"):
        import_nanogpt(Path(options.source), target, options)
    else:
        export(options.source, target, options.cache_dir)


def export(source: str, target: Path, cache_dir: str) -> None:
    """Write a model as a folder of transformers', whole or not at all."""
    model, meta = load_model(source, torch.device("cpu"), cache_dir)
    if not isinstance(model, GPT):
        raise UserError(f"{source} is a {meta['model']} model, which transformers does not have")
    tok = tokenizer.load(meta["tokenizer"])
    try:
        about = config_to_gpt2(model.config)
    except ValueError as error:
        raise UserError(f"{source}: {error}; only what GPT-2 has can be exported") from None
    about |= dict.fromkeys(("bos_token_id", "eos_token_id"), tok.end_of_text)
    files = {"config.json": about, tokenizer.EXPORTED: tok.meta()}
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
    partial.mkdir(parents=True)
    try:
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        if isinstance(tok, tokenizer.BytePairTokenizer):
            for name, data in tok.files().items():
                (partial / name).write_bytes(data)
        path = partial / "model.safetensors"
        safetensors.torch.save_file(weights_to_gpt2(model), path, metadata={"format": "pt"})
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{target}: {model.n_params():,} parameters and {', '.join(sorted(files))}")


def import_nanogpt(path: Path, target: Path, options: ConvertConfig) -> None:
    """Make a run's folder, with a best state to sample from or finetune, of nanoGPT's ckpt.pt."""
    saved = load_nanogpt(path)
    try:
        known = {field.name for field in fields(GPTConfig)}
        sizes = {k: v for k, v in saved["model_args"].items() if k in known}
        cfg = config.build(GPTConfig, {**sizes, "activation": "gelu"}, str(path))
        expected = dict(outline("gpt", cfg).named_parameters())
        prefix = "_orig_mod."  # of a model that was compiled
        state = {k.removeprefix(prefix): v for k, v in saved["model"].items()}
        tensors = {
            "model." + name.removeprefix("transformer."): tensor.float()
            for name, tensor in state.items()
            if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
        }
        progress = {"iter_num": int(saved["iter_num"]), "val_loss": float(saved["best_val_loss"])}
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"{path} is no checkpoint of nanoGPT's ({kind}: {error})") from None
    checkpoint.match(expected, tensors, "model.", path)
    meta = {"kind": "gpt2"}
    if options.dataset:
        meta = tokenizer.stored_in(Path(options.data_dir) / options.dataset)
    tok = tokenizer.load(meta)
    if tok.vocab_size > cfg.vocab_size:
        raise UserError(
            f"{path} has {cfg.vocab_size} ids and the {meta['kind']} tokenizer {tok.vocab_size}: "
            "name the data set that it was trained on, --dataset=NAME"
        )
    target.mkdir(parents=True)
    checkpoint.save_run(
        target,
        tensors,
        {
            "run_id": "nanogpt",
            "model": "gpt",
            "model_config": {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)},
            "run_config": {},
            "tokenizer": tok.meta(),
            "dataset": "",
            "progress": progress,
            "scaler": {},
            "threads": torch.get_num_threads(),
        },
        best=True,
        snapshot=False,
        keep=0,
    )
    loss = progress["val_loss"]
    n_params = sum(tensor.numel() for tensor in tensors.values())
    print(f"{target}: {n_params:,} parameters, validation loss {loss:.4f} by nanoGPT")


def load_nanogpt(path: Path) -> dict:
    """What torch.save wrote, as plain data and tensors: anything else in it is refused, not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from None
    except Exception:  # what a file that is none makes torch.load raise is not declared
        raise UserError(
            f"{path} is no checkpoint of nanoGPT's: it is damaged, or holds more than tensors and "
            "plain values, and is not read"
        ) from None
    if type(saved) is not dict:
        raise UserError(f"{path} is no checkpoint of nanoGPT's: it holds a {type(saved).__name__}")
    return saved


if __name__ == "__main__":
    raise SystemExit(main())
