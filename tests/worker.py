"""Processes that train together for test_distributed.py, and write down how.

    python tests/worker.py N RUN [and RUN ...]                   forks N processes
    torchrun --nproc_per_node=N tests/worker.py N RUN [...]      is one of them

Each RUN is train.py's arguments. FAULT, in the environment, breaks something on one rank. Files in
the current folder: windows.RANK, with a line for each run, update and micro-batch; pid.RANK; and
code.RANK, with the exit code of each run.
"""

import errno
import os
import resource
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from folio import batch, distributed, run_folder
from model import GPT

FAULT = os.environ.get("FAULT", "")
AT = int(os.environ.get("FAULT_AT", 7))  # the update at which it breaks, or the size of the disk


def fork(n: int) -> None:
    """Return in n processes, which find each other as those of torchrun do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in group.items()})
    children = []
    for rank in range(n):
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        child = os.fork()
        if child == 0:
            return
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(statuses))


def note(name: str, text: object) -> None:
    with open(HERE / f"{name}.{RANK}", "a") as file:
        file.write(f"{text}\n")


def noted_windows(split, starts, *args):
    note("windows", " ".join(map(str, starts)))
    return batch.get_batch(split, starts, *args)


def noted_update(run):
    note("windows", f"update {run.progress.iter_num}")
    loss, norm = update(run)
    if RANK == 1 and run.progress.iter_num == AT:
        if FAULT == "nan":  # as after a bit flip in memory
            with torch.no_grad():
                distributed.local_part(run.model.wte.weight)[0, 0] = torch.nan
        if FAULT == "hang":
            note("hung", "")
            os.kill(os.getpid(), 19)
    return loss, norm


def shrunk_run(*args):
    """As on GPUs: three sequences fit in memory; on rank 1 they fit only without gradients."""
    run, forward = build_run(*args), GPT.forward

    def limited(self, idx, *args):
        if len(idx) > (1 if RANK == 1 and self.wte.weight.grad is not None else 3):
            raise torch.OutOfMemoryError
        return forward(self, idx, *args)

    GPT.forward = limited
    run.shrink_micro_batch_size()
    GPT.forward = forward
    return run


def full_disk(out_dir, tensors, meta, values, **kwargs):
    next(iter(values))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out_dir))


if "RANK" not in os.environ:
    fork(int(sys.argv[1]))
HERE, RANK = Path.cwd(), int(os.environ["RANK"])
note("pid", os.getpid())
train.get_batch = noted_windows
train.plot_losses = lambda *_: None  # test_train.py has it; it takes a second
if FAULT == "elsewhere" and RANK == 1:
    os.chdir("elsewhere")
if FAULT == "memory":
    build_run, train.build_run = train.build_run, shrunk_run
if FAULT == "full disk":
    run_folder.save_run = full_disk
if FAULT == "small disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (AT, AT))
if FAULT == "hang":
    distributed.TIMEOUT = timedelta(seconds=5)
update, train.update = train.update, noted_update
runs = " ".join(sys.argv[2:]).split(" and ")
for words in runs:
    note("windows", "run")
    code = train.main(words.split())
    note("code", code)
raise SystemExit(code)
