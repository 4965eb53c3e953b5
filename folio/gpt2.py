"""GPT-2 in transformers' format: finding, reading and writing it.

Tensors have the same names as ours, with or without the prefix "transformer.". The matrices of a
block are stored transposed, as (in, out), because GPT-2 wrote its linear layers as convolutions of
width 1.
"""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import requests
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data import tokenizer
from data.download import TIMEOUT, short_reason
from data.errors import UserError
from folio.checkpoint import Checkpoint, meta_model
from model import GPT, GPTConfig

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "model.safetensors")
TRANSPOSED = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
SIZES = {  # our name: the name in config.json
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
FIXED = {  # other settings of config.json, with the only value that we support
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "n_inner": None,
}


# ---- finding ------------------------------------------------------------------------------------


def find_folder(name: str, cache_dir: str = "") -> Path | None:
    """The folder with config.json and model.safetensors for `name`; None if it is neither such a
    folder nor one of NAMES.

    One of NAMES is downloaded once, into `cache_dir` or Hugging Face's default cache.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if name not in NAMES:
        return None
    try:
        folder, revision = None, None
        for file in FILES:  # both of one revision, the one whose config.json is there
            folder = _from_hub(f"openai-community/{name}", file, cache_dir, revision).parent
            revision = folder.name
        return folder
    except UserError as error:
        raise UserError(f"{error}; or give a folder with {name}'s {' and '.join(FILES)}") from None


def _from_hub(repo_id: str, file: str, cache_dir: str, revision: str | None) -> Path:
    """The path of a file in the cache; it is downloaded if it is not there yet."""
    from huggingface_hub import hf_hub_download  # here, because few runs need it
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    where = {"cache_dir": cache_dir or None, "endpoint": endpoint, "revision": revision}
    try:
        return Path(hf_hub_download(repo_id, file, local_files_only=True, **where))
    except LocalEntryNotFoundError:
        pass
    try:
        requests.head(endpoint, timeout=TIMEOUT)  # fails fast; offline the library tries for 20 s
        return Path(hf_hub_download(repo_id, file, **where))
    except requests.RequestException as error:
        reason = short_reason(error)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"cannot download {file} of {repo_id} from {endpoint} ({reason})")


# ---- reading ------------------------------------------------------------------------------------


def load(name: str, folder: Path) -> Checkpoint:
    """The model in `folder` as a checkpoint; raises UserError if it cannot be used.

    The weights are float32, on the CPU, and memory-mapped: what is not used is not read, and a
    matrix that is stored transposed becomes a view.
    """
    try:
        config = config_from_gpt2(json.loads((folder / "config.json").read_text("utf-8")))
        tensors = tensors_from_gpt2(folder / "model.safetensors", config)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{name} is not a usable model: {error}") from None
    meta = {
        "model": "gpt",
        "model_config": asdict(config),
        "tokenizer": {"kind": "gpt2"} if name in NAMES else tokenizer.stored_in(folder),
        "progress": {},
    }
    return Checkpoint(Path(name), {f"model.{n}": t for n, t in tensors.items()}, meta)


def config_from_gpt2(theirs: dict) -> GPTConfig:
    """Convert a config.json to GPTConfig; raises ValueError for an unsupported setting."""
    if type(theirs) is not dict:
        raise ValueError("config.json is not a JSON object")
    for key, value in FIXED.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"config.json has {key}={theirs[key]}; only {value} is supported")
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS.values():
        known = ", ".join(ACTIVATIONS.values())
        raise ValueError(f"config.json has activation_function={activation}, which is not {known}")
    if missing := [key for key in SIZES.values() if type(theirs.get(key)) is not int]:
        raise ValueError(f"config.json lacks {missing[0]}, or it is not a whole number")
    sizes = {ours: theirs[key] for ours, key in SIZES.items()}
    if not all(1 <= size <= 10**8 for size in sizes.values()):
        raise ValueError("config.json has a size that is not in [1, 1e8]")
    ours = {value: name for name, value in ACTIVATIONS.items()}
    return GPTConfig(**sizes, activation=ours[activation])


def tensors_from_gpt2(path: Path, config: GPTConfig) -> dict[str, Tensor]:
    """Read the tensors; raises ValueError for a missing, unknown or wrong-shaped one."""
    tensors = {}
    with safe_open(path, "pt") as file:
        stored_names = file.keys()
        if config.n_layer > len(stored_names):
            raise ValueError(
                f"{len(stored_names)} tensors are too few for n_layer={config.n_layer}"
            )
        shapes = {n: p.shape for n, p in meta_model("gpt", config).named_parameters()}
        for stored_name in stored_names:
            name = stored_name.removeprefix("transformer.")
            if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight", name):
                continue  # the causal mask; the head, which shares wte
            if name not in shapes:
                raise ValueError(f"unknown tensor {stored_name}")
            tensor = file.get_tensor(stored_name).float()
            if re.sub(r"h\.\d+\.", "", name) in TRANSPOSED and tensor.dim() == 2:
                tensor = tensor.t()
            if tensor.shape != (shape := shapes.pop(name)):
                raise ValueError(f"{stored_name} is {tuple(tensor.shape)}, not {tuple(shape)}")
            tensors[name] = tensor
    if shapes:
        raise ValueError(f"tensor {min(shapes)} is missing")
    return tensors


# ---- writing ------------------------------------------------------------------------------------


def config_to_gpt2(config: GPTConfig) -> dict:
    """Convert GPTConfig to a config.json; raises ValueError for parts that GPT-2 lacks."""
    gpt2 = GPTConfig()
    foreign = [
        f"{name}={getattr(config, name)}"
        for name in ("norm", "rotary", "qk_norm", "n_kv_head", "conv")
        if getattr(config, name) != getattr(gpt2, name)
    ]
    if config.activation not in ACTIVATIONS:
        foreign.append(f"activation={config.activation}")
    if foreign:
        raise ValueError(f"transformers' GPT-2 has no {', '.join(foreign)}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        **{key: getattr(config, ours) for ours, key in SIZES.items()},
        "activation_function": ACTIVATIONS[config.activation],
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "use_cache": True,
    }


def tensors_to_gpt2(model: GPT) -> dict[str, Tensor]:
    """A model's tensors with transformers' names and layout. Missing biases become zeros."""
    config, tensors = model.config, {}
    for name, p in model.named_parameters():
        kind, p = re.sub(r"h\.\d+\.", "", name), p.detach()
        tensors[f"transformer.{name}"] = (p.t() if kind in TRANSPOSED else p).contiguous()
        if not config.bias and name.endswith(".weight") and not name.startswith(("wte", "wpe")):
            tensors[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(p.shape[0])
    return tensors
