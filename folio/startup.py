"""What a run starts from: its data set, built if needed, and the options of a checkpoint."""

import glob
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch

from data import bins, hub
from data.errors import UserError
from folio import distributed, run_folder
from folio.checkpoint import Checkpoint, check_model
from folio.machine import find_device, memory_needed
from folio.options import read_options
from folio.run import Run
from folio.run_folder import LATEST
from model import GPTConfig

ROOT = Path(__file__).parent.parent
QUICK_START = "shakespeare_char_cpu.py"  # the recipe where none is named
QUICK_START_ON_CUDA = "shakespeare_char.py"  # in a minute the other one would overfit there
DOWNLOAD_SECONDS = 10  # the quick start's limit for its download, before it uses another text


NANOGPT = {  # options of nanoGPT that do not exist here, with advice
    "gradient_accumulation_steps": "batch_size counts all sequences of an update; "
    "micro_batch_size says how many are processed at a time",
    "eval_iters": "an evaluation reads the whole split, or eval_tokens of it",
    "always_save_checkpoint": "every evaluation saves ckpt.safetensors, and best.safetensors "
    "if it improved",
    "decay_lr": "use schedule=constant",
    "backend": "the device decides it",
    "start": "use sample_prompt",
    "wandb_log": "use wandb",
    "max_new_tokens": "use sample_tokens",
}


def read_given(cls: type, argv: list[str]) -> tuple[dict, bool]:
    """The options, of train.py's dataclass, that are given, in the order of setting; and whether
    they mean the quick start."""
    given, recipes = read_options(cls, argv, hints=NANOGPT)
    quick_start = False
    if given.get("init_from", "scratch") == "scratch" and not recipes:
        quick_start = "dataset" not in given
        on_cuda = find_device(given.get("device", "auto")).type == "cuda"
        name = QUICK_START_ON_CUDA if on_cuda else QUICK_START
        recipe, _ = read_options(cls, [str(ROOT / "config" / name)])
        recipe["out_dir"] = "out/" + Path(given.get("dataset", "quickstart")).absolute().name
        given = {k: v for k, v in recipe.items() if k not in given} | given
    lengths = [name for name in given if name == "max_iters" or (name == "minutes" and given[name])]
    for name in lengths[:-1]:  # they override each other; the last one wins
        del given[name]
    if distributed.is_restart() and (saved := _restarted(given, given.get("out_dir", cls.out_dir))):
        return saved, False
    return given, quick_start


def _restarted(given: dict, out_dir: str) -> dict:
    """The options after torchrun has restarted a run: those of a resume; {} if it did not save."""
    folder = Path(out_dir)
    if given.get("init_from") == "resume":
        folder = find_resumed(given.get("out_dir", ""), given.get("checkpoint", ""))
    record = run_folder.read_record(folder)
    if record.get("launch") != distributed.launch_id() or not (folder / LATEST).exists():
        return {}
    options = {**record["options"], "init_from": "resume", "out_dir": str(folder), "checkpoint": ""}
    for name in ("micro_batch_size", "fsdp"):  # the number of processes may be another
        del options[name]
    return options


def find_dataset(data_dir: Path, name: str, quick_start: bool) -> bins.Dataset:
    """Open a data set; rank 0 builds it if it is missing. Raises UserError if a rank sees another
    one, or none."""
    folder = distributed.from_main(lambda: _build_dataset(data_dir, name, quick_start))
    with distributed.together():
        dataset = bins.load(folder)
    expected = distributed.from_main(lambda: dataset.fingerprint)
    with distributed.together():
        if dataset.fingerprint != expected:
            raise UserError(f"{folder} of rank {distributed.rank()} is not the one of rank 0")
    return dataset


