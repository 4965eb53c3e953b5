"""GPT-2 in transformers' format: finding, reading and writing it.

Tensors have the same names as ours, but for prefixes such as "transformer.". The matrices of a
block are stored transposed, as (in, out), because GPT-2 wrote its linear layers as convolutions of
width 1.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data import hub
from data.errors import UserError
from folio import hf_tokenizer
from folio.checkpoint import Checkpoint, empty_model
from model import GPT, GPTConfig

NAMES = {  # with GPT-2's own tokenizer
    **{
        name: f"openai-community/{name}"
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    },
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILES = (".pt", ".safetensors")  # endings of checkpoints
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt")
MASKS = r"h\.\d+\.attn\.(masked_)?bias"  # buffers that older versions stored
TRANSPOSED = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
SIZES = {  # our name: the name in config.json
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
INDEX = "model.safetensors.index.json"  # names the files of a model that is stored in several
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
SAME_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python": "gelu"}
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
    """The folder of the model `name` in transformers' format; None if `name` is something else.

    `name` is a folder with a config.json, one of NAMES, or the id of a model on the Hugging Face
    Hub: "owner/name", if there is no folder "owner". A model of the Hub is downloaded once, into
    `cache_dir` or Hugging Face's default cache.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if name in NAMES:
        repo_id, also = NAMES[name], ""
    elif HUB_ID.fullmatch(name) and path.suffix not in FILES and not path.parent.exists():
        repo_id, also = name, f"there is no file or folder {name}, and "
    else:
        return None
    try:
        return _from_hub(repo_id, cache_dir, needs_tokenizer=name not in NAMES)
    except UserError as error:
        instead = "or give a folder with its config.json and model.safetensors"
        raise UserError(f"{also}{error}; {instead}") from None


def _from_hub(repo_id: str, cache_dir: str, needs_tokenizer: bool) -> Path:
    """The folder of a model in the cache; it is downloaded if it is not there yet."""
    from huggingface_hub import snapshot_download  # here, because few runs need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = ["config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES]
    where = {"cache_dir": cache_dir or None, "endpoint": hub.endpoint(), "allow_patterns": files}
    try:
        folder = Path(snapshot_download(repo_id, local_files_only=True, **where))
        weights = weight_files(folder)
        has_model = (
            (folder / "config.json").is_file() and weights and all(map(Path.is_file, weights))
        )
        has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES[1:])
        if has_model and (has_tokenizer or not needs_tokenizer):
            return folder
    except (LocalEntryNotFoundError, ValueError):
        pass
    with hub.asking_for(repo_id):
        return Path(snapshot_download(repo_id, **where))


# ---- reading ------------------------------------------------------------------------------------


def load(name: str, folder: Path) -> Checkpoint:
    """The model in `folder` as a checkpoint; raises UserError if it cannot be used.

    The weights are float32, on the CPU, and memory-mapped: what is not used is not read, and a
    matrix that is stored transposed becomes a view.
    """
    try:
        config = config_from_gpt2(json.loads((folder / "config.json").read_text("utf-8")))
        if not (paths := weight_files(folder)):
            parts, target = ("M", name) if Path(name).is_dir() else ("T, M", Path(name).name)
            raise ValueError(
                "it has no model.safetensors, and pytorch_model.bin is a pickle, which could run "
                'code; convert it where you trust it: python -c "from transformers import '
                f"AutoTokenizer as T, GPT2LMHeadModel as M; [c.from_pretrained('{name}')."
                f"save_pretrained('{target}') for c in [{parts}]]\""
            )
        tensors = tensors_from_gpt2(paths, config)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{name} is not a usable model: {error}") from None
    is_gpt2s = name in NAMES and folder != Path(name)  # not a folder of that name
    meta = {
        "model": "gpt",
        "model_config": asdict(config),
        "tokenizer": {"kind": "gpt2"} if is_gpt2s else hf_tokenizer.read(folder, config.vocab_size),
        "progress": {},
    }
    return Checkpoint(Path(name), {f"model.{n}": t for n, t in tensors.items()}, meta)


