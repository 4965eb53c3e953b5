"""Train a model on a prepared data set.

    python train.py                                   the quick start: a minute of training
    python train.py --dataset=mine                    the same recipe on other data
    python train.py config/shakespeare_char.py        a recipe
    python train.py config/shakespeare_char.py --batch_size=32 --minutes=10
    python train.py --init_from=resume --out_dir=out/shakespeare_char
    python train.py --init_from=out/mine/best.safetensors --dataset=mine      finetune
    python train.py --init_from=gpt2 --dataset=mine --eval_only               evaluate

    window(seed, n) -> idx, targets (B, T) -> loss -> gradients -> AdamW, or Muon and AdamW
        -> out/<run>/{ckpt,best}.safetensors, snapshots/, metrics.csv, loss.png

Ctrl-C saves and ends the run with exit code 130, SIGTERM with 143, a closed terminal with 129;
--init_from=resume continues it. Other exit codes: 1 system error, 2 user error, 3 divergence.

To learn how a GPT is trained, start at update().
"""

from folio.process import Diverged, EndedElsewhere, Stopped, script  # isort: skip  (first, for Ctrl-C during other imports)
import math
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from data import bins
from folio import distributed, machine, metrics, plan, run_folder, startup
from folio.batch import autocast, get_batch, seed_dropout
from folio.fast import Number
from folio.optim import get_lr
from folio.options import PathStr, build_options
from folio.plot import plot_losses
from folio.run import Run, build_run
from model import GPTConfig


