"""Token bins in, a trained model out.

    python train.py                                   the quick start: about a minute on a laptop
    python train.py --dataset=mine                    by config/shakespeare_char_cpu.py, as above
    python train.py config/shakespeare_char.py        a recipe
    python train.py config/shakespeare_char.py --batch_size=32 --max_seconds=600
    python train.py --init_from=resume --out_dir=out/shakespeare_char
    python train.py --init_from=out/mine/best.safetensors --dataset=mine      finetune
    python train.py --init_from=gpt2 --dataset=mine --eval_only               evaluate

    window(seed, n) -> idx, targets (B, T) -> logits (B, T, V), loss -> AdamW, Muon
        -> out/<run>/{ckpt,best}.safetensors, snapshots/, metrics.csv, loss.png

Ctrl-C saves and ends the run with code 130, SIGTERM with 143, a closed terminal with 129;
--init_from=resume goes on. Code 2 is a mistake in what was asked for, 3 a loss that is no longer a
number, 1 a machine that failed.
"""

import ctypes
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

import checkpoint
import config
import metrics
from config import UserError
from data import bins, tokenizer
from data.tokenizer import Tokenizer
from graphs import Captured
from model import LONGEST_WRITTEN_OUT, MODELS, GPTConfig, LanguageModel, fit, outline
from muon import Muon
from sample import (
    SampleConfig,
    TextStream,
    batches,
    check_model,
    complete,
    fast_dtype,
    find_device,
    load_pretrained,
    memory,
    start_ids,
    unescape,
)

ROOT = Path(__file__).parent
QUICK_START = str(ROOT / "config" / "shakespeare_char_cpu.py")
QUICK_START_SECONDS = 10  # to download its text, before it does without
SMALLEST_SCALE = 2**-10  # of float16's gradients; below it they are beyond hope
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
KEPT = 2**25  # bytes; the most that M_MMAP_THRESHOLD takes
WARM_UPS, WARM_UP_SECONDS = 10, 0.5  # trials of an update, whichever ends first


@dataclass
class TrainConfig(GPTConfig):
    # which model
    model: Literal["gpt", "bigram"] = "gpt"  # bigram: the baseline, a table of (V, V) logits

    # data
    dataset: str = "shakespeare_char"  # a folder in data_dir; built by prepare.py where it can be
    data_dir: str = "data"  # where data sets lie
    batch_size: Annotated[int, "[1, 1e6]"] = 64  # sequences in an update, whatever the machine
    micro_batch_size: Annotated[int, "[0, 1e6]"] = 0  # sequences held at a time; 0: as fits best

    # where it starts, where it goes
    init_from: str = "scratch"  # scratch, resume, or what to finetune: a checkpoint, gpt2*
    cache_dir: str = ""  # where gpt2* is kept; empty: Hugging Face's usual cache
    checkpoint: str = ""  # with resume: from this file rather than the run's latest
    out_dir: str = "out/run"  # the run's folder; an older run there is moved aside
    seed: Annotated[int, "[0, inf)"] = 1337  # of the weights, the windows and dropout

    # when it ends: at whichever comes first
    max_iters: Annotated[int, "[0, inf)"] = 5000  # updates; 0: until another condition is met
    max_seconds: Annotated[float, "[0, inf)"] = 0.0  # of training, over all resumes; 0: no limit
    target_train_loss: Annotated[float, "[0, inf)"] = 0.0  # at an evaluation; 0: none
    target_val_loss: Annotated[float, "[0, inf)"] = 0.0  # at an evaluation; 0: none
    patience: Annotated[int, "[0, inf)"] = 0  # evaluations without a new best; 0: no limit

    # the optimizer and its learning rate
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the blocks' matrices, AdamW the rest
    muon_lr: Annotated[float, "(0, inf)"] = 0.02  # at its peak; follows the schedule
    learning_rate: Annotated[float, "(0, inf)"] = 6e-4  # at its peak
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # from the peak to min_lr
    warmup_iters: Annotated[int, "[0, inf)"] = 100  # linear, from near 0 to the peak
    lr_decay_iters: Annotated[int, "[0, inf)"] = 0  # where min_lr is reached; 0: at max_iters
    min_lr: Annotated[float, "[0, inf)"] = 0.0  # where the schedule ends
    weight_decay: Annotated[float, "[0, inf)"] = 0.1  # of matrices and embeddings
    beta1: Annotated[float, "[0, 1)"] = 0.9  # memory of the gradient, Muon's too
    beta2: Annotated[float, "[0, 1)"] = 0.95  # AdamW's, of its square
    grad_clip: Annotated[float, "[0, inf)"] = 1.0  # largest norm of the gradient; 0: any

    # evaluation, printing, saving
    eval_interval: Annotated[int, "[1, inf)"] = 250  # updates between evaluations; each saves
    eval_tokens: Annotated[int, "[1, inf)"] = 2**20  # of a larger split, this many
    eval_only: bool = False  # evaluate what init_from names; train and save nothing
    log_interval: Annotated[int, "[1, inf)"] = 10  # updates between lines in metrics.csv
    snapshot_interval: Annotated[int, "[0, inf)"] = 0  # updates between kept checkpoints; 0: none
    keep_snapshots: Annotated[int, "[0, inf)"] = 0  # the newest so many; 0: all
    sample_interval: Annotated[int, "[0, inf)"] = 0  # updates between samples; 0: at the end only
    sample_prompt: str = ""  # what they continue; escapes as in sample.py
    num_samples: Annotated[int, "[0, 1e4]"] = 1  # how many, each time
    sample_tokens: Annotated[int, "[1, 1e5]"] = 300  # length of each
    tensorboard: bool = False  # write for TensorBoard too, into out_dir/tensorboard
    wandb: bool = False  # tell Weights & Biases too; WANDB_MODE=offline needs no account
    wandb_project: str = "folio"  # the project's name there
    wandb_run_name: str = ""  # the run's name there; empty: that of out_dir

    # the machine
    device: str = "auto"  # cuda, cuda:1, mps, cpu; auto: the first of them that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA
    cuda_graphs: bool = False  # launch an update's kernels together; for small models on CUDA
    deterministic: bool = False  # the same bits on CUDA too, at some cost

    def __post_init__(self):
        super().__post_init__()
        micro = self.micro_batch_size or self.batch_size
        if self.batch_size % micro:
            parts = [m for m in range(1, micro) if self.batch_size % m == 0]
            more = (self.batch_size // micro + 1) * micro
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into micro_batch_size={micro}; "
                f"micro_batch_size={parts[-1]} or batch_size={more} would"
            )
        ends = (self.max_seconds, self.target_train_loss, self.target_val_loss, self.patience)
        if self.max_iters == 0 and not any(ends):
            raise ValueError(
                "max_iters=0 has no end: set max_seconds, target_train_loss, target_val_loss "
                "or patience"
            )
        if self.max_iters == 0 and self.schedule != "constant" and self.lr_decay_iters == 0:
            raise ValueError(
                f"schedule={self.schedule} with max_iters=0 needs lr_decay_iters; "
                "or schedule=constant"
            )
        if self.checkpoint and self.init_from != "resume":
            raise ValueError(f"checkpoint={self.checkpoint} goes with --init_from=resume")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")