def _build_dataset(data_dir: Path, name: str, quick_start: bool) -> Path:
    """The folder of a data set. If it is missing, prepare.py builds it, if it can: from its recipe
    or from the text in data_dir/NAME/input.txt.

    The quick start falls back to the Python language reference, which needs no download, if tiny
    Shakespeare cannot be downloaded within seconds.
    """
    if data_dir.is_file():
        raise UserError(f"--data_dir={data_dir} is a file, not a folder")
    folder = bins.find(data_dir, name)
    if not bins.is_built(folder):
        if name in hub.DATA_SETS:
            gigabytes = hub.DATA_SETS[name][1]
            raise UserError(
                f"there is no data set {folder}; it takes a download of {gigabytes} GB: "
                f"python prepare.py {name}"
            )
        try:
            _run_prepare(folder, DOWNLOAD_SECONDS if quick_start else None)
        except UserError as error:
            if not quick_start:
                raise UserError(f"there is no data set {folder} (--data_dir): {error}") from None
            reason = str(error).split(";")[0]
            print(f"no tiny Shakespeare: {reason}; using pydocs, the Python language reference")
            folder = data_dir / "pydocs"
            if not bins.is_built(folder):
                _run_prepare(folder)
    return folder


def _run_prepare(folder: Path, timeout: float | None = None) -> None:
    """Run prepare.py; raises the error that it reports, or UserError after `timeout` seconds."""
    script, name, parent = str(ROOT / "prepare.py"), folder.name, folder.parent
    command = [sys.executable, script, name, f"--data_dir={parent}"]
    try:
        done = subprocess.run(
            command,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the download took more than {timeout} seconds") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["prepare.py gave no reason"]
        reason = lines[-1].removeprefix("error: ")
        raise UserError(reason) if done.returncode == 2 else OSError(reason)


def check_dataset(dataset: bins.Dataset, block_size: int, vocab_size: int) -> None:
    """Raise UserError if a data set is too short, or has more ids than the model."""
    shortest = 2 * (block_size + 1)
    for split in (dataset.train, dataset.val):
        if len(split.tokens) < shortest:
            raise UserError(
                f"{split.path} has {len(split.tokens)} tokens, but two windows of block_size="
                f"{block_size} need {shortest}: use a longer text or a smaller block_size"
            )
    if vocab_size < dataset.vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is below the {dataset.vocab_size} ids of {dataset.folder}"
        )


def check_same_data(dataset: bins.Dataset, ckpt: Checkpoint, resuming: bool) -> None:
    """Raise UserError if the tokenizer, or when resuming the data, is not the checkpoint's."""
    folder = dataset.folder
    if resuming and ckpt.meta["dataset"] != dataset.fingerprint:
        advice = ""
        for other in sorted(folder.parent.glob(f"{glob.escape(folder.name)}.*")):
            with suppress(UserError):  # not a data set
                if bins.load(other).fingerprint == ckpt.meta["dataset"]:
                    advice = f"; {other} is: it was moved aside; use --dataset={other.name}"
        raise UserError(f"{folder} is not the data set that {ckpt.path} was trained on{advice}")
    if ckpt.meta["tokenizer"] != dataset.tokenizer and not _new_characters(dataset, ckpt):
        raise UserError(
            f"{folder} has a different tokenizer from {ckpt.path}; prepare its text with "
            f"--tokenizer={ckpt.path}"
        )


def model_vocab_size(given: int | None, dataset: bins.Dataset, ckpt: Checkpoint | None) -> int:
    """The number of ids of the model: `given`, but enough for the data set if its characters extend
    those of the model to finetune. Without a model it is the data set's."""
    if ckpt and (new := _new_characters(dataset, ckpt)):
        shown = new if len(new) <= 20 else f"{new[:20]}..."
        print(f"new characters, which start with the mean embedding: {len(new)} ({shown!r})")
        return max(given, dataset.vocab_size)
    return given or dataset.vocab_size


def _new_characters(dataset: bins.Dataset, ckpt: Checkpoint) -> str:
    """The characters that a data set's tokenizer adds to the checkpoint's; empty if it differs in
    anything else."""
    new, old = (dict(t) for t in (dataset.tokenizer, ckpt.meta["tokenizer"]))
    characters, known = (t.pop("characters", None) for t in (new, old))
    extends = new == old and type(characters) is type(known) is str
    return characters[len(known) :] if extends and characters.startswith(known) else ""