@dataclass
class TrainConfig(GPTConfig):
    # which model
    model: Literal["gpt", "bigram"] = "gpt"  # bigram: the baseline, a (V, V) table of logits

    # data
    dataset: PathStr = "shakespeare_char"  # a folder in data_dir, or a path; built if missing
    data_dir: PathStr = "data"  # the parent folder of all data sets
    batch_size: Annotated[int, "[1, 1e6]"] = 64  # sequences per update, on any machine
    micro_batch_size: Annotated[int, "[0, 1e6]"] = 0  # sequences per forward pass; 0: automatic

    # where it starts and where it saves
    init_from: PathStr = "scratch"  # scratch, resume, or a model to finetune, as in sample.py
    cache_dir: PathStr = ""  # folder for models of the Hub; empty: Hugging Face's default cache
    checkpoint: PathStr = ""  # with resume: the checkpoint to resume from; empty: the latest
    out_dir: PathStr = "out/run"  # the run's folder; an older run there is moved aside
    seed: Annotated[int, "[0, inf)"] = 1337  # seed of the weights, the data order, and dropout
    teacher: str = ""  # models a,b to distill from: half of the loss is with their mean

    # when it ends: after max_iters or minutes, the one that is set last, or earlier
    max_iters: Annotated[int, "[0, inf)"] = 5000  # number of updates; 0: no limit
    minutes: Annotated[float, "[0, 1e6]"] = 0.0  # a budget of wall time, converted to updates
    target_train_loss: Annotated[float, "[0, inf)"] = 0.0  # evaluated training loss; 0: none
    target_val_loss: Annotated[float, "[0, inf)"] = 0.0  # evaluated validation loss; 0: none
    patience: Annotated[int, "[0, inf)"] = 0  # evaluations without improvement; 0: no limit

    # the optimizer and its learning rate
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon for matrices in blocks, AdamW for the rest
    muon_lr: Annotated[float, "(0, inf)"] = 0.02  # Muon's peak learning rate; same schedule
    learning_rate: Annotated[float, "(0, inf)"] = 6e-4  # AdamW's peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # decay from the peak to min_lr
    warmup_iters: Annotated[int, "[0, inf)"] = 100  # updates of linear warm-up
    lr_decay_iters: Annotated[int, "[0, inf)"] = 0  # updates until min_lr is reached; 0: max_iters
    min_lr: Annotated[float, "[0, inf)"] = 0.0  # final learning rate of AdamW; Muon's in proportion
    weight_decay: Annotated[float, "[0, inf)"] = 0.1  # weight decay of matrices and embeddings
    beta1: Annotated[float, "[0, 1)"] = 0.9  # AdamW's beta1 and Muon's momentum
    beta2: Annotated[float, "[0, 1)"] = 0.95  # AdamW's beta2
    grad_clip: Annotated[float, "[0, inf)"] = 1.0  # clip the gradient norm to this; 0: no clipping

    # evaluating, logging, saving
    eval_interval: Annotated[int, "[0, inf)"] = 250  # updates between evaluations; 0: max_iters / 5
    eval_tokens: Annotated[int, "[1, inf)"] = 2**20  # evaluate at most this many tokens of a split
    eval_only: bool = False  # evaluate init_from, without training or saving
    plan: bool = False  # print the run's size, memory and time, without training or saving
    log_interval: Annotated[int, "[0, inf)"] = 10  # updates between logs; 0: max_iters / 100
    snapshot_interval: Annotated[int, "[0, inf)"] = 0  # updates between snapshots; 0: none
    keep_snapshots: Annotated[int, "[0, inf)"] = 0  # number of snapshots to keep; 0: all
    sample_interval: Annotated[int, "[0, inf)"] = 0  # updates between samples; 0: only at the end
    sample_prompt: str = ""  # prompt of the samples; escapes as in sample.py
    num_samples: Annotated[int, "[0, 1e4]"] = 1  # number of samples each time
    sample_tokens: Annotated[int, "[1, 1e5]"] = 300  # length of a sample, in tokens
    tensorboard: bool = False  # also log to TensorBoard, in out_dir/tensorboard
    wandb: bool = False  # also log to Weights & Biases; WANDB_MODE=offline needs no account
    wandb_project: str = "folio"  # project name on Weights & Biases
    wandb_run_name: str = ""  # run name on Weights & Biases; empty: the name of out_dir

    # the machine
    device: str = "auto"  # cuda, cuda:1, mps, cpu; auto: the first that exists
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of matrix products
    compile: Literal["auto", True, False] = "auto"  # use torch.compile; auto: on CUDA, if it pays
    deterministic: bool = False  # bitwise reproducible on CUDA too, but slower
    fsdp: bool = False  # with torchrun: FSDP2, which shards the model, instead of DDP
    activation_checkpointing: Literal["none", "half", "full"] = "none"  # less memory, but slower

    def __post_init__(self):
        super().__post_init__()
        startup.check_batch_size(self.batch_size, self.micro_batch_size)
        if self.fsdp and self.optimizer == "muon":
            raise ValueError("fsdp shards the matrices, which Muon needs whole; use adamw")
        if self.plan and self.eval_only:
            raise ValueError("plan and eval_only exclude each other")
        if self.teacher and self.model == "bigram":
            raise ValueError("a bigram model cannot learn from a teacher")
        ends = (self.target_train_loss, self.target_val_loss, self.patience)
        if self.max_iters == 0 and not self.minutes and not any(ends):
            raise ValueError("max_iters=0 never ends: use minutes, patience or a target loss")
        unknown_end = self.max_iters == 0 and not self.minutes and self.lr_decay_iters == 0
        if unknown_end and self.schedule != "constant":
            raise ValueError(
                f"schedule={self.schedule} with max_iters=0 needs lr_decay_iters; "
                "or use schedule=constant"
            )
        if self.checkpoint and self.init_from != "resume":
            raise ValueError(f"checkpoint={self.checkpoint} needs --init_from=resume")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")


# ---- one update ---------------------------------------------------------------------------------


def update(run: Run) -> tuple[Tensor, Tensor]:
    """Make one optimizer update; return its loss and gradient norm, on the device."""
    cfg, progress, data = run.cfg, run.progress, run.dataset.train
    rank, world_size, size = distributed.rank(), distributed.world_size(), cfg.micro_batch_size
    n_micro = cfg.batch_size // (world_size * size)
    loss = torch.zeros((), device=cfg.device)  # nats per token, the mean over the batch
    for micro_step in range(n_micro):
        first = progress.n + (micro_step * world_size + rank) * size
        starts = bins.window(cfg.seed, first + np.arange(size), len(data.tokens), cfg.block_size)
        idx, targets = get_batch(data, starts, cfg.block_size, cfg.device)  # (B, T)
        seed_dropout(cfg.seed, first)
        distributed.set_gradient_sync(run.trained, micro_step == n_micro - 1)
        loss += run.on_device(forward_backward, idx, targets, n_micro) / world_size
    loss = distributed.sum_over_ranks(loss)
    norm = run.on_device(step, loss, progress.iter_num, get_lr(cfg, progress.iter_num))
    progress.iter_num += 1
    progress.n += cfg.batch_size
    progress.tokens += cfg.batch_size * cfg.block_size
    return loss, norm