NANOGPT = {  # options of nanoGPT's that mean something else here, or nothing
    "gradient_accumulation_steps": "batch_size counts all sequences of an update; "
    "micro_batch_size says how many are held at a time",
    "eval_iters": "evaluation reads the whole split, or eval_tokens of it",
    "always_save_checkpoint": "every evaluation saves ckpt.safetensors, a better one best too",
    "decay_lr": "write schedule=constant",
    "backend": "it follows from the device",
    "start": "write sample_prompt",
    "wandb_log": "write wandb",
    "max_new_tokens": "write sample_tokens",
}


@dataclass
class Progress:
    """How far a run has come; with the weights and the optimizer, all that a resume needs."""

    iter_num: Annotated[int, "[0, inf)"] = 0  # updates made
    n: Annotated[int, "[0, inf)"] = 0  # windows drawn: the next is window(seed, n)
    tokens: Annotated[int, "[0, inf)"] = 0  # trained on
    train_loss: float | None = None  # at the last evaluation, nats per token
    val_loss: float | None = None
    best_val_loss: float | None = None
    evals_since_best: Annotated[int, "[0, inf)"] = 0
    eval_iter: Annotated[int, "[0, inf)"] = 0  # iter_num at the last evaluation
    train_seconds: Annotated[float, "[0, inf)"] = 0.0  # without evaluation, saving and compilation
    wall_seconds: Annotated[float, "[0, inf)"] = 0.0  # with them


class Clock:
    """Keeps a run's two times; that of training stands still between stop() and start()."""

    def __init__(self, progress: Progress, device: str):
        self._progress, self._device, self._since = progress, device, None
        self._wall_start = time.perf_counter() - progress.wall_seconds

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._device != "cpu":
            torch.accelerator.synchronize(self._device)
        self.read()
        self._since = None

    def read(self) -> None:
        """Bring train_seconds and wall_seconds up to now."""
        now = time.perf_counter()
        if self._since is not None:
            self._progress.train_seconds += now - self._since
            self._since = now
        self._progress.wall_seconds = now - self._wall_start


@dataclass
class Run:
    """What training works on; the functions below change it in place."""

    cfg: TrainConfig  # nothing in it is "auto" any more
    run_id: str
    dataset: bins.Dataset
    tok: Tokenizer
    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16
    diverged: Tensor  # float32 (4,): flag, iter_num, loss, norm of the first bad, else last, update
    progress: Progress
    clock: Clock
    stop: "StopSignals"
    add_gradient: Callable[..., Tensor] | None = None  # as below, or captured in a CUDA graph
    take_step: Callable[..., Tensor] | None = None


class Diverged(Exception):
    """The loss, the gradient or what an update made of them is no longer a number."""


# ---- what was asked for -------------------------------------------------------------------------


@config.script
def main(argv: list[str]) -> int:
    given = config.read(TrainConfig, argv, instead=NANOGPT)
    if given.get("init_from") == "resume" and not given.get("eval_only"):
        given["out_dir"] = str(resumed_folder(given))
        with checkpoint.lock(Path(given["out_dir"])):
            return start(given)
    quick_start = False
    if given.get("init_from", "scratch") == "scratch" and not any(w.endswith(".py") for w in argv):
        quick_start = "dataset" not in given
        out_dir = "out/" + given.get("dataset", "quickstart")
        given = {**config.read(TrainConfig, [QUICK_START]), "out_dir": out_dir, **given}
    return start(given, quick_start)


def start(given: dict, quick_start: bool = False) -> int:
    """Bring together what was asked for, check all of it, and train, or evaluate; the exit code."""
    path, tensors, meta = None, {}, {}
    if given.get("init_from", "scratch") != "scratch":
        path, tensors, meta = starting_point(given)
        given = adopt(given, meta, path)
    resuming = given.get("init_from") == "resume"
    cfg = choose_machine(config.build(TrainConfig, given), meta["threads"] if resuming else None)
    if resuming and (now := torch.get_num_threads()) != meta["threads"]:
        print(f"{now} threads, before {meta['threads']}: the run goes on the same but for rounding")
    for package in ("tensorboard", "wandb"):
        if getattr(cfg, package):
            metrics.require(package)
    dataset = find_dataset(cfg, quick_start)
    if quick_start:
        cfg = replace(cfg, dataset=dataset.folder.name)
    if "vocab_size" not in given:
        cfg = replace(cfg, vocab_size=dataset.vocab_size)
    check_dataset(cfg, dataset, meta, path)
    run = make_run(cfg, dataset, tensors, meta, path)
    del tensors  # copied by now, and as large as the run itself
    describe(run)
    if cfg.eval_only:
        words = evaluate_both(run)
        perplexity = math.exp(min(run.progress.val_loss, 700))  # beyond, it is as good as infinite
        print(f"{path or 'untrained'}: {words}, perplexity {perplexity:.4g}")
        return 0
    check_disk(run)
    if cfg.init_from == "resume":
        return resume(run, path)
    with checkpoint.new_folder(Path(cfg.out_dir)):
        checkpoint.write_record(Path(cfg.out_dir), run.run_id, asdict(cfg))
        return train(run)