def config_from_gpt2(theirs: dict) -> GPTConfig:
    """Convert a config.json to GPTConfig; raises ValueError for an unsupported setting."""
    if type(theirs) is not dict:
        raise ValueError("config.json is not a JSON object")
    for key, value in FIXED.items():
        if theirs.get(key, value) != value:
            n_embd = theirs.get("n_embd")
            if key == "n_inner" and type(n_embd) is int:
                value = 4 * n_embd
                if theirs[key] == value:
                    continue
            raise ValueError(f"config.json has {key}={theirs[key]}; only {value} is supported")
    activation = theirs.get("activation_function", "gelu_new")
    if type(activation) is str:
        activation = SAME_ACTIVATIONS.get(activation, activation)
    if activation not in ACTIVATIONS.values():
        known = ", ".join(ACTIVATIONS.values())
        raise ValueError(f"config.json has activation_function={activation}, which is not {known}")
    if "n_positions" not in theirs and "n_ctx" in theirs:  # as older versions wrote
        theirs = {**theirs, "n_positions": theirs["n_ctx"]}
    if missing := [key for key in SIZES.values() if type(theirs.get(key)) is not int]:
        raise ValueError(f"config.json lacks {missing[0]}, or it is not a whole number")
    sizes = {ours: theirs[key] for ours, key in SIZES.items()}
    if not all(1 <= size <= 10**8 for size in sizes.values()):
        raise ValueError("config.json has a size that is not in [1, 1e8]")
    ours = {value: name for name, value in ACTIVATIONS.items()}
    return GPTConfig(**sizes, activation=ours[activation])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; none if it has no such files."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text("utf-8"))
        try:
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"{INDEX} has no weight_map") from None
        if foreign := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{INDEX} names a file outside the folder: {foreign[0]}")
        return [folder / name for name in names]
    return []


def plain_name(name: str) -> str:
    """A tensor's name without the prefixes of torch.compile, DDP and transformers."""
    return re.sub(r"^((_orig_mod|module|transformer)\.)+", "", name)


def tie_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with plain names, without masks and without the head, which shares wte.

    Raises ValueError if the head has weights of its own.
    """
    tied = {n: t for n, t in tensors.items() if not re.fullmatch(MASKS, n)}
    head = tied.pop("lm_head.weight", None)
    wte = tied.setdefault("wte.weight", head) if head is not None else None
    if head is not wte and not torch.equal(head.float(), wte.float()):
        raise ValueError("lm_head.weight is not wte.weight; an untied head is not supported")
    return tied


def tensors_from_gpt2(paths: list[Path], config: GPTConfig) -> dict[str, Tensor]:
    """Read the tensors; raises ValueError for a missing, unknown or wrong-shaped one."""
    stored = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            stored |= {plain_name(name): file.get_tensor(name) for name in file.keys()}
    if config.n_layer > len(stored):
        raise ValueError(f"{len(stored)} tensors are too few for n_layer={config.n_layer}")
    shapes = {n: p.shape for n, p in empty_model("gpt", config).named_parameters()}
    tensors = tie_head(stored)
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"unknown tensor {name}")
        if re.sub(r"h\.\d+\.", "", name) in TRANSPOSED and tensor.dim() == 2:
            tensor = tensor.t()
        tensors[name] = tensor.float()
        if tensor.shape != (shape := shapes.pop(name)):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
    if shapes:
        raise ValueError(f"tensor {min(shapes)} is missing")
    return tensors


# ---- writing ------------------------------------------------------------------------------------


def config_to_gpt2(config: GPTConfig) -> dict:
    """Convert GPTConfig to a config.json; raises ValueError for parts that GPT-2 lacks."""
    defaults = GPTConfig()
    foreign = [
        f"{name}={getattr(config, name)}"
        for name in ("norm", "rotary", "qk_norm", "n_kv_head", "key_shift", "conv")
        if getattr(config, name) != getattr(defaults, name)
    ]
    if config.activation not in ACTIVATIONS:
        foreign.append(f"activation={config.activation}")
    if foreign:
        raise ValueError(
            f"transformers' GPT-2 has no {', '.join(foreign)}; a model to export must be trained "
            "without, as with config/shakespeare_char_gpt2.py"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        **{key: getattr(config, ours) for ours, key in SIZES.items()},
        "n_ctx": config.block_size,  # converters to GGUF read it
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
