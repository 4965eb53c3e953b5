"""Before a run: how long its updates and evaluations take, and how many of them fit."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from data.errors import UserError
from folio import distributed, machine, run_folder
from folio.metrics import Clock, format_seconds
from folio.run import Progress, Run

EVALS = 5  # evaluations of a run with eval_interval=0
MIN_ITERS = 100  # the smallest number of updates that --minutes chooses
OVERRUN = 1.1  # a run that takes more than this share of its --minutes says so
TRIALS, TRIAL_SECONDS = 10, 0.5  # a timing stops after so many trials or seconds
BUDGET_SHARE, BUDGET_SECONDS = 0.02, 3.0  # with --minutes: after 2% of them, or 3 s
SLOW = 5.0  # seconds of a first trial on a CPU after which there is no other, unless it compiled
SAVE_SPEED = 2**29  # bytes a second that are written to a disk
REAL_UPDATES, REAL_SECONDS = 3, 60.0  # --plan makes so many updates, if they take less than this

Update = Callable[[Run], object]


def plan(run: Run, update: Update) -> None:
    """Time an update, set the length and the intervals that are still open, print the plan.

    `update` is train.py's, which this module cannot import. Raises Stopped after a signal.
    """
    cfg, progress = run.cfg, run.progress
    seconds, eval_seconds, how = time_update(run, update), time_evaluation(run), "estimated"
    if cfg.plan and REAL_UPDATES * seconds < REAL_SECONDS:
        seconds, how = time_real_updates(run, update), f"median of {REAL_UPDATES} updates"
    if cfg.minutes:
        max_iters = max(MIN_ITERS, progress.iter_num + updates_that_fit(run, seconds, eval_seconds))
        budget = format_seconds(60 * cfg.minutes)
        print(
            f"budget:  {budget} are {max_iters} updates; --max_iters={max_iters} repeats this run"
        )
        cfg = replace(cfg, minutes=0.0, max_iters=max_iters)
    run.cfg = cfg = replace(
        cfg,
        eval_interval=cfg.eval_interval or math.ceil(cfg.max_iters / EVALS) or 250,
        log_interval=cfg.log_interval or math.ceil(cfg.max_iters / 100) or 10,
    )
    size = f"{cfg.batch_size} x {cfg.block_size} tokens"
    if cfg.plan:
        print_measured(run, seconds, how)
    if cfg.max_iters == 0:
        each = format_seconds(seconds) if seconds > 10 else f"{seconds:.2g} s"
        print(f"plan:    updates of {size}, {each} each, until a condition is met")
        return
    left = max(0, cfg.max_iters - progress.iter_num)
    tokens = left * cfg.batch_size * cfg.block_size
    epochs = tokens / len(run.dataset.train.tokens)
    training, others = left * seconds, math.ceil(left / cfg.eval_interval) * eval_seconds
    print(f"plan:    {left:,} updates of {size}, {tokens:,} in all, {epochs:.1f} epochs")
    print(
        f"         about {format_seconds(training)} of training, {format_seconds(others)} of "
        "evaluations",
        flush=True,
    )


def report_overrun(run: Run) -> None:
    """Print it if the run took clearly longer than its --minutes."""
    run.read_clock()
    if run.budget and run.progress.wall_seconds > OVERRUN * run.budget:
        took, budget = format_seconds(run.progress.wall_seconds), format_seconds(run.budget)
        print(f"budget:  the run took {took} instead of {budget}")


# ---- timing -------------------------------------------------------------------------------------


def time_update(run: Run, update: Update) -> float:
    """Estimate the seconds of an update, from trials that leave the weights unchanged.

    A trial has one or two micro-batches; the difference is the cost of each further one. The first
    trial compiles.
    """
    cfg, scaler_state = run.cfg, run.scaler.state_dict()
    per_step = distributed.world_size() * cfg.micro_batch_size
    n_micro = cfg.batch_size // per_step

    def trial(n: int) -> None:
        trial_cfg = replace(cfg, batch_size=n * per_step)
        update(replace(run, cfg=trial_cfg, progress=Progress()))

    run.guard.skip_all(True)
    try:
        first = _seconds(run, lambda: trial(1))
        if run.graphs is not None:
            trial(1)  # records them
    except RuntimeError as error:
        if not cfg.compile or machine.is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"an update failed ({reason}); try --compile=False") from None
    if first > SLOW and cfg.device == "cpu" and not cfg.compile:
        one, two = first, 2 * first
    else:
        one, two = (_time(run, lambda n=n: trial(n)) if n <= n_micro else 0.0 for n in (1, 2))
    run.guard.skip_all(False)
    run.scaler.load_state_dict(scaler_state)
    return one + (n_micro - 1) * max(0.0, two - one)


def time_real_updates(run: Run, update: Update) -> float:
    """The median seconds of real updates, which change the weights: for --plan, which ends then."""
    trial = replace(run, progress=Progress())
    return median(_seconds(run, lambda: update(trial)) for _ in range(REAL_UPDATES))


def time_evaluation(run: Run) -> float:
    """Estimate the seconds of an evaluation and of the save that follows it.

    One batch of the evaluation is timed. The first one compiles.
    """
    val = run.dataset.val
    per_batch = distributed.world_size() * run.cfg.micro_batch_size * run.cfg.block_size
    n_batches = sum(math.ceil(n / per_batch) for _, n in run.evaluated())
    seconds = _seconds(run, lambda: run.loss(val, per_batch))
    if seconds < SLOW or run.cfg.compile or run.cfg.device != "cpu":
        seconds = _time(run, lambda: run.loss(val, per_batch))
    return n_batches * seconds + run.checkpoint_bytes() / SAVE_SPEED


def updates_that_fit(run: Run, seconds: float, eval_seconds: float) -> int:
    """How many further updates of that many seconds fit in --minutes, with the evaluations."""
    run.read_clock()
    run.budget = 60 * run.cfg.minutes
    left = run.budget - distributed.maximum(run.progress.wall_seconds)  # the same on all ranks
    if run.cfg.eval_interval:
        return max(0, int(left / (seconds + eval_seconds / run.cfg.eval_interval)))
    return max(0, int((left - EVALS * eval_seconds) / seconds))


def _time(run: Run, trial: Callable[[], object]) -> float:
    """The mean seconds of a trial, repeated."""
    trials, seconds, times = TRIALS, TRIAL_SECONDS, []
    if run.cfg.minutes:
        trials, seconds = math.inf, min(BUDGET_SHARE * 60 * run.cfg.minutes, BUDGET_SECONDS)
    while not times or (len(times) < trials and sum(times) < seconds):
        times.append(_seconds(run, trial))
    return mean(times)


def _seconds(run: Run, trial: Callable[[], object]) -> float:
    """The seconds of a trial, of the slowest rank: so all ranks make as many trials."""
    run.check_stop()
    clock = Clock(run.cfg.device)
    clock.start()
    trial()
    clock.stop()
    return distributed.maximum(clock.read()[0])


def print_measured(run: Run, seconds: float, how: str) -> None:
    """Print the speed of an update, the memory that was used, and what the disk must hold."""
    cfg, mib = run.cfg, run.checkpoint_bytes() / 2**20
    tokens, flops = cfg.batch_size * cfg.block_size, run.model.flops_per_token()
    print(
        f"update:  {seconds:.3g} s ({how}), {tokens / seconds:,.0f} tokens/s, "
        f"{tokens * flops / seconds / 1e9:,.0f} GFLOP/s"
    )
    if peak := machine.peak_memory(cfg.device):
        of = "of tensors on the GPU" if cfg.device.startswith("cuda") else "of the process"
        print(f"memory:  {peak / 2**20:,.0f} MiB at the peak until now, {of}")
    n, free = 3 + run.n_snapshots(), run_folder.free_space(Path(cfg.out_dir)) / 2**20
    print(f"disk:    {n} checkpoints of {mib:,.1f} MiB take {n * mib:,.1f}; {free:,.0f} MiB free")