def forward_backward(run: Run, idx: Tensor, targets: Tensor, n_micro: Number) -> Tensor:
    """Accumulate the gradients of one of n_micro micro-batches; return its share of the loss."""
    lesson = run.teach(idx)
    with autocast(run.cfg.device, run.cfg.dtype):
        _, loss = run.trained(idx, targets, **lesson)
    loss = loss / n_micro
    run.scaler.scale(loss).backward()
    return loss.detach()


def step(run: Run, loss: Tensor, iter_num: Number, lr: Number) -> Tensor:
    """Update the weights from the gradients, and clear these; return the gradient norm."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.grad_clip or math.inf)
    norm = distributed.whole(norm)
    skip = run.guard.check(iter_num, loss, norm, lr)  # 1 if it must be skipped
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr / run.cfg.learning_rate * optimizer.defaults["lr"]  # in proportion
        optimizer.found_inf = skip  # if it is 1, step() does nothing, as in scaler.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=run.graphs is None)
    run.scaler.update()
    return norm


# ---- the loop -----------------------------------------------------------------------------------


def training_loop(run: Run, log: metrics.Log) -> str:
    """Train until a condition is met, and return it as text. Raises Stopped after a signal."""
    cfg, progress, clock = run.cfg, run.progress, run.clock
    if progress.eval_iter != progress.iter_num and run.is_due(cfg.eval_interval):
        evaluate_and_save(run, log)  # a signal interrupted this evaluation
    clock.start()
    while not (reason := end_reason(run)):
        run.check_stop()
        loss, norm = update(run)
        log.bar.update()
        if run.is_due(cfg.log_interval):
            log_update(run, log, loss, norm)
        eval_due = run.is_due(cfg.eval_interval)
        snapshot_due = run.is_due(cfg.snapshot_interval)
        sample_due = run.is_due(cfg.sample_interval)
        if eval_due or snapshot_due or sample_due:
            clock.stop()
            if eval_due:
                evaluate_and_save(run, log)
            elif snapshot_due:
                run.save()
            if sample_due:
                add_samples(run, log)
            clock.start()
    clock.stop()
    if progress.eval_iter != progress.iter_num or progress.best_val_loss is None:  # it was deleted
        evaluate_and_save(run, log)
    if not run.is_due(cfg.sample_interval):
        add_samples(run, log)
    return reason


def end_reason(run: Run) -> str:
    """Why the run ends now, as text; empty if it goes on."""
    cfg, progress = run.cfg, run.progress
    losses = {"target_train_loss": progress.train_loss, "target_val_loss": progress.val_loss}
    if cfg.max_iters and progress.iter_num >= cfg.max_iters:
        return f"max_iters={cfg.max_iters} reached"
    for name, loss in losses.items():
        if (target := getattr(cfg, name)) and loss is not None and loss <= target:
            return f"{name}={target:g} reached"
    if cfg.patience and progress.evals_since_best >= cfg.patience:
        return f"patience={cfg.patience} evaluations without a better validation loss"
    return ""


def evaluate_and_save(run: Run, log: metrics.Log) -> None:
    """Evaluate both splits, log the losses, and save."""
    progress = run.progress
    run.check_finite()
    text = run.evaluate()
    if not math.isfinite(progress.train_loss + progress.val_loss):
        run.check_finite(f", after which {text}")
    run.read_clock()
    with distributed.together():
        log.write(
            **progress.cells(),
            train_loss=progress.train_loss,
            val_loss=progress.val_loss,
            val_bits_per_byte=run.dataset.val.bits_per_byte(progress.val_loss),
        )
        seconds = metrics.format_seconds(progress.wall_seconds)
        log.print_state(progress.iter_num, f"{text}, {seconds}")
    run.save()
    with distributed.together():
        if distributed.is_main():
            show_progress(run, log)


def show_progress(run: Run, log: metrics.Log) -> None:
    """Continue the prompt for samples.txt, and draw loss.png, unless they have taken too much time.

    The last evaluation always has a sample; the picture at the end is drawn by run_to_end().
    """
    if (log.sampling.allows() or end_reason(run)) and not run.cfg.fsdp:
        with log.sampling.spend():
            log.add_continuation(run.continuation())
    if log.drawing.allows() and not end_reason(run):
        with log.drawing.spend():
            plot_losses(Path(run.cfg.out_dir), run.baselines)


def log_update(run: Run, log: metrics.Log, loss: Tensor, norm: Tensor) -> None:
    """Log the last update. Only here does the host wait for the device."""
    cfg, progress = run.cfg, run.progress
    loss, norm = loss.item(), norm.item()
    lr = get_lr(cfg, progress.iter_num - 1)
    run.check_finite()
    run.read_clock()
    speed = log.tokens_per_second(progress.tokens, progress.train_seconds)
    peak = machine.peak_flops(cfg.device) if cfg.dtype != "float32" else None
    flops = run.model.flops_per_token()
    mfu = speed * flops / peak / distributed.world_size() if peak and flops else None
    text = f"loss {loss:.4f}, {speed:,.0f} tokens/s"
    with distributed.together():
        log.write(
            **progress.cells(),
            lr=lr,
            loss=loss,
            grad_norm=norm,
            tokens_per_second=round(speed),
            mfu=mfu,
        )
        log.show_status(progress.iter_num, text if mfu is None else f"{text}, {mfu:.1%} MFU")


def add_samples(run: Run, log: metrics.Log) -> None:
    """Generate samples with the current model, on rank 0, unless FSDP has divided the model."""
    with distributed.together(), suppress(Stopped):
        if distributed.is_main() and not run.cfg.fsdp:
            log.add_samples(run.progress.iter_num, run.generate_samples())
    run.check_stop()


# ---- from options to a run ----------------------------------------------------------------------


@script
def main(argv: list[str]) -> int:
    with distributed.process_group():
        given, quick_start = distributed.from_main(lambda: startup.read_given(TrainConfig, argv))
        if given.get("init_from") != "resume" or given.get("eval_only") or given.get("plan"):
            return start(argv, given, quick_start)
        names = given.get("out_dir", ""), given.get("checkpoint", "")
        folder = distributed.from_main(lambda: startup.find_resumed(*names))
        with distributed.on_main(run_folder.lock(folder)):
            return start(argv, {**given, "out_dir": str(folder)})


def start(argv: list[str], given: dict, quick_start: bool = False) -> int:
    """Check everything, then train or evaluate; return the exit code."""
    ckpt, resuming = startup.load_start(given), given.get("init_from") == "resume"
    with distributed.together():
        if resuming:
            given = startup.resumed_options(given, ckpt, {f.name for f in fields(TrainConfig)})
        elif ckpt:
            given = startup.finetuned_options(given, ckpt)
        cfg = build_options(TrainConfig, given)
        metrics.check_trackers(asdict(cfg))
        device, dtype, compile = machine.resolve_machine(cfg.device, cfg.dtype, cfg.compile)
        startup.check_processes(device, dtype, cfg.fsdp)
    threads = ckpt.meta["threads"] if resuming else None
    machine.setup_torch(device, dtype, cfg.deterministic, threads)
    if resuming and device == "cpu" and (now := torch.get_num_threads()) != threads:
        print(f"resuming with {now} threads instead of {threads}: results differ by rounding")
    dataset = startup.find_dataset(Path(cfg.data_dir), cfg.dataset, quick_start)
    with distributed.together():
        cfg = replace(
            cfg,
            device=device,
            dtype=dtype,
            compile=False if cfg.eval_only else compile,
            dataset=dataset.folder.name if quick_start else cfg.dataset,
            vocab_size=startup.model_vocab_size(given.get("vocab_size"), dataset, ckpt),
        )
        if ckpt:
            startup.check_same_data(dataset, ckpt, resuming)
        startup.check_dataset(dataset, cfg.block_size, cfg.vocab_size)
    run = build_run(cfg, dataset, ckpt)
    startup.describe(run, ckpt)
    if cfg.eval_only:
        text = run.evaluate()
        perplexity = math.exp(min(run.progress.val_loss, 700))
        print(f"{ckpt.path if ckpt else 'untrained'}: {text}, perplexity {perplexity:.4g}")
        return 0
    resumed_from = ckpt.path if resuming else None
    del ckpt  # its tensors have been copied, and are as large as the run
    return launch(argv, run, resumed_from)


def launch(argv: list[str], run: Run, resumed_from: Path | None) -> int:
    """Plan the run, create or reopen its folder, and train; return the exit code."""
    cfg, out_dir = run.cfg, Path(run.cfg.out_dir)
    with distributed.together():
        if distributed.is_main() and not resumed_from and not cfg.plan:
            run_folder.check_new_folder(out_dir)
    with run.stop:
        try:
            plan.plan(run, update)
            run.check_stop()
            with distributed.together():
                run.check_disk()
            if cfg.plan:
                return 0
            new_folder = run_folder.new_folder(out_dir)  # main() has locked a resumed run's
            with nullcontext() if resumed_from else distributed.on_main(new_folder):
                if resumed_from:
                    run.progress = distributed.from_main(lambda: run.continue_folder(resumed_from))
                with distributed.together():
                    run.write_record(argv)
                return run_to_end(run)
        except Stopped:
            return report_stop(run)
        except RuntimeError as error:
            if not machine.is_out_of_memory(error):
                raise
            raise machine.out_of_memory(cfg) from None


def run_to_end(run: Run) -> int:
    """Train until a condition, a signal or a divergence ends it; return the exit code."""
    cfg, progress, out_dir = run.cfg, run.progress, Path(run.cfg.out_dir)
    first_iter, reason, failure = progress.iter_num, "", None
    position = progress.iter_num, progress.tokens, progress.train_seconds
    with distributed.together():
        trackers = metrics.open_trackers(out_dir, progress.iter_num, run.run_id, asdict(cfg))
        log = metrics.Log(out_dir, *position, cfg.max_iters, trackers)
    try:
        with log:
            try:
                reason = training_loop(run, log)
            except Stopped:
                if progress.iter_num > first_iter:
                    run.save()
            except (OSError, EndedElsewhere):  # standard output is closed, or the disk is full
                with suppress(OSError, EndedElsewhere):
                    run.save()
                    print(f"saved after {progress.iter_num:,} updates", file=sys.stderr)
                raise
    except Diverged as error:
        failure = error
    with distributed.together():
        if distributed.is_main():
            plot_losses(out_dir, run.baselines)
        if failure:
            raise failure
    if run.stopped:
        return report_stop(run)
    print(f"done:    {reason} after {progress.iter_num:,} updates")
    plan.report_overrun(run)
    print_loss(run)
    others = "metrics.csv, loss.png" if cfg.fsdp else "metrics.csv, samples.txt, loss.png"
    print(f"saved:   {out_dir}/{{best,ckpt}}.safetensors, {others}")
    where = "" if out_dir.parent == Path("out") else f"--checkpoint {quote(str(out_dir))} "
    prompt = f'--prompt "{word}"' if (word := run.first_word()) else ""
    print(f"next:    python sample.py {where}{prompt}")
    return 0


def print_loss(run: Run) -> None:
    """Print the best validation loss, and those of models that need no training."""
    if not distributed.is_main():
        return
    token = "character" if run.tok.meta()["kind"] == "char" else "token"
    others = ", ".join(f"{name} {loss:.3f}" for name, loss in run.baselines.items())
    best = run.progress.best_val_loss
    print(f"loss:    {best:.3f} nats per {token} at best; {others}")


def report_stop(run: Run) -> int:
    """Print when a signal ended the run; return the exit code."""
    name, iter_num = run.stopped.name, run.progress.iter_num
    if run.cfg.plan:
        print(f"stopped: {name}")
    elif iter_num:
        print(f"stopped: {name} after {iter_num:,} updates; saved")
        print(f"resume:  python train.py --init_from=resume --out_dir={quote(run.cfg.out_dir)}")
    else:
        print(f"stopped: {name} before the first update; nothing to save")
    return 128 + run.stopped


if __name__ == "__main__":
    raise SystemExit(main())