def find_dataset(cfg: TrainConfig, quick_start: bool) -> bins.Dataset:
    """The data set that is asked for, built first where it is missing and prepare.py knows how.

    The quick start, in which the user named none, takes the Python language reference where tiny
    Shakespeare cannot be fetched within seconds: it needs no download.
    """
    folder = Path(cfg.data_dir) / cfg.dataset
    if Path(cfg.data_dir).is_file():
        raise UserError(f"--data_dir={cfg.data_dir} is a file, not a folder")
    if not folder.is_dir():
        try:
            prepare(cfg.data_dir, cfg.dataset, QUICK_START_SECONDS if quick_start else None)
        except UserError as error:
            if not quick_start:
                raise
            reason = str(error).split(";")[0]
            print(f"no tiny Shakespeare here: {reason}; training on pydocs, Python's own reference")
            folder = Path(cfg.data_dir) / "pydocs"
            if not folder.is_dir():
                prepare(cfg.data_dir, "pydocs")
    return bins.load(folder)


def prepare(data_dir: str, name: str, timeout: float | None = None) -> None:
    """Run prepare.py; its error, or that it took longer than `timeout` seconds, as a UserError."""
    command = [sys.executable, str(ROOT / "prepare.py"), name, f"--data_dir={data_dir}"]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise UserError(f"it did not arrive within {timeout} seconds") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["prepare.py gave no reason"]
        reason = lines[-1].removeprefix("error: ")
        raise UserError(reason) if done.returncode == 2 else OSError(reason)


def resumed_folder(given: dict) -> Path:
    """The folder of the run that is to go on."""
    if "checkpoint" not in given:
        folder = Path(given.get("out_dir") or checkpoint.newest_run(Path("out")))
        if not folder.is_dir():
            raise UserError(f"no run in {folder}: no such folder")
        parts = (checkpoint.RECORD, checkpoint.LATEST, checkpoint.BEST, checkpoint.SNAPSHOTS)
        if not any((folder / part).exists() for part in parts):
            raise UserError(f"no run in {folder}: there is none of {', '.join(parts)}")
        return folder
    path = Path(given["checkpoint"])
    folder = path.parent.parent if path.parent.name == checkpoint.SNAPSHOTS else path.parent
    if not path.is_file():
        raise UserError(f"cannot open checkpoint {path}: no such file")
    if not (folder / checkpoint.RECORD).is_file():
        raise UserError(f"{path} lies in no run's folder; to begin from it: --init_from={path}")
    if Path(given.get("out_dir", folder)).resolve() != folder.resolve():
        raise UserError(f"{path} belongs to the run in {folder}, not to {given['out_dir']}")
    return folder


def starting_point(given: dict) -> tuple[Path, dict[str, Tensor], dict]:
    """Load the checkpoint that init_from means: (path, tensors, meta)."""
    if given["init_from"] != "resume":
        if loaded := load_pretrained(given["init_from"], given.get("cache_dir", "")):
            model, meta = loaded
            tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
            return Path(given["init_from"]), tensors, meta
        path = checkpoint.find(given["init_from"], (checkpoint.BEST, checkpoint.LATEST))
        tensors, meta = checkpoint.load(path)
    elif "checkpoint" in given:
        path = Path(given["checkpoint"])
        tensors, meta = checkpoint.load_of_run(resumed_folder(given), path)
    else:
        path, tensors, meta = checkpoint.load_run(resumed_folder(given))
    check_model(tensors, meta, path)
    return path, tensors, meta


def adopt(given: dict, meta: dict, path: Path) -> dict:
    """`given` over a checkpoint's own options; what cannot change is refused by name.

    Finetuning may crop the block and pad the vocabulary.
    """
    resuming = given["init_from"] == "resume"
    saved = {"model": meta["model"], **asdict(GPTConfig()), **meta["model_config"]}
    fixed = [name for name in saved if name != "dropout"]
    if resuming:
        if "micro_batch_size" not in meta["run_config"]:
            raise UserError(f"{path} was not trained here; to begin from it: --init_from={path}")
        saved |= {"optimizer": "adamw", **meta["run_config"]}
        fixed += ["seed", "optimizer"]
        changed = {name for name in given if given[name] != saved.get(name)}
        if changed & {"batch_size", "device"}:  # what was right there may not be so here
            saved["micro_batch_size"] = 0
        if "device" in changed:
            saved |= {"compile": "auto", "cuda_graphs": False}
    elif "dataset" not in given:
        before = meta.get("run_config", {})
        saved |= {k: before[k] for k in ("dataset", "data_dir") if k in before}
    for name in fixed:
        if name not in given or given[name] == saved[name]:
            continue
        crops = name == "block_size" and given[name] < saved[name]
        pads = name == "vocab_size" and given[name] > saved[name]
        if resuming or not (crops or pads):
            raise UserError(f"{name}={given[name]}, but {path} was made with {name}={saved[name]}")
    return {**saved, **given}