def find_resumed(out_dir: str, path: str) -> Path:
    """The folder of the run to resume: `out_dir`, or that of the checkpoint `path`, or if both are
    empty the newest run in out/."""
    if not path:
        folder = Path(out_dir or run_folder.newest_run(Path("out")))
        if not folder.is_dir():
            raise UserError(f"no run in {folder}: no such folder")
        names = (run_folder.RECORD, run_folder.LATEST, run_folder.BEST, run_folder.SNAPSHOTS)
        if not any((folder / name).exists() for name in names):
            raise UserError(f"no run in {folder}: it has none of {', '.join(names)}")
        return folder
    file = Path(path)
    folder = file.parent.parent if file.parent.name == run_folder.SNAPSHOTS else file.parent
    if not file.is_file():
        raise UserError(f"cannot open checkpoint {path}: no such file")
    if not (folder / run_folder.RECORD).is_file():
        raise UserError(f"{path} is not in a run's folder; to start from it: --init_from={path}")
    if out_dir and Path(out_dir).resolve() != folder.resolve():
        raise UserError(f"{path} belongs to the run in {folder}, not to {out_dir}")
    return folder


def load_start(given: dict) -> Checkpoint | None:
    """Load the checkpoint that init_from selects, its tensors on rank 0 alone; None for scratch."""
    with distributed.together():
        ckpt = _load_start(given) if distributed.is_main() else None
    shared = distributed.from_main(lambda: ckpt and (ckpt.path, ckpt.meta))
    return ckpt or (Checkpoint(shared[0], {}, shared[1]) if shared else None)


def _load_start(given: dict) -> Checkpoint | None:
    init_from = given.get("init_from", "scratch")
    if init_from == "scratch":
        return None
    if init_from != "resume":
        return run_folder.open_checkpoint(init_from, given.get("cache_dir", ""))
    path = given.get("checkpoint", "")
    folder = find_resumed(given.get("out_dir", ""), path)
    ckpt = run_folder.load_from_run(folder, Path(path)) if path else run_folder.load_latest(folder)
    check_model(ckpt)
    return ckpt


def check_processes(device: str, dtype: str, fsdp: bool) -> None:
    """Raise UserError for a device that the processes of torchrun cannot use, or one with FSDP."""
    count, n_local = torch.cuda.device_count(), distributed.local_world_size()
    if device.startswith("cuda") and n_local > count:
        raise UserError(f"{n_local} processes need as many GPUs, and this machine has {count}")
    if ":" in device and distributed.world_size() > 1:
        raise UserError(f"--device={device} is one GPU; each process needs its own: --device=cuda")
    if fsdp and distributed.world_size() == 1:
        raise UserError("--fsdp needs several processes: torchrun --nproc_per_node=8 train.py ...")
    if fsdp and dtype == "float16":
        raise UserError("--fsdp needs --dtype=bfloat16 or float32, not float16")


def check_batch_size(batch_size: int, micro_batch_size: int) -> None:
    """Raise ValueError if the batch cannot be divided among processes and micro-batches."""
    world_size, micro = distributed.world_size(), micro_batch_size or 1
    if batch_size % (world_size * micro) == 0:
        return
    below = batch_size - batch_size % (world_size * micro)
    sizes = [f"batch_size={n}" for n in (below, below + world_size * micro) if n]
    what = f"{world_size} processes" if world_size > 1 else ""
    if micro_batch_size:
        what = f"{what} times micro_batch_size={micro}" if what else f"micro_batch_size={micro}"
        fitting = [m for m in range(1, micro) if batch_size % (world_size * m) == 0]
        sizes = [f"micro_batch_size={max(fitting)}"] * bool(fitting) + sizes[-1:]
    raise ValueError(
        f"batch_size={batch_size} is not a multiple of {what}; use {' or '.join(sizes)}"
    )


