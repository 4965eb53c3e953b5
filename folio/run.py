"""The state of a training run: built from options and a checkpoint, evaluated, saved, restored."""

import math
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor

from data import bins, tokenizer
from data.errors import UserError
from data.tokenizer import Tokenizer
from folio import checkpoint, machine, run_folder
from folio.batch import split_loss
from folio.checkpoint import Checkpoint
from folio.generation import Sampling, batches, encode_prompt, generate_texts, unescape
from folio.metrics import Clock
from folio.optim import DivergenceWatch, make_optimizers
from folio.options import build_options
from folio.process import StopSignals
from model import MODELS, GPTConfig, LanguageModel

TRIALS, TRIAL_SECONDS = 10, 0.5  # of an update, to time it: whichever is reached first
SMALLEST_SCALE = 2**-10  # of float16's gradients; below, they overflow whatever the scale


class Diverged(Exception):
    """The loss, a gradient or a weight is not finite."""


@dataclass
class Progress:
    """How far a run has come: all that a resume needs beside the weights and optimizer states."""

    iter_num: Annotated[int, "[0, inf)"] = 0  # updates made
    n: Annotated[int, "[0, inf)"] = 0  # windows drawn; the next is window(seed, n)
    tokens: Annotated[int, "[0, inf)"] = 0  # trained on
    train_loss: float | None = None  # at the last evaluation, nats per token
    val_loss: float | None = None
    best_val_loss: float | None = None
    evals_since_best: Annotated[int, "[0, inf)"] = 0
    eval_iter: Annotated[int, "[0, inf)"] = 0  # iter_num at the last evaluation
    train_seconds: Annotated[float, "[0, inf)"] = 0.0  # without evaluation, saving, compilation
    wall_seconds: Annotated[float, "[0, inf)"] = 0.0  # with them

    @property
    def is_best(self) -> bool:
        """Was this state evaluated, with the best validation loss so far?"""
        evaluated = self.val_loss is not None and self.eval_iter == self.iter_num
        return evaluated and self.evals_since_best == 0

    def cells(self) -> dict[str, float]:
        """The columns of metrics.csv that say where the run is."""
        return {
            "iter_num": self.iter_num,
            "tokens": self.tokens,
            "train_seconds": round(self.train_seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
        }


@dataclass
class Run:
    """All that training works on, and changes in place."""

    cfg: Any  # train.py's TrainConfig, with every "auto" resolved
    run_id: str
    dataset: bins.Dataset
    tok: Tokenizer
    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16
    watch: DivergenceWatch
    progress: Progress
    clock: Clock
    stop: StopSignals

    def is_due(self, interval: int) -> bool:
        """Is this iteration, if it is not the first, a multiple of the interval? 0: never."""
        iter_num = self.progress.iter_num
        return interval > 0 and iter_num > 0 and iter_num % interval == 0

    def read_clock(self) -> None:
        """Bring the progress's seconds up to now."""
        self.progress.train_seconds, self.progress.wall_seconds = self.clock.read()

    def evaluate(self) -> str:
        """Evaluate both splits into `progress`; return the result in words."""
        cfg, progress, val = self.cfg, self.progress, self.dataset.val
        max_tokens = min(cfg.eval_tokens, len(val.tokens))
        how = (max_tokens, cfg.micro_batch_size, cfg.device, cfg.dtype, self.stop.check)
        progress.train_loss = split_loss(self.model, self.dataset.train, *how)
        progress.val_loss = split_loss(self.model, val, *how)
        progress.eval_iter = progress.iter_num
        if progress.best_val_loss is None or progress.val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.evals_since_best = progress.val_loss, 0
        else:
            progress.evals_since_best += 1
        text = f"train loss {progress.train_loss:.4f}, val loss {progress.val_loss:.4f}"
        bits = val.bits_per_byte(progress.val_loss)
        return text if bits is None else f"{text} ({bits:.3f} bits per byte)"

    def generate_samples(self) -> Iterator[str]:
        """num_samples texts by the model as it is now."""
        cfg, model = self.cfg, self.model
        sampling = Sampling(max_new_tokens=cfg.sample_tokens, seed=cfg.seed)
        prompt = unescape(cfg.sample_prompt)
        ids = encode_prompt(self.tok, prompt, cfg.seed)
        model.eval()
        torch.use_deterministic_algorithms(False)  # CUDA's cumsum is not; samples change no weight
        for samples in batches(model, len(ids), cfg.num_samples, cfg.sample_tokens):
            for text in generate_texts(model, self.tok, ids, sampling, samples, self.stop.check):
                yield prompt + text.take()
        torch.use_deterministic_algorithms(cfg.deterministic)
        model.train()

    def check_finite(self, problem: str = "") -> None:
        """Raise Diverged if an update was not finite, or for a `problem` that was found since."""
        diverged, iter_num, loss, norm, lr = self.watch.first()
        if diverged or problem:
            batch_size = self.cfg.batch_size
            first = self.progress.n - (self.progress.iter_num - iter_num) * batch_size
            raise Diverged(
                f"training diverged at iteration {iter_num}: loss {loss:.4g}, gradient norm "
                f"{norm:.4g}, learning rate {lr:.3g}, windows {first} to {first + batch_size - 1} "
                f"of seed {self.cfg.seed}{problem}; nothing of it was saved"
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise Diverged(
                f"training diverged before iteration {self.progress.iter_num}: the gradient "
                "overflows float16 at any scale; nothing of it was saved"
            )

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizers' states by name: "exp_avg.h.0.attn.c_attn.weight" and so on."""
        names = {p: name for name, p in self.model.named_parameters()}
        return {
            f"{key}.{names[p]}": tensor
            for optimizer in self.optimizers
            for p, state in optimizer.state.items()
            for key, tensor in state.items()
        }

    def save(self) -> None:
        """Save the state as the latest, and as the best and as a snapshot if it is one."""
        cfg, progress = self.cfg, self.progress
        self.check_finite()
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer_tensors().items()}
        largest = torch.stack([torch.linalg.vector_norm(t, math.inf) for t in tensors.values()])
        if not largest.isfinite().all():  # finite gradients times a huge learning rate overflow
            first = int(largest.isfinite().logical_not().nonzero()[0])
            self.check_finite(f", after which {list(tensors)[first]} is not finite")
        self.read_clock()
        model_config = asdict(self.model.config)
        meta = {
            "run_id": self.run_id,
            "model": cfg.model,
            "model_config": model_config,
            "run_config": {k: v for k, v in asdict(cfg).items() if k not in model_config},
            "tokenizer": self.tok.meta(),
            "dataset": self.dataset.fingerprint,
            "progress": asdict(progress),
            "scaler": self.scaler.state_dict(),
            "threads": torch.get_num_threads(),
        }
        names = {"best": progress.is_best, "snapshot": self.is_due(cfg.snapshot_interval)}
        run_folder.save_run(Path(cfg.out_dir), tensors, meta, **names, keep=cfg.keep_snapshots)

    def check_disk(self) -> None:
        """UserError if the run's checkpoints clearly do not fit on the disk."""
        cfg, n_snapshots = self.cfg, 0
        if cfg.snapshot_interval:
            n_snapshots = cfg.max_iters // cfg.snapshot_interval
            n_snapshots = min(n_snapshots, cfg.keep_snapshots or n_snapshots)
        resuming = cfg.init_from == "resume"
        run_folder.check_disk(Path(cfg.out_dir), self.model.n_params(), n_snapshots, resuming)

    def first_word(self) -> str:
        """A prompt to try: the first whole word of the validation text."""
        text = self.tok.decode(self.dataset.val.tokens[:500].tolist())
        return next(iter(re.findall(r"(?<=\W)\w{2,20}", text)), "")

    def continue_folder(self, path: Path) -> None:
        """Bring the run's folder to the state `path`, from which it was resumed."""
        progress, out_dir = self.progress, Path(self.cfg.out_dir)
        run_folder.rewind(out_dir, path, progress.iter_num)
        # a kill between saving a state and linking its other names leaves those to be made
        snapshot = self.is_due(self.cfg.snapshot_interval)
        run_folder.link_latest(out_dir, progress.iter_num, progress.is_best, snapshot)
        if not run_folder.restore_best(out_dir, progress.best_val_loss):
            progress.best_val_loss, progress.evals_since_best = None, 0  # no file has that state

    def time_update(self, update: Callable[["Run"], object]) -> float:
        """Seconds that an update will take, from trials that leave the weights as they are.

        A trial has one micro-batch, or two, to tell what each further one adds. The first trial
        also compiles.
        """
        cfg, scaler_state = self.cfg, self.scaler.state_dict()
        n_micro = cfg.batch_size // cfg.micro_batch_size

        def trial(n: int) -> float:
            trial_cfg = replace(cfg, batch_size=n * cfg.micro_batch_size)
            clock = Clock(cfg.device)
            clock.start()
            update(replace(self, cfg=trial_cfg, progress=Progress()))
            clock.stop()
            return clock.read()[0]

        self.watch.skip_all(True)
        try:
            trial(1)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not cfg.compile:
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"an update failed ({reason}); --compile=False may help") from None
        times = {n: [] for n in range(1, min(n_micro, 2) + 1)}
        for n, seconds in times.items():
            while not seconds or (len(seconds) < TRIALS and sum(seconds) < TRIAL_SECONDS):
                seconds.append(trial(n))
        self.watch.skip_all(False)
        self.scaler.load_state_dict(scaler_state)
        of_one = median(times[1])
        return of_one + (n_micro - 1) * max(0.0, median(times.get(2, [of_one])) - of_one)


