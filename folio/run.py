"""The state of a training run: built from options and a checkpoint, evaluated, saved, resumed."""

import math
import re
import signal
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor, linalg
from torch.nn import functional as F

from data import bins, tokenizer
from data.errors import UserError
from data.tokenizer import Tokenizer
from folio import checkpoint, distributed, machine, run_folder
from folio.batch import autocast, split_loss
from folio.checkpoint import Checkpoint
from folio.ensemble import fingerprint, load_teacher, split_names
from folio.fast import CudaGraph
from folio.generation import Sampling, batches, encode_prompt, generate_texts
from folio.metrics import Clock
from folio.optim import DivergenceGuard, make_optimizers
from folio.options import build_options, unescape
from folio.process import Diverged, Stopped, StopSignals
from folio.samples import Sample
from model import MODELS, GPTConfig, LanguageModel

TRAIN_SHARE = 4  # an evaluation reads this many times less of the training split
PROMPT_TOKENS, CONTINUATION_TOKENS = 32, 100  # of a sample in samples.txt
ROOM = 2**28  # bytes of a GPU for kernels, CUDA graphs and libraries' workspaces
SMALLEST_SCALE = 2**-10  # of float16's loss; if gradients overflow even then, the run diverged


@dataclass
class Progress:
    """The progress of a run: what a resume needs besides the weights and the optimizer states."""

    iter_num: Annotated[int, "[0, inf)"] = 0  # updates made
    n: Annotated[int, "[0, inf)"] = 0  # training windows read; the next is window(seed, n)
    tokens: Annotated[int, "[0, inf)"] = 0  # tokens trained on
    train_loss: float | None = None  # at the last evaluation, nats per token
    val_loss: float | None = None
    best_val_loss: float | None = None
    evals_since_best: Annotated[int, "[0, inf)"] = 0
    eval_iter: Annotated[int, "[0, inf)"] = 0  # iter_num at the last evaluation
    train_seconds: Annotated[float, "[0, inf)"] = 0.0  # without evaluation, saving, compilation
    wall_seconds: Annotated[float, "[0, inf)"] = 0.0  # with them

    @property
    def is_best(self) -> bool:
        """Whether this state was evaluated, with the best validation loss so far."""
        evaluated = self.val_loss is not None and self.eval_iter == self.iter_num
        return evaluated and self.evals_since_best == 0

    def cells(self) -> dict[str, float]:
        """The cells of metrics.csv that give the position in the run."""
        return {
            "iter_num": self.iter_num,
            "tokens": self.tokens,
            "train_seconds": round(self.train_seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
        }


@dataclass
class Run:
    """Everything that a training run uses; updated in place."""

    cfg: Any  # train.py's TrainConfig, with every "auto" resolved
    run_id: str
    dataset: bins.Dataset
    tok: Tokenizer
    model: LanguageModel
    trained: nn.Module  # the model, or DDP around it: what training calls
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16
    guard: DivergenceGuard
    progress: Progress
    clock: Clock
    stop: StopSignals
    graphs: dict[Callable, CudaGraph] | None = None  # of on_device(); None: it uses none
    teacher: LanguageModel | None = None  # of --teacher, in evaluation mode
    teacher_id: str = ""  # its fingerprint
    stopped: signal.Signals | None = None  # the signal that ends the run, as all ranks agreed
    budget: float = 0.0  # seconds of wall time, from --minutes; 0: none

    def is_due(self, interval: int) -> bool:
        """Whether iter_num is a positive multiple of the interval; 0: never."""
        iter_num = self.progress.iter_num
        return interval > 0 and iter_num > 0 and iter_num % interval == 0

    def read_clock(self) -> None:
        """Bring the seconds of `progress` up to now."""
        self.progress.train_seconds, self.progress.wall_seconds = self.clock.read()

    def is_stopped(self) -> bool:
        """Whether a rank has caught a signal, which is then in `stopped` of all ranks."""
        caught = int(distributed.maximum(self.stop.caught or 0))
        self.stopped = signal.Signals(caught) if caught else None
        return caught > 0

    def check_stop(self) -> None:
        """Raise Stopped on all ranks if one of them has caught a signal."""
        if self.is_stopped():
            raise Stopped

    def evaluate(self) -> str:
        """Evaluate both splits, update `progress`, and return the losses as text."""
        progress, val = self.progress, self.dataset.val
        losses = [self.loss(split, n, self.check_stop) for split, n in self.evaluated()]
        progress.train_loss, progress.val_loss = losses
        progress.eval_iter = progress.iter_num
        if progress.best_val_loss is None or progress.val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.evals_since_best = progress.val_loss, 0
        else:
            progress.evals_since_best += 1
        text = f"train loss {progress.train_loss:.4f}, val loss {progress.val_loss:.4f}"
        bits = val.bits_per_byte(progress.val_loss)
        return text if bits is None else f"{text} ({bits:.3f} bits per byte)"

    def evaluated(self) -> list[tuple[bins.Split, int]]:
        """What an evaluation reads: the splits, and how many tokens of each."""
        train, val = self.dataset.train, self.dataset.val
        n = min(self.cfg.eval_tokens, len(val.tokens))
        return [(train, n // TRAIN_SHARE), (val, n)]

    def loss(
        self, split: bins.Split, max_tokens: int, check: Callable[[], None] = lambda: None
    ) -> float:
        """The mean loss over a split, or over max_tokens of it, in nats per token."""
        cfg, size = self.cfg, self.cfg.micro_batch_size
        return split_loss(self.model, split, max_tokens, size, cfg.device, cfg.dtype, check)

    @torch.no_grad()
    def teach(self, idx: Tensor) -> dict[str, Tensor]:
        """The teacher's probabilities of the next tokens (B, T, V), as an argument of forward();
        {} without a teacher."""
        if self.teacher is None:
            return {}
        with autocast(self.cfg.device, self.cfg.dtype):
            logits, _ = self.teacher(idx)
        probs = logits.float().softmax(-1)
        if (n_more := self.cfg.vocab_size - probs.shape[-1]) > 0:
            probs = F.pad(probs, (0, n_more))
        return {"teacher_probs": probs}

    def on_device(self, function: Callable[..., Tensor], *args: Tensor | float) -> Tensor:
        """Call function(self, *args), as a CUDA graph if the run uses them."""
        if self.graphs is None:
            return function(self, *args)
        if function not in self.graphs:
            self.graphs[function] = CudaGraph(lambda *args: (function(self, *args),))
        return self.graphs[function](*args)[0]

    def generate_samples(self) -> Iterator[str]:
        """Yield num_samples texts by the current model. Raises Stopped after a signal."""
        cfg, prompt = self.cfg, unescape(self.cfg.sample_prompt)
        ids = encode_prompt(self.tok, prompt, cfg.seed)
        for text in self._generate(ids, cfg.num_samples, cfg.sample_tokens, self.stop.check):
            yield prompt + text

    def continuation(self) -> Sample:
        """What the current model writes after sample_prompt, or after the first words of the
        validation text."""
        opening = self.tok.decode(self.dataset.val.tokens[:PROMPT_TOKENS].tolist())
        opening = opening.rpartition(" ")[0] or opening.rstrip("\ufffd")
        prompt = unescape(self.cfg.sample_prompt) or opening
        ids = encode_prompt(self.tok, prompt, self.cfg.seed)
        (text,) = self._generate(ids, 1, CONTINUATION_TOKENS, lambda _: None)
        return Sample(self.progress.iter_num, self.progress.val_loss, prompt, text)

    def _generate(
        self, ids: np.ndarray, num_samples: int, n_tokens: int, check: Callable[[list], None]
    ) -> Iterator[str]:
        model, sampling = self.model, Sampling(max_new_tokens=n_tokens, seed=self.cfg.seed)
        model.eval()
        machine.use_deterministic_algorithms(False)  # CUDA's cumsum is not; sampling trains nothing
        try:
            for samples in batches(model, len(ids), num_samples, n_tokens):
                for text in generate_texts(model, self.tok, ids, sampling, samples, check):
                    yield text.take()
        finally:
            machine.use_deterministic_algorithms(self.cfg.deterministic)
            model.train()

    @cached_property
    def baselines(self) -> dict[str, float]:
        """The validation losses of models that need no training, in nats per token."""
        return bins.baselines(self.dataset)

    def check_finite(self, problem: str = "") -> None:
        """Raise Diverged if an update was not finite, or for a `problem` found elsewhere."""
        diverged, iter_num, loss, norm, lr = self.guard.first()
        if diverged or problem:
            batch_size = self.cfg.batch_size
            first = self.progress.n - (self.progress.iter_num - iter_num) * batch_size
            raise Diverged(
                f"training diverged at iteration {iter_num}: loss {loss:.4g}, gradient norm "
                f"{norm:.4g}, learning rate {lr:.3g}, windows {first} to {first + batch_size - 1} "
                f"of seed {self.cfg.seed}{problem}; this state was not saved"
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise Diverged(
                f"training diverged before iteration {self.progress.iter_num}: the gradient "
                "overflows float16 at any scale; this state was not saved"
            )

    def restore_optimizers(self, ckpt: Checkpoint) -> None:
        """Restore the optimizers' states, and float16's loss scale, from a checkpoint."""
        params, saved = self.optimizer_tensors(), {}
        with distributed.together():
            if distributed.is_main():
                saved = checkpoint.match(ckpt, "optimizer.", params)
            try:
                if ckpt.meta["scaler"]:
                    self.scaler.load_state_dict(ckpt.meta["scaler"])
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = f"the scaler's state cannot be used: {error}"
                raise UserError(f"{ckpt.path}: {reason}") from None
        distributed.load(params, saved)

    def shrink_micro_batch_size(self) -> None:
        """Halve micro_batch_size until forward and backward fit in memory, on all ranks."""
        size = self.cfg.micro_batch_size
        while size > 1 and not self._fits(size):
            size = max(n for n in range(1, size // 2 + 1) if size % n == 0)
        self.cfg = replace(self.cfg, micro_batch_size=-int(distributed.maximum(-size)))

    def _fits(self, micro_batch_size: int) -> bool:
        """Whether forward and backward fit, and leave ROOM for what is loaded into a GPU later."""
        cfg = self.cfg
        idx = torch.zeros(micro_batch_size, cfg.block_size, dtype=torch.int64, device=cfg.device)
        distributed.set_gradient_sync(self.trained, False)  # a rank may make more trials
        torch.cuda.empty_cache()  # of what a trial before this one left
        try:
            for _ in range(2):  # the second time there are gradients already
                with autocast(cfg.device, cfg.dtype):
                    _, loss = self.trained(idx, idx, **self.teach(idx))
                loss.backward()
            on_cuda = cfg.device.startswith("cuda")
            return not on_cuda or torch.cuda.mem_get_info(cfg.device)[0] > ROOM
        except RuntimeError as error:
            if not machine.is_out_of_memory(error):
                raise
            return False
        finally:
            self.model.zero_grad(set_to_none=True)

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
        """Save the state as the latest, and as the best and a snapshot if it is one."""
        cfg, progress = self.cfg, self.progress
        self.check_finite()
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer_tensors().items()}
        tensors = checkpoint.in_file_order(tensors)
        if problem := _not_finite(tensors):  # finite gradients times a huge learning rate overflow
            self.check_finite(f", after which {problem} is not finite")
        self.read_clock()
        model_config = asdict(self.model.config)
        meta = {
            "run_id": self.run_id,
            "model": cfg.model,
            "model_config": model_config,
            "run_config": {k: v for k, v in asdict(cfg).items() if k not in model_config},
            "tokenizer": self.tok.meta(),
            "dataset": self.dataset.fingerprint,
            "teacher": self.teacher_id,
            "progress": asdict(progress),
            "scaler": self.scaler.state_dict(),
            "threads": torch.get_num_threads(),
        }
        whole = distributed.gather(tensors.values())
        with distributed.together():
            try:
                if distributed.is_main():
                    run_folder.save_run(
                        Path(cfg.out_dir),
                        tensors,
                        meta,
                        best=progress.is_best,
                        snapshot=self.is_due(cfg.snapshot_interval),
                        keep=cfg.keep_snapshots,
                        values=whole,
                    )
            finally:
                deque(whole, maxlen=0)  # all ranks take part to the end, even if rank 0 failed

    def check_disk(self) -> None:
        """Raise UserError on rank 0 if the run's checkpoints clearly do not fit on the disk."""
        if distributed.is_main():
            n_bytes, resuming = self.checkpoint_bytes(), self.cfg.init_from == "resume"
            out_dir = Path(self.cfg.out_dir)
            run_folder.check_disk(out_dir, n_bytes, self.n_snapshots(), resuming)

    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint's tensors."""
        tensors = (*self.model.parameters(), *self.optimizer_tensors().values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def n_snapshots(self) -> int:
        """How many snapshots the run will have at its end."""
        cfg = self.cfg
        n = cfg.max_iters // cfg.snapshot_interval if cfg.snapshot_interval else 0
        return min(n, cfg.keep_snapshots or n)

    def write_record(self, command: list[str]) -> None:
        """Write run.json, on rank 0."""
        if distributed.is_main():
            record = {"run_id": self.run_id, "command": ["train.py", *command]} | machine.about(
                self.cfg.device
            )
            record |= {"minutes": self.budget / 60, "options": asdict(self.cfg)}
            run_folder.write_record(Path(self.cfg.out_dir), record, self.progress.iter_num)

    def first_word(self) -> str:
        """A prompt to try: a word of the validation text."""
        text = self.tok.decode(self.dataset.val.tokens[:500].tolist())
        return next(iter(re.findall(r"(?<=\W)\w{2,20}", text)), "")

    def continue_folder(self, path: Path) -> Progress:
        """Make the run's folder consistent with the checkpoint `path` that it resumes from, and
        return the progress."""
        progress, out_dir = self.progress, Path(self.cfg.out_dir)
        run_folder.rewind(out_dir, path, progress.iter_num)
        # a kill after saving a state and before linking it leaves links missing
        snapshot = self.is_due(self.cfg.snapshot_interval)
        run_folder.link_latest(out_dir, progress.iter_num, progress.is_best, snapshot)
        if not run_folder.restore_best(out_dir, progress.best_val_loss):
            progress.best_val_loss, progress.evals_since_best = None, 0  # that state is gone
        return progress


def build_run(cfg: Any, dataset: bins.Dataset, ckpt: Checkpoint | None) -> Run:
    """Build the model and, unless it is only evaluated, its optimizers, in the state of `ckpt`.

    `cfg` is train.py's TrainConfig; `ckpt` has its tensors on rank 0 alone. Raises UserError if the
    run does not fit in memory, or if `ckpt` does not fit the options.
    """
    config = GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)})
    training, resuming = not cfg.eval_only, cfg.init_from == "resume"
    size, progress, weights = cfg.micro_batch_size, Progress(), {}
    with distributed.together():
        outline = checkpoint.empty_model(cfg.model, config, "meta")
        cfg = replace(cfg, micro_batch_size=size or machine.auto_micro_batch_size(outline, cfg))
        cfg = replace(cfg, compile=machine.compiles(outline, cfg))
        if cfg.plan:
            machine.print_size(outline, cfg)
        machine.check_memory(outline, cfg)
        if resuming:
            progress = build_options(Progress, ckpt.meta["progress"], str(ckpt.path))
        if distributed.is_main():
            torch.manual_seed(cfg.seed)
            model = MODELS[cfg.model](config)
            if ckpt:
                fitted = checkpoint.fit_model(ckpt, config)
                checkpoint.restore(fitted, "model.", dict(model.named_parameters()))
            weights = {name: p.detach() for name, p in model.named_parameters()}
        else:
            model = checkpoint.empty_model(cfg.model, config, "cpu")
    trained = distributed.parallelize(model, cfg)  # DDP copies rank 0's weights to all
    if cfg.fsdp:
        distributed.load(dict(model.named_parameters()), weights)
    del weights
    run = Run(
        cfg=cfg,
        run_id=ckpt.meta["run_id"] if resuming else uuid.uuid4().hex[:12],
        dataset=dataset,
        tok=tokenizer.load(dataset.tokenizer),
        model=model,
        trained=trained,
        optimizers=make_optimizers(
            model,
            use_muon=cfg.optimizer == "muon",
            learning_rate=cfg.learning_rate,
            muon_lr=cfg.muon_lr,
            beta1=cfg.beta1,
            beta2=cfg.beta2,
            weight_decay=cfg.weight_decay,
            muon_dtype=torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32,
        )
        if training
        else [],
        scaler=torch.amp.GradScaler(torch.device(cfg.device).type, enabled=cfg.dtype == "float16"),
        guard=DivergenceGuard(cfg.device, ignore_norm=cfg.dtype == "float16"),
        progress=progress,
        clock=Clock(cfg.device, progress.train_seconds, progress.wall_seconds),
        stop=StopSignals(),
        graphs={} if training and machine.uses_cuda_graphs(outline, cfg) else None,
    )
    if training and cfg.teacher:
        with distributed.together():
            if not resuming:
                _check_stays(cfg.teacher, Path(cfg.out_dir))
            run.teacher = load_teacher(cfg.teacher, cfg.cache_dir, run.tok, cfg.block_size)
            run.teacher_id = fingerprint(run.teacher)
            if resuming:
                _check_same_teacher(cfg.teacher, run.teacher_id, ckpt)
            run.teacher.to(cfg.device)
    if resuming and training:
        run.restore_optimizers(ckpt)
    with distributed.together():  # fails now if it ever will
        encode_prompt(run.tok, unescape(cfg.sample_prompt), cfg.seed)
    if training and size == 0 and cfg.device != "cpu" and not cfg.fsdp:
        run.shrink_micro_batch_size()
    return run


def _check_stays(teacher: str, out_dir: Path) -> None:
    """Raise UserError if a new run in `out_dir` would move a teacher aside."""
    for name in split_names(teacher):
        if out_dir.resolve() in (path := Path(name).resolve(), *path.parents):
            where = f"--teacher={name} is in --out_dir={out_dir}"
            raise UserError(f"{where}, where a new run moves it aside; use another --out_dir")


def _check_same_teacher(teacher: str, fingerprint: str, ckpt: Checkpoint) -> None:
    """Raise UserError if a teacher of the same name as the checkpoint's is another model."""
    before = ckpt.meta["teacher"]
    if before and before != fingerprint and ckpt.meta["run_config"].get("teacher") == teacher:
        raise UserError(
            f"--teacher={teacher} is not the model that taught {ckpt.path}; name the file where "
            "that is now"
        )


def _not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of the first tensor with a value that is not finite; empty if there is none."""
    parts = map(distributed.local_part, tensors.values())
    largest = [linalg.vector_norm(t, math.inf) if t.numel() else t.new_zeros(()) for t in parts]
    bad = distributed.sum_over_ranks(torch.stack(largest).isfinite().logical_not().int())
    return list(tensors)[int(bad.argmax())] if bad.any() else ""