def resumed_options(given: dict, ckpt: Checkpoint, known: set[str]) -> dict:
    """The options of the run that `ckpt` belongs to, overridden by `given`.

    Raises UserError for an option that cannot change. Options that no longer exist are dropped.
    """
    saved = {**_model_options(ckpt), "optimizer": "adamw", **ckpt.meta["run_config"]}
    if "micro_batch_size" not in saved:
        path = ckpt.path
        raise UserError(f"{path} was not trained by Folio; to start from it: --init_from={path}")
    saved, given = {n: v for n, v in saved.items() if n in known}, _as_saved(given, saved)
    for name in (*_model_options(ckpt), "seed", "optimizer"):
        if name != "dropout" and given.get(name, saved[name]) != saved[name]:
            raise _made_with(ckpt, name, given[name], saved[name])
    changed = {name for name in given if given[name] != saved.get(name)}
    if "device" in changed:  # what "auto" chose there may not fit here
        saved |= {"dtype": "auto", "compile": "auto"}
    if distributed.world_size() == 1:
        saved["fsdp"] = False
    per_step = distributed.world_size() * saved["micro_batch_size"]
    if changed & {"batch_size", "device", "dtype"} or saved["batch_size"] % per_step:
        saved["micro_batch_size"] = 0
    return {**saved, **given}


def finetuned_options(given: dict, ckpt: Checkpoint) -> dict:
    """The model options and the data set of `ckpt`, overridden by `given`.

    vocab_size may be larger. block_size may be smaller, and larger if positions are rotary. Raises
    UserError for other changes of the model.
    """
    saved = _model_options(ckpt)
    given = _as_saved(given, saved)
    for name in saved:
        if name == "dropout" or given.get(name, saved[name]) == saved[name]:
            continue
        crops = name == "block_size" and given[name] < saved[name]
        extends = name == "block_size" and saved["rotary"]
        pads = name == "vocab_size" and given[name] > saved[name]
        if not (crops or extends or pads):
            raise _made_with(ckpt, name, given[name], saved[name])
        if name == "block_size":
            print(f"block_size={given[name]}; {ckpt.path} was trained with {saved[name]}")
    if "dataset" not in given:
        run_config = ckpt.meta.get("run_config", {})
        saved |= {name: run_config[name] for name in ("dataset", "data_dir") if name in run_config}
    return {**saved, **given}


def _model_options(ckpt: Checkpoint) -> dict:
    defaults = {f.name: f.default for f in fields(GPTConfig)}
    return {"model": ckpt.meta["model"], **defaults, **ckpt.meta["model_config"]}


def _as_saved(given: dict, saved: dict) -> dict:
    """`given`, with n_kv_head=0 if it equals n_head, because GPTConfig stores it so."""
    same = given.get("n_kv_head") == given.get("n_head", saved["n_head"])
    return {**given, "n_kv_head": 0} if same else given


def _made_with(ckpt: Checkpoint, name: str, given: object, saved: object) -> UserError:
    return UserError(f"{name}={given}, but {ckpt.path} was made with {name}={saved}")


def describe(run: Run, ckpt: Checkpoint | None) -> None:
    """Print the machine, the data and the model, and of a resumed run its state."""
    cfg, data, model = run.cfg, run.dataset, run.model
    if not distributed.is_main():
        return
    if cfg.init_from == "resume" and not cfg.eval_only:
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(ckpt.path.stat().st_mtime))
        print(f"resume:  {ckpt.path}, saved {saved}, {run.progress.iter_num:,} updates")
    name = f"{torch.get_num_threads()} threads"
    if cfg.device.startswith("cuda"):
        name = torch.cuda.get_device_name(cfg.device)
    if distributed.world_size() > 1:
        name = f"{distributed.world_size()} processes with {name}"
    how = "compiled" if cfg.compile else "eager"
    graphs = "" if run.graphs is None else ", CUDA graphs"
    print(f"machine: {cfg.device} ({name}), {cfg.dtype}, {how}{graphs}")
    print(f"data:    {data.folder}: {run.tok.meta()['kind']} tokens, {data.vocab_size:,} ids")
    print(f"         {len(data.train.tokens):,} to train on, {len(data.val.tokens):,} to validate")
    names = ("n_layer", "n_head", "n_embd", "block_size")
    shape = ", ".join(f"{name} {getattr(cfg, name)}" for name in names)
    print(f"model:   {shape if cfg.model == 'gpt' else 'bigram'}")
    memory = memory_needed(model, cfg) / 2**20
    print(
        f"         {model.n_params():,} parameters, {model.flops_per_token() / 1e6:,.1f} MFLOP per "
        f"token, about {memory:,.0f} MiB",
        flush=True,
    )