def check_dataset(cfg: TrainConfig, dataset: bins.Dataset, meta: dict, path: Path | None) -> None:
    """Refuse a data set that is too short, or not the one that a checkpoint goes with."""
    shortest = 2 * (cfg.block_size + 1)
    for split in (dataset.train, dataset.val):
        if len(split.tokens) < shortest:
            raise UserError(
                f"{split.path} has {len(split.tokens)} tokens; two windows of block_size="
                f"{cfg.block_size} need {shortest}: use a longer text or a smaller block_size"
            )
    if meta and meta["tokenizer"] != dataset.tokenizer:
        raise UserError(f"the data set {dataset.folder} has another tokenizer than {path}")
    if cfg.vocab_size < dataset.vocab_size:
        raise UserError(
            f"vocab_size={cfg.vocab_size} is below the {dataset.vocab_size} of {dataset.folder}"
        )
    if cfg.init_from == "resume" and meta["dataset"] != dataset.fingerprint:
        raise UserError(f"the data set {dataset.folder} is not the one that {path} was trained on")


def choose_machine(cfg: TrainConfig, threads: int | None) -> TrainConfig:
    """Decide what is left to "auto" and set torch up; `threads` are those of a resumed run."""
    device = find_device(cfg.device)
    cuda = device.type == "cuda"
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = fast_dtype(device)
    if dtype == "float16" and not cuda:
        raise UserError(f"dtype=float16 needs CUDA; on {device.type} write float32 or bfloat16")
    if cfg.cuda_graphs and not cuda:
        raise UserError(f"cuda_graphs needs CUDA; on {device.type} leave it out")
    if device.type == "cpu":
        keep_freed_memory()
        if threads and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, min(threads, 1024)))
    torch.backends.cuda.matmul.allow_tf32 = dtype != "float32"  # where half precision was enough
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic)
    compiles = cuda if cfg.compile == "auto" else cfg.compile
    cfg = replace(cfg, device=str(device), dtype=dtype, compile=compiles)
    return replace(cfg, micro_batch_size=cfg.micro_batch_size or best_micro_batch(cfg))


def best_micro_batch(cfg: TrainConfig) -> int:
    """All of a batch; on a CPU so much of it that the largest activations of a layer are kept when
    they are freed."""
    size, width = cfg.batch_size, 4 if cfg.dtype == "float32" else 2
    numbers = cfg.block_size * max(4 * cfg.n_embd, attention_weights(cfg))
    while cfg.device == "cpu" and size % 2 == 0 and size * numbers * width >= KEPT:
        size //= 2
    return size