def build_run(cfg: Any, dataset: bins.Dataset, ckpt: Checkpoint | None) -> Run:
    """Build the model and its optimizers, with the state of `ckpt` if there is one.

    `cfg` is train.py's TrainConfig. UserError if it does not fit in memory, or `ckpt` does not
    fit the config.
    """
    config = GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)})
    outline = checkpoint.meta_model(cfg.model, config)
    machine.check_memory(outline, cfg.micro_batch_size, cfg.device, cfg.dtype)
    torch.manual_seed(cfg.seed)
    model = MODELS[cfg.model](config)
    if ckpt:
        fitted = checkpoint.fit_model(ckpt, config)
        checkpoint.restore(fitted, "model.", dict(model.named_parameters()))
    model.to(cfg.device)
    resuming, progress = cfg.init_from == "resume", Progress()
    if resuming:
        progress = build_options(Progress, ckpt.meta["progress"], str(ckpt.path))
    run = Run(
        cfg=cfg,
        run_id=ckpt.meta["run_id"] if resuming else uuid.uuid4().hex[:12],
        dataset=dataset,
        tok=tokenizer.load(dataset.tokenizer),
        model=model,
        optimizers=make_optimizers(
            model,
            use_muon=cfg.optimizer == "muon",
            learning_rate=cfg.learning_rate,
            muon_lr=cfg.muon_lr,
            beta1=cfg.beta1,
            beta2=cfg.beta2,
            weight_decay=cfg.weight_decay,
            muon_dtype=torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32,
        ),
        scaler=torch.amp.GradScaler(torch.device(cfg.device).type, enabled=cfg.dtype == "float16"),
        watch=DivergenceWatch(cfg.device, ignore_norm=cfg.dtype == "float16"),
        progress=progress,
        clock=Clock(cfg.device, progress.train_seconds, progress.wall_seconds),
        stop=StopSignals(),
    )
    if resuming:
        checkpoint.restore(ckpt, "optimizer.", run.optimizer_tensors())
        try:
            if ckpt.meta["scaler"]:
                run.scaler.load_state_dict(ckpt.meta["scaler"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{ckpt.path}: the scaler's state cannot be used: {error}") from None
    encode_prompt(run.tok, unescape(cfg.sample_prompt), cfg.seed)  # reports an unknown character
    return run
