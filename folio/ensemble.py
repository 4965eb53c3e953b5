"""Several models as one, which predicts the mean of their probabilities.

    load_models("out/a,out/b") -> Ensemble -> logits = log(mean(softmax(logits of each)))

Its models need the same tokenizer, and nothing else in common.
"""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from data.errors import UserError
from data.tokenizer import Tokenizer
from folio import checkpoint, run_folder
from folio.checkpoint import Checkpoint
from folio.options import expand_path
from model import Cache, LanguageModel


class Ensemble(LanguageModel):
    """The mean of the probabilities of several models. They share one cache: their layers are
    numbered consecutively."""

    def __init__(self, models: list[LanguageModel]):
        super().__init__()
        self.models = nn.ModuleList(models)
        configs, first_layer = [model.config for model in models], 0
        for model in models:
            for layer, block in enumerate(getattr(model, "h", ()), first_layer):
                block.attn.layer = layer
            first_layer += model.config.n_layer
        self.config = replace(
            configs[0],
            n_layer=first_layer,
            block_size=min(c.block_size for c in configs),
            vocab_size=min(c.vocab_size for c in configs),
            rotary=all(c.rotary for c in configs),
        )

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """As GPT.forward(). The logits are log-probabilities in float32."""
        log_probs = []
        for model in self.models:
            logits, _ = model(idx, cache=cache)
            if cache is not None:
                logits = logits[:, -1:]  # a bigram model returns all
            log_probs.append(logits[..., : self.config.vocab_size].float().log_softmax(-1))
        logits = torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))  # (B, T, V)
        if targets is None:
            return logits, None
        return None, F.nll_loss(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def load_models(names: str, cache_dir: str = "") -> tuple[LanguageModel, Tokenizer, Checkpoint]:
    """The model that --checkpoint names, its tokenizer and its checkpoint; of several models, which
    commas separate, the first one's. Raises UserError if a checkpoint cannot be used, or if two
    have different tokenizers.
    """
    each = split_names(names)
    ckpts = [run_folder.open_checkpoint(name, cache_dir) for name in each]
    for name, ckpt in zip(each, ckpts, strict=True):
        if ckpt.meta["tokenizer"] != ckpts[0].meta["tokenizer"]:
            raise UserError(f"{name} has another tokenizer than {each[0]}")
    toks = [checkpoint.load_tokenizer(ckpt) for ckpt in ckpts]
    models = [checkpoint.build_model(ckpt) for ckpt in ckpts]
    return models[0] if len(models) == 1 else Ensemble(models).eval(), toks[0], ckpts[0]


def split_names(names: str) -> list[str]:
    """The names of several models, which commas separate; one, if there is such a file."""
    return [names] if Path(names).exists() else list(map(expand_path, names.split(",")))


def load_teacher(names: str, cache_dir: str, tok: Tokenizer, block_size: int) -> LanguageModel:
    """The models of train.py's --teacher. Raises UserError if a checkpoint cannot be used, or if
    they cannot teach a model with this tokenizer and block_size."""
    model, their_tok, _ = load_models(names, cache_dir)
    if their_tok.meta() != tok.meta():
        raise UserError(f"--teacher={names} has another tokenizer than the data set")
    if model.config.block_size < block_size:
        n = model.config.block_size
        raise UserError(f"--teacher={names} has block_size={n}, which is less than {block_size}")
    return model


def fingerprint(model: LanguageModel) -> str:
    """A hash of the weights of a model, which must be on the CPU."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(checkpoint.bytes_of(p))
    return digest.hexdigest()[:16]