def attention_weights(cfg: TrainConfig) -> int:
    """Numbers for a token of a layer, those of its softmax, that attend() keeps for backward."""
    on_cpu = cfg.device == "cpu" and cfg.dtype == "bfloat16"
    kept = cfg.model == "gpt" and on_cpu and cfg.block_size <= LONGEST_WRITTEN_OUT
    return cfg.n_head * cfg.block_size if kept else 0


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what comes next, in buffers of less than KEPT bytes.

    As it is, it gives every large buffer back to the kernel, which clears its pages for the next
    one. Were the largest kept too, a few bytes in the place of one could cost another of its size.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def make_run(
    cfg: TrainConfig,
    dataset: bins.Dataset,
    tensors: dict[str, Tensor],
    meta: dict,
    path: Path | None,
) -> Run:
    """Build the model and the optimizer, anew or from the checkpoint at `path`."""
    kind, of_model = MODELS[cfg.model], GPTConfig(**model_config(cfg))
    check_memory(cfg, outline(cfg.model, of_model))
    torch.manual_seed(cfg.seed)
    model = kind(of_model)
    if tensors:
        fitted = fit(tensors, of_model)
        checkpoint.restore(dict(model.named_parameters()), fitted, "model.", path)
    model.to(cfg.device)
    resuming = cfg.init_from == "resume"
    progress = config.build(Progress, meta["progress"], str(path)) if resuming else Progress()
    run = Run(
        cfg=cfg,
        run_id=meta["run_id"] if resuming else uuid.uuid4().hex[:12],
        dataset=dataset,
        tok=tokenizer.load(dataset.tokenizer),
        model=model,
        optimizers=make_optimizers(model, cfg),
        scaler=torch.amp.GradScaler(torch.device(cfg.device).type, enabled=cfg.dtype == "float16"),
        diverged=torch.zeros(4, device=cfg.device),
        progress=progress,
        clock=Clock(progress, cfg.device),
        stop=StopSignals(),
    )
    run.add_gradient, run.take_step = partial(add_gradient, run), partial(take_step, run)
    if cfg.cuda_graphs:
        run.add_gradient = Captured(run.add_gradient, cfg.device)
        run.take_step = Captured(run.take_step, cfg.device)
    if resuming:
        checkpoint.restore(optimizer_tensors(run), tensors, "optimizer.", path)
        try:
            if meta["scaler"]:
                run.scaler.load_state_dict(meta["scaler"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: the scaler's state cannot be used: {error}") from None
    start_ids(run.tok, unescape(cfg.sample_prompt), cfg.seed)  # an unknown character is said now
    return run


def model_config(cfg: TrainConfig) -> dict:
    return {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}


def memory_needed(cfg: TrainConfig, model: LanguageModel) -> int:
    """Bytes, roughly: weights, gradients and AdamW's moments, and a micro batch's activations."""
    tokens = cfg.micro_batch_size * cfg.block_size
    width = 4 if cfg.dtype == "float32" else 2
    numbers = model.activations_per_token() + 2 * cfg.n_layer * attention_weights(cfg)
    return 16 * model.n_params() + width * tokens * numbers


def check_memory(cfg: TrainConfig, model: LanguageModel) -> None:
    """Refuse what this machine has no room for; what comes near its limit is let through."""
    available = memory(torch.device(cfg.device))
    if available and (needed := memory_needed(cfg, model)) > available:
        raise UserError(
            f"this takes about {needed / 2**30:,.0f} GiB and {cfg.device} has "
            f"{available / 2**30:,.0f}: use a smaller model, micro_batch_size or block_size"
        )


def check_disk(run: Run) -> None:
    """Refuse a run whose checkpoints visibly have no room: latest, best, the one being written,
    and the snapshots to come."""
    cfg, n_snapshots, folder = run.cfg, 0, Path(run.cfg.out_dir).absolute()
    saved = {}  # what a resumed run has saved is counted too; two names may be those of one file
    if cfg.init_from == "resume":
        paths = [folder / checkpoint.LATEST, folder / checkpoint.BEST]
        paths += checkpoint.snapshots(folder)
        saved = {p.stat().st_ino: p.stat().st_size for p in paths if p.exists()}
    if cfg.snapshot_interval:
        n_snapshots = cfg.max_iters // cfg.snapshot_interval
        n_snapshots = min(n_snapshots, cfg.keep_snapshots or n_snapshots)
    needed = (3 + n_snapshots) * 12 * run.model.n_params()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + sum(saved.values())
    if free < needed:
        raise UserError(
            f"--out_dir={cfg.out_dir}: {3 + n_snapshots} checkpoints take about "
            f"{needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} are free; "
            "choose another disk, or set keep_snapshots"
        )


# ---- an update ----------------------------------------------------------------------------------


def make_optimizers(model: LanguageModel, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, fused, and Muon where it is asked for; biases and norms' weights do not decay."""
    params, matrices = dict(model.named_parameters()), {}
    if cfg.optimizer == "muon":
        names = [n for n, p in params.items() if n.startswith("h.") and p.dim() == 2]
        matrices = {name: params.pop(name) for name in names}
    groups = [
        {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        betas=(cfg.beta1, cfg.beta2),
        fused=True,
        capturable=cfg.cuda_graphs,
    )
    for p in params.values():  # as the first step would, so that it can be saved or restored now
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    if not matrices:
        return [adamw]
    # of c_attn the values, the keys, and the queries, these in parts as tall as the keys
    pieces = [
        cfg.n_head // (cfg.n_kv_head or cfg.n_head) + 2 if name.endswith("c_attn.weight") else 1
        for name in matrices
    ]
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    muon = Muon(list(matrices.values()), pieces, cfg.muon_lr, cfg.beta1, cfg.weight_decay, dtype)
    return [adamw, muon]


def get_lr(iter_num: int, cfg: TrainConfig) -> float:
    """The learning rate of update iter_num: linear warm-up, then the schedule down to min_lr."""
    if iter_num < cfg.warmup_iters:
        return cfg.learning_rate * (iter_num + 1) / (cfg.warmup_iters + 1)
    if cfg.schedule == "constant":
        return cfg.learning_rate
    decay_iters = (cfg.lr_decay_iters or cfg.max_iters) - cfg.warmup_iters
    done = min(1.0, (iter_num - cfg.warmup_iters) / decay_iters) if decay_iters > 0 else 1.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if cfg.schedule == "cosine" else 1 - done
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def get_batch(run: Run, split: bins.Split, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """The windows of a split that begin at `starts` (B,): idx and targets (B, T), on the device."""
    batch = (torch.from_numpy(part) for part in split.batch(starts, run.cfg.block_size))
    if run.cfg.device.startswith("cuda"):
        batch = (part.pin_memory() for part in batch)
    idx, targets = (part.to(run.cfg.device, non_blocking=True) for part in batch)
    return idx, targets


def autocast(run: Run) -> torch.autocast:
    device_type, dtype = torch.device(run.cfg.device).type, getattr(torch, run.cfg.dtype)
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


def forward_backward(run: Run, n: int, count: int) -> Tensor:
    """Add to .grad what windows n to n + count make of the gradient of an update's mean loss.

    `count` is a multiple of micro_batch_size. Returns what they make of that loss, in nats per
    token, on the device.
    """
    cfg, train = run.cfg, run.dataset.train
    loss = torch.zeros((), device=cfg.device)
    for micro_step in range(count // cfg.micro_batch_size):
        rows = n + micro_step * cfg.micro_batch_size + np.arange(cfg.micro_batch_size)
        starts = bins.window(cfg.seed, rows, len(train.tokens), cfg.block_size)
        idx, targets = get_batch(run, train, starts)
        # dropout follows from the place in the run alone: a resume has nothing to restore
        place = np.random.SeedSequence((cfg.seed, run.progress.iter_num, micro_step))
        torch.manual_seed(int(place.generate_state(1)[0]))
        loss += run.add_gradient(idx, targets)
    return loss


def add_gradient(run: Run, idx: Tensor, targets: Tensor) -> Tensor:
    """The part of forward_backward() that one micro batch is; idx and targets (B, T)."""
    with autocast(run):
        _, loss = run.model(idx, targets)
    loss = loss / (run.cfg.batch_size // run.cfg.micro_batch_size)
    run.scaler.scale(loss).backward()
    return loss.detach()


def update(run: Run) -> tuple[Tensor, Tensor]:
    """Make update iter_num; return its loss and gradient norm, on the device."""
    cfg, progress = run.cfg, run.progress
    loss = forward_backward(run, progress.n, cfg.batch_size)
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    lr_share = get_lr(progress.iter_num, cfg) / cfg.learning_rate
    norm = run.take_step(loss, progress.iter_num, lr_share)
    run.scaler.update()
    progress.iter_num += 1
    progress.n += cfg.batch_size
    progress.tokens += cfg.batch_size * cfg.block_size
    return loss, norm


def take_step(run: Run, loss: Tensor, iter_num: int | Tensor, lr_share: float | Tensor) -> Tensor:
    """Have the optimizers follow .grad, at a share of their learning rates; return its norm.

    Once that or the loss is not finite, `run.diverged` remembers it, and this and every later step
    leaves weights and moments as they are, without the host having to look.
    """
    cfg = run.cfg
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or math.inf)
    float16 = run.scaler.is_enabled()  # in which a gradient that overflows is no divergence
    bad = ~loss.isfinite() if float16 else ~(loss + norm).isfinite()
    now = torch.stack([bad, torch.zeros_like(loss) + iter_num, loss, norm])
    run.diverged.copy_(torch.where(run.diverged[0] > 0, run.diverged, now))
    skipped = torch.maximum(run.diverged[0], (~norm.isfinite()).float())
    for optimizer in run.optimizers:  # all of them or none
        for group in optimizer.param_groups:
            group["lr"] = lr_share * optimizer.defaults["lr"]
        optimizer.found_inf = skipped
        optimizer.step()
        optimizer.zero_grad(set_to_none=not cfg.cuda_graphs)
    return norm


def check_finite(run: Run, found: str = "") -> None:
    """Raise Diverged when an update was not finite, or `found` says that its result is not."""
    cfg, progress = run.cfg, run.progress
    flag, iter_num, loss, norm = run.diverged.tolist()
    if flag or found:
        iter_num = int(iter_num)
        first = progress.n - (progress.iter_num - iter_num) * cfg.batch_size
        raise Diverged(
            f"training diverged at iteration {iter_num}: loss {loss:.4g}, gradient norm "
            f"{norm:.4g}, learning rate {get_lr(iter_num, cfg):.3g}, windows {first} to "
            f"{first + cfg.batch_size - 1} of seed {cfg.seed}{found}; nothing of it was saved"
        )
    if run.scaler.is_enabled() and run.scaler.get_scale() < SMALLEST_SCALE:
        raise Diverged(
            f"training diverged before iteration {progress.iter_num}: the gradient overflows "
            "float16 whatever it is scaled by; nothing of it was saved"
        )


# ---- evaluation and checkpoints -----------------------------------------------------------------


@torch.inference_mode()
def evaluate(run: Run, split: bins.Split, max_tokens: int) -> float:
    """Mean loss over a split in nats per token, weighted by tokens; the same windows every time."""
    batch_size = run.cfg.micro_batch_size  # the one shape that compiled code sees
    all_starts = bins.eval_windows(len(split.tokens), run.cfg.block_size, max_tokens)
    run.model.eval()
    n_batches = math.ceil(len(all_starts) / batch_size)
    losses, counts = torch.zeros(2, n_batches, device=run.cfg.device)
    for i in range(n_batches):
        run.stop.check()
        starts = all_starts[i * batch_size : (i + 1) * batch_size]
        idx, targets = get_batch(run, split, np.resize(starts, batch_size))
        targets[len(starts) :] = bins.IGNORED  # rows that fill the last batch up
        with autocast(run):
            losses[i] = run.model(idx, targets)[1]
        counts[i] = (targets != bins.IGNORED).sum()
    run.model.train()
    losses, counts = losses.cpu().double(), counts.cpu()
    return float((losses * counts).sum() / counts.sum())


def evaluate_both(run: Run) -> str:
    """Evaluate both splits into `run.progress`; return the result in words."""
    train, val, progress = run.dataset.train, run.dataset.val, run.progress
    limit = min(run.cfg.eval_tokens, len(val.tokens))
    progress.train_loss, progress.val_loss = (evaluate(run, s, limit) for s in (train, val))
    progress.eval_iter = progress.iter_num
    words = f"train loss {progress.train_loss:.4f}, val loss {progress.val_loss:.4f}"
    bits = bits_per_byte(run)
    return words if bits is None else f"{words} ({bits:.3f} bits per byte)"


def bits_per_byte(run: Run) -> float | None:
    """The validation loss in the unit that compares tokenizers; None where bytes are not known."""
    val = run.dataset.val
    if val.n_bytes is None:
        return None
    return run.progress.val_loss / math.log(2) * len(val.tokens) / val.n_bytes


def evaluate_and_save(run: Run, log: metrics.Log) -> None:
    progress = run.progress
    check_finite(run)
    words = evaluate_both(run)
    if not math.isfinite(progress.train_loss + progress.val_loss):
        check_finite(run, f", after which {words}")
    best = progress.best_val_loss is None or progress.val_loss < progress.best_val_loss
    if best:
        progress.best_val_loss = progress.val_loss
    progress.evals_since_best = 0 if best else progress.evals_since_best + 1
    run.clock.read()
    log.write(
        **position(progress),
        train_loss=progress.train_loss,
        val_loss=progress.val_loss,
        val_bits_per_byte=bits_per_byte(run),
    )
    clocks = f"{progress.train_seconds:.1f} s training, {progress.wall_seconds:.1f} s in all"
    metrics.say(f"iter {progress.iter_num:,}: {words}; {clocks}")
    save(run, best)


def optimizer_tensors(run: Run) -> dict[str, Tensor]:
    """The optimizer's state by name: "exp_avg.h.0.attn.c_attn.weight", and so on."""
    names = {p: name for name, p in run.model.named_parameters()}
    return {
        f"{key}.{names[p]}": tensor
        for optimizer in run.optimizers
        for p, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def save(run: Run, best: bool = False) -> None:
    cfg, progress = run.cfg, run.progress
    check_finite(run)
    tensors = {f"model.{name}": p for name, p in run.model.named_parameters()}
    tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(run).items()}
    largest = torch.stack([torch.linalg.vector_norm(t, math.inf) for t in tensors.values()])
    if not largest.isfinite().all():  # finite gradients times a huge learning rate are not
        first = int(largest.isfinite().logical_not().nonzero()[0])
        check_finite(run, f", after which {list(tensors)[first]} is not finite")
    of_model = model_config(cfg)
    meta = {
        "run_id": run.run_id,
        "model": cfg.model,
        "model_config": of_model,
        "run_config": {k: v for k, v in asdict(cfg).items() if k not in of_model},
        "tokenizer": run.tok.meta(),
        "dataset": run.dataset.fingerprint,
        "progress": asdict(progress),
        "scaler": run.scaler.state_dict(),
        "threads": torch.get_num_threads(),
    }
    snapshot = is_due(run, cfg.snapshot_interval)
    checkpoint.save_run(Path(cfg.out_dir), tensors, meta, best, snapshot, cfg.keep_snapshots)


# ---- what the user sees -------------------------------------------------------------------------


def describe(run: Run) -> None:
    """Print on what machine, on what data and what model is to be trained."""
    cfg, data, model = run.cfg, run.dataset, run.model
    cuda = cfg.device.startswith("cuda")
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(cfg.device) if cuda else threads
    how = ("compiled" if cfg.compile else "eager") + (", CUDA graphs" if cfg.cuda_graphs else "")
    print(f"machine: {cfg.device} ({name}), {cfg.dtype}, {how}")
    print(
        f"data:    {data.folder}: {run.tok.meta()['kind']} tokens, {data.vocab_size:,} ids, "
        f"{len(data.train.tokens):,} to train on, {len(data.val.tokens):,} to validate"
    )
    shape = f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide, block {cfg.block_size}"
    print(
        f"model:   {shape if cfg.model == 'gpt' else 'bigram'}: {model.n_params():,} parameters, "
        f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token, "
        f"about {memory_needed(cfg, model) / 2**20:,.0f} MiB to train",
        flush=True,
    )


def plan(run: Run) -> None:
    """Print how much training there is to do and, from a trial of the first windows, how long."""
    cfg, progress = run.cfg, run.progress
    seconds = warm_up(run)
    size = f"{cfg.batch_size} x {cfg.block_size} tokens"
    if cfg.max_iters == 0:
        print(f"plan:    updates of {size}, {seconds:.2g} s each, until a condition ends it")
        return
    left = max(0, cfg.max_iters - progress.iter_num)
    tokens = left * cfg.batch_size * cfg.block_size
    expected = left * seconds
    if cfg.max_seconds:
        expected = min(expected, max(0.0, cfg.max_seconds - progress.train_seconds))
    epochs = tokens / len(run.dataset.train.tokens)
    print(
        f"plan:    {left:,} updates of {size}, {tokens:,} in all ({epochs:.1f} epochs): "
        f"about {metrics.in_words(expected)} of training",
        flush=True,
    )


def warm_up(run: Run) -> float:
    """Seconds that an update will take, tried without touching the weights; compiles on the way."""
    cfg, micro_batches, updates = run.cfg, [], []
    run.diverged[0] = 1  # so that a step works, and changes nothing
    try:
        for _ in range(2 if cfg.cuda_graphs else 1):  # compiles, captures, fills caches: not timed
            run.take_step(forward_backward(run, 0, cfg.micro_batch_size), 0, 1.0)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        asked = [f"--{name}=False" for name in ("compile", "cuda_graphs") if getattr(cfg, name)]
        if not asked:
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"an update failed ({reason}); {' '.join(asked)} may help") from None
    while not updates or (len(updates) < WARM_UPS and sum(updates) < WARM_UP_SECONDS):
        trial = Progress()
        clock = Clock(trial, cfg.device)
        clock.start()
        loss = forward_backward(run, 0, cfg.micro_batch_size)
        clock.stop()
        micro_batches.append(trial.train_seconds)
        clock.start()
        run.take_step(loss, 0, 1.0)
        clock.stop()
        updates.append(trial.train_seconds)
    run.diverged.zero_()
    others = cfg.batch_size // cfg.micro_batch_size - 1  # micro batches beside the one tried
    return min(updates) + others * min(micro_batches)


def position(progress: Progress) -> dict[str, float]:
    """Where a row of metrics.csv stands."""
    return {
        "iter_num": progress.iter_num,
        "tokens": progress.tokens,
        "train_seconds": round(progress.train_seconds, 3),
        "wall_seconds": round(progress.wall_seconds, 3),
    }


def log_update(run: Run, log: metrics.Log, loss: Tensor, norm: Tensor) -> None:
    """Log the update just made. Here, and not at every update, the host waits for the device."""
    cfg, progress = run.cfg, run.progress
    lr, loss, norm = get_lr(progress.iter_num - 1, cfg), loss.item(), norm.item()
    check_finite(run)
    run.clock.read()
    speed = log.tokens_per_second(progress.tokens, progress.train_seconds)
    peak = metrics.peak_flops(cfg.device) if cfg.dtype != "float32" else None
    mfu = speed * run.model.flops_per_token() / peak if peak else None
    log.write(
        **position(progress),
        lr=lr,
        loss=loss,
        grad_norm=norm,
        tokens_per_second=round(speed),
        mfu=mfu,
    )
    words = f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s"
    log.show(progress.iter_num, words if mfu is None else f"{words}, {mfu:.1%} MFU")


def print_samples(run: Run, log: metrics.Log) -> None:
    """Show num_samples texts that the model makes as it is now."""
    cfg = run.cfg
    if cfg.num_samples == 0:
        return
    options = SampleConfig(
        num_samples=cfg.num_samples, max_new_tokens=cfg.sample_tokens, seed=cfg.seed
    )
    prompt = unescape(cfg.sample_prompt)
    ids = start_ids(run.tok, prompt, cfg.seed)
    run.model.eval()
    for numbers in batches(run.model, len(ids), options):
        streams = [TextStream(run.tok) for _ in numbers]
        for _ in complete(run.model, streams, ids, options, numbers.start):
            run.stop.check()
        for stream in streams:
            log.sample(run.progress.iter_num, prompt + stream.take())
    run.model.train()


def make_boards(run: Run) -> list[metrics.TensorBoard | metrics.WandB]:
    """What else is told of the run, as its options ask for."""
    cfg, out_dir = run.cfg, Path(run.cfg.out_dir)
    boards, options = [], asdict(cfg)
    if cfg.tensorboard:
        boards.append(metrics.TensorBoard(out_dir, run.progress.iter_num, options))
    if cfg.wandb:
        names = cfg.wandb_project, cfg.wandb_run_name
        boards.append(metrics.WandB(out_dir, *names, run.run_id, options))
    return boards


def first_word(run: Run) -> str:
    """A prompt to try: the first whole word of the validation text."""
    start = run.tok.decode(run.dataset.val.tokens[:500].tolist())
    return next(iter(re.findall(r"(?<=\W)\w{2,20}", start)), "")


# ---- the run ------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal came in the middle of something that can be done again when the run goes on."""


class StopSignals:
    """Within it SIGINT, SIGTERM and SIGHUP interrupt nothing: `caught` says which came, and the
    loop looks."""

    caught: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        signals = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # a terminal that closes; not on Windows
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # as nohup has it
            signals.append(hangup)
        self._before = {s: signal.signal(s, self._catch) for s in signals}
        return self

    def _catch(self, number: int, frame: object) -> None:
        self.caught = signal.Signals(number)

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.caught:
            raise Stopped

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def is_due(run: Run, interval: int) -> bool:
    return interval > 0 and run.progress.iter_num % interval == 0


def why_stop(run: Run) -> str:
    """What ends the run now, in words; empty while nothing does."""
    cfg, progress = run.cfg, run.progress
    run.clock.read()
    if cfg.max_iters and progress.iter_num >= cfg.max_iters:
        return f"max_iters={cfg.max_iters} reached"
    if cfg.max_seconds and progress.train_seconds >= cfg.max_seconds:
        return f"max_seconds={cfg.max_seconds:g} reached"
    if cfg.target_train_loss and (progress.train_loss or math.inf) <= cfg.target_train_loss:
        return f"target_train_loss={cfg.target_train_loss:g} reached"
    if cfg.target_val_loss and (progress.val_loss or math.inf) <= cfg.target_val_loss:
        return f"target_val_loss={cfg.target_val_loss:g} reached"
    if cfg.patience and progress.evals_since_best >= cfg.patience:
        return f"patience={cfg.patience} evaluations without a better validation loss reached"
    return ""


def resume(run: Run, path: Path) -> int:
    """Bring the run's folder to the state that it goes on from, and train."""
    progress, out_dir = run.progress, Path(run.cfg.out_dir)
    checkpoint.go_back(out_dir, path, progress.iter_num)
    # a run may have been killed between saving a state and giving it its other names
    best = progress.eval_iter == progress.iter_num and progress.evals_since_best == 0
    snapshot = progress.iter_num > 0 and is_due(run, run.cfg.snapshot_interval)
    checkpoint.link_latest(
        out_dir, progress.iter_num, best and progress.best_val_loss is not None, snapshot
    )
    return train(run)


def train(run: Run) -> int:
    """Train until a condition, a signal or a loss that is no number; return the exit code."""
    cfg, progress, out_dir = run.cfg, run.progress, Path(run.cfg.out_dir)
    if cfg.compile:
        run.model.compile()
    begun = progress.iter_num, progress.tokens, progress.train_seconds
    boards, why, failure = make_boards(run), "", None
    with run.stop:
        try:
            plan(run)
            with metrics.Log(out_dir, *begun, cfg.max_iters, boards) as log:
                try:
                    why = loop(run, log)
                except Stopped:
                    save(run)
                except OSError:  # nobody reads what is printed, say, or a disk is full
                    with suppress(OSError):
                        save(run)
                        print(f"saved after {progress.iter_num:,} updates", file=sys.stderr)
                    raise
        except torch.OutOfMemoryError:
            size = cfg.micro_batch_size
            holds_less = "model or block_size" if size == 1 else f"micro_batch_size than {size}"
            raise UserError(f"{cfg.device} is out of memory: use a smaller {holds_less}") from None
        except Diverged as error:
            failure = error
        data = run.dataset
        baseline = bins.bigram_loss(data.train.tokens, data.val.tokens, data.vocab_size)
        metrics.draw_losses(out_dir, baseline)
    if failure:
        print(f"error: {failure}", file=sys.stderr)
        return 3
    if run.stop.caught:
        print(f"stopped: {run.stop.caught.name} after {progress.iter_num:,} updates; saved")
        print(f"go on:   python train.py --init_from=resume --out_dir={out_dir}")
        return 128 + run.stop.caught
    print(f"done:    {why} after {progress.iter_num:,} updates")
    print(f"saved:   {out_dir}/{{best,ckpt}}.safetensors, metrics.csv, loss.png")
    where = "" if out_dir.parent == Path("out") else f"--checkpoint {out_dir} "
    print(f'next:    python sample.py {where}--prompt "{first_word(run)}"')
    return 0


def loop(run: Run, log: metrics.Log) -> str:
    """Update after update, until something ends it; return what did. Raises Stopped."""
    cfg, progress, clock = run.cfg, run.progress, run.clock
    if progress.eval_iter != progress.iter_num and is_due(run, cfg.eval_interval):
        evaluate_and_save(run, log)  # where the run was stopped in the middle of it
    clock.start()
    while not (why := why_stop(run)):
        run.stop.check()
        loss, norm = update(run)
        log.bar.update()
        if is_due(run, cfg.log_interval):
            log_update(run, log, loss, norm)
        evaluates = is_due(run, cfg.eval_interval)
        snapshots = is_due(run, cfg.snapshot_interval)
        samples = is_due(run, cfg.sample_interval)
        if evaluates or snapshots or samples:
            clock.stop()
            if evaluates:
                evaluate_and_save(run, log)
            elif snapshots:
                save(run)
            if samples:
                print_samples(run, log)
            clock.start()
    clock.stop()
    if progress.eval_iter != progress.iter_num:
        evaluate_and_save(run, log)
    if not is_due(run, cfg.sample_interval):
        print_samples(run, log)
    return why


if __name__ == "__main__":
    raise SystemExit(main())
