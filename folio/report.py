"""A report: one HTML file that shows what runs have learned, and how.

    run.json, metrics.csv, samples.txt, best.safetensors, the data set -> report.html

report.html in this folder is the template, with the style and the script. The rest is rendered here
and can be read without JavaScript, which adds the heat maps of attention and what is under the
pointer. A part that cannot be shown says in one line why.

Text of a run or of its data set goes through visible() or token_name(), and then through escape().
"""

import base64
import json
import math
import re
import secrets
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

import numpy as np
import torch

from data import bins
from data.bins import MALFORMED, Dataset
from data.errors import UserError
from data.tokenizer import Tokenizer
from folio import chart, checkpoint, inspection, metrics, plot, run_folder, samples
from folio.chart import N_COLORS, Curves, Points
from folio.checkpoint import Checkpoint
from folio.inspection import token_name, token_text, visible
from folio.page import content_hash
from folio.process import USER_ERRNOS
from folio.samples import Sample
from model import GPT, LanguageModel

N_LIKELIEST = 5  # tokens that are named as the likeliest
CONFUSION_TOKENS, N_CONFUSIONS = 2**15, 15  # most tokens that are predicted; listed mistakes
CONFUSION_FLOPS = 3 * 10**12  # fewer tokens for a large model: about half a minute of a CPU
ATTENTION_TOKENS, ATTENTION_BYTES = 32, 600_000  # longest sentence; the weights of all heads
N_SAMPLES, SAMPLE_LENGTH = 12, 2000  # samples of a run; characters of a sample


# ---- reading a run ------------------------------------------------------------------------------


@dataclass
class Source:
    """What is shown of a run; the error that says why in place of what cannot be read."""

    folder: Path
    n_runs: int  # in the report
    record: dict | Exception  # run.json
    rows: list[dict[str, str]] | Exception  # metrics.csv
    samples: list[Sample] | Exception
    ckpt: Checkpoint | Exception
    options: dict | Exception
    dataset: Dataset | Exception
    model: LanguageModel | Exception
    tok: Tokenizer | Exception


def attempt(function: Callable, *args: object):
    """The function's result, or the error that a missing or damaged file raises."""
    try:
        return function(*args)
    except (UserError, OSError, *MALFORMED) as error:
        return error


def is_error(part: object) -> bool:
    return isinstance(part, Exception)


def need(value):
    """A result of attempt(), if it is not an error; otherwise raises it."""
    if is_error(value):
        raise value
    return value


def read(folder: Path, n_runs: int = 1) -> Source:
    """Read a run's folder; raises UserError if it has nothing of a run."""
    found = (
        attempt(present, run_folder.read_record(folder), folder / run_folder.RECORD),
        attempt(lambda: present(metrics.read_metrics(path := folder / "metrics.csv"), path)),
        attempt(lambda: present(samples.read(folder), folder / samples.FILE)),
        attempt(read_checkpoint, folder),
    )
    if all(map(is_error, found)):
        raise UserError(f"{folder} is not a run's folder: {found[0]}, and {found[1]}")
    record, _, _, ckpt = found
    options = attempt(read_options, record, ckpt)
    return Source(
        folder,
        n_runs,
        *found,
        options=options,
        dataset=attempt(read_dataset, options, ckpt),
        model=attempt(build_model, ckpt),
        tok=attempt(lambda: checkpoint.load_tokenizer(need(ckpt))),
    )


def present(content: dict | list, path: Path) -> dict | list:
    """The content of a file; raises UserError if it is empty."""
    if not content:
        raise UserError(f"{path} {'cannot be read' if path.exists() else 'is missing'}")
    return content


def read_checkpoint(folder: Path) -> Checkpoint:
    """The best state of a run, or else the latest; raises UserError if there is none."""
    problem = UserError(f"{folder / run_folder.BEST} is missing")
    for path in (folder / run_folder.BEST, folder / run_folder.LATEST):
        if path.exists():
            ckpt = attempt(run_folder.open_checkpoint, str(path))
            if isinstance(ckpt, Checkpoint):
                return ckpt
            problem = ckpt
    raise problem


def build_model(ckpt: Checkpoint | Exception) -> LanguageModel:
    """The model of a checkpoint; raises UserError if a weight is not finite."""
    model = checkpoint.build_model(need(ckpt)).float()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{ckpt.path} has weights that are not finite")
    return model


def read_options(record: dict | Exception, ckpt: Checkpoint | Exception) -> dict:
    """The options of a run: those in run.json, or else those in its checkpoint."""
    if not is_error(record) and isinstance(record.get("options"), dict):
        return record["options"]
    meta = need(ckpt).meta
    return {"model": meta["model"], **meta["model_config"], **meta["run_config"]}


def read_dataset(options: dict | Exception, ckpt: Checkpoint | Exception) -> Dataset:
    """The data set of a run; raises UserError if it is not the one that was trained on."""
    options = need(options)
    try:
        dataset = bins.load(bins.find(Path(options["data_dir"]), options["dataset"]))
    except UserError as error:  # without advice, which would rebuild it otherwise
        raise UserError(str(error).partition(";")[0]) from None
    if isinstance(ckpt, Checkpoint) and dataset.fingerprint != ckpt.meta["dataset"]:
        raise UserError(f"{dataset.folder} is not the data set that {ckpt.path} was trained on")
    return dataset


# ---- HTML ---------------------------------------------------------------------------------------


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def missing(error: Exception, what: str = "") -> str:
    """The line in place of a part that cannot be shown."""
    kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
    return f'<p class="missing">Not shown: {escape(visible(f"{what}{kind}{error}"))}</p>'


def table(rows: list[list[str]], head: list[str] = ()) -> str:
    """A table of HTML cells."""
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


# ---- the heading --------------------------------------------------------------------------------


def heading(run: Source) -> str:
    """The run in one line, of the facts that are known."""
    facts = (attempt(fact, run) for fact in (model_size, data_set, updates, best_loss, duration))
    return f"<p>{' · '.join(fact for fact in facts if isinstance(fact, str))}</p>"


def model_size(run: Source) -> str:
    options, size = need(run.options), ""
    if not is_error(run.model):
        size = f", {run.model.n_params():,} parameters"
    if options["model"] != "gpt":
        return f"{escape(visible(options['model']))} model{size}"
    n_layer, n_head, n_embd = (int(options[name]) for name in ("n_layer", "n_head", "n_embd"))
    return f"GPT of {n_layer} layers, {n_head} heads, width {n_embd}{size}"


def data_set(run: Source) -> str:
    name, vocabulary = escape(visible(need(run.options)["dataset"])), ""
    if not is_error(run.tok):
        vocabulary = f" ({run.tok.kind} tokens, {run.tok.vocab_size:,} ids)"
    return f"data set {name}{vocabulary}"


def best_loss(run: Source) -> str:
    val = [] if is_error(run.rows) else points(run.rows, "val_loss")
    if val:
        iter_num, loss = chart.lowest(val)
        bits = dict(points(run.rows, "val_bits_per_byte")).get(iter_num)
    else:
        loss = need(run.ckpt).meta["progress"]["best_val_loss"]
        bits = attempt(lambda: need(run.dataset).val.bits_per_byte(loss))
    per_byte = f" ({bits:.3f} bits per byte)" if isinstance(bits, float) else ""
    return f"best validation loss <b>{loss:.4f}</b> nats per token{per_byte}"


def updates(run: Source) -> str:
    return f"{int(_last(run)['iter_num']):,} updates"


def duration(run: Source) -> str:
    names = ("train_seconds", "wall_seconds")
    train, wall = (metrics.format_seconds(float(_last(run)[name])) for name in names)
    return f"{train} of training, {wall} in all"


def _last(run: Source) -> dict:
    """The last row of metrics.csv, or else the checkpoint's progress, which has the same names."""
    return need(run.ckpt).meta["progress"] if is_error(run.rows) else run.rows[-1]


# ---- the loss -----------------------------------------------------------------------------------


def points(rows: list[dict[str, str]], column: str) -> Points:
    return list(zip(*plot.points(rows, column), strict=True))


def read_curves(run: Source, color: int) -> Curves:
    rows = need(run.rows)
    curves = Curves(visible(str(run.folder)), color, points(rows, "loss"), points(rows, "val_loss"))
    if not curves.train and not curves.val:
        raise UserError(f"{run.folder / 'metrics.csv'} has no losses")
    return curves


def read_baselines(run: Source) -> list[tuple[str, float]]:
    return [(name, round(loss, 2)) for name, loss in bins.baselines(need(run.dataset)).items()]


def loss_chart(curves: list[Curves | Exception], baselines: list[list | Exception]) -> str:
    """The chart of all runs, and what is missing from it."""
    drawn = [run for run in curves if not is_error(run)]
    lines = sorted({line for run in baselines if not is_error(run) for line in run})
    missed = [missing(part) for part in curves if is_error(part)]
    missed += [missing(part, "dashed lines: ") for part in baselines if is_error(part)]
    if len(lines) > 2:
        missed.append("<p>These runs have other data or tokens, so compare bits per byte.</p>")
    return (chart.draw(drawn, lines) if drawn else "") + "".join(missed)


# ---- what the model does ------------------------------------------------------------------------


def samples_part(run: Source, _: dict) -> str:
    found = need(run.samples)
    n = min(len(found), N_SAMPLES)
    shown = [found[round(i * (len(found) - 1) / max(1, n - 1))] for i in range(n)]
    parts = [f"<p>{n} of {len(found)} evaluations.</p>"] if n < len(found) else []
    for iter_num, loss, prompt, text in shown:
        more = "\u2026" if len(text) > SAMPLE_LENGTH else ""
        prompt, text = (escape(visible(part)) for part in (prompt, text[:SAMPLE_LENGTH] + more))
        parts.append(
            f"<figure><figcaption>update {iter_num:,} · validation loss {loss:.3f}</figcaption>"
            f'<pre dir="auto"><span class="faint">{prompt}</span>{text}</pre></figure>'
        )
    return f'<div class="samples">{"".join(parts)}</div>'


@torch.inference_mode()
def surprise_part(run: Source, data: dict) -> str:
    model, tok, dataset = need(run.model), need(run.tok), need(run.dataset)
    idx, targets = inspection.first_window(model, dataset.val)
    log_probs = model(idx)[0][0].log_softmax(-1)  # (T, V)
    surprise = -log_probs.gather(1, targets[0, :, None])[:, 0]  # (T,)
    top = log_probs.topk(min(N_LIKELIEST, log_probs.shape[-1]))
    data["surprise"] = [float(f"{s:.4g}") for s in surprise.tolist()]
    data["tokens"] = [token_name(tok, i) for i in targets[0].tolist()]
    data["likeliest"] = [
        [[token_name(tok, i), float(f"{math.exp(v):.3g}")] for i, v in zip(*row, strict=True)]
        for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    blind = math.log(tok.vocab_size)
    styles = ['class="faint"', *(f'style="--a:{min(1, s / blind):.2f}"' for s in surprise.tolist())]
    ids = [int(idx[0, 0]), *targets[0].tolist()]
    texts = [escape(visible(token_text(tok, i)) or token_name(tok, i)) for i in ids]
    spans = [f"<i {style}>{text}</i>" for style, text in zip(styles, texts, strict=True)]
    passage = "".join(spans).replace("\n", "\u21b5\n")
    return (
        f"<p>By {_state(run)}. Mean surprise: <b>{surprise.mean():.4f}</b> nats per token.</p>"
        f'<p class="scale"><span>0: it was certain</span><span class="bar hot"></span>'
        f"<span>{blind:.2f}: a blind guess among {tok.vocab_size:,} tokens</span></p>"
        f'<p class="passage" dir="auto">{passage}</p>'
    )


def _state(run: Source) -> str:
    ckpt = need(run.ckpt)
    return f"{code(ckpt.path.name)} (update {ckpt.meta['progress'].get('iter_num', 0):,})"


@torch.inference_mode()
def attention_part(run: Source, data: dict) -> str:
    model, tok, dataset = need(run.model), need(run.tok), need(run.dataset)
    if not isinstance(model, GPT):
        return "<p>A bigram model has no attention: it sees only the last token.</p>"
    idx, _ = inspection.first_window(model, dataset.val)
    most = ATTENTION_BYTES // run.n_runs * 3 // 4  # bytes before base64
    n_maps, T = model.config.n_layer * model.config.n_head, min(ATTENTION_TOKENS, idx.shape[1])
    while T > 1 and n_maps * T * (T + 1) // 2 > most:
        T -= 1
    data["sentence"] = [token_name(tok, i) for i in idx[0, :T].tolist()]
    data["heads"], rows = [], []
    rows_of, columns_of = np.tril_indices(T)
    for layer, weights in enumerate(inspection.attention_weights(model, idx[:, :T]), 1):
        lower = (weights[0].numpy()[:, rows_of, columns_of] * 255).round().astype(np.uint8)
        data["heads"] += [base64.b64encode(head.tobytes()).decode() for head in lower]
        names = [f"<figcaption>head {n}</figcaption>" for n in range(1, len(lower) + 1)]
        maps = [f"<figure><canvas></canvas>{name}</figure>" for name in names]
        rows.append(f'<div class="layer"><b>layer {layer}</b>{"".join(maps)}</div>')
    sentence = "".join(f"<i>{escape(name)}</i>" for name in data["sentence"])
    return (
        f'<p class="sentence">{sentence}</p><p class="scale"><span>0</span><span class="bar cool">'
        "</span><span>1, all of its weight (half the color: 0.25)</span></p>"
        "<noscript><p>The maps need JavaScript.</p></noscript>"
        f'<div class="heads">{"".join(rows)}</div>'
    )


@torch.inference_mode()
def confusions_part(run: Source, _: dict) -> str:
    model, tok, dataset = need(run.model), need(run.tok), need(run.dataset)
    most = min(CONFUSION_TOKENS, CONFUSION_FLOPS // max(1, model.flops_per_token()))
    true, predicted = inspection.predictions(model, dataset.val, most)
    wrong = true != predicted
    pairs = Counter(zip(true[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    n, n_wrong, counts, rows = len(true), int(wrong.sum()), np.bincount(true), []
    for pair, count in (found := pairs.most_common(N_CONFUSIONS)):
        meter = f'<span class="meter" style="--a:{count / found[0][1]:.2f}"></span>'
        names = (code(token_name(tok, i)) for i in pair)
        rows.append([*names, f"{count:,}", f"{meter}{count / n_wrong:.1%}"])
    accuracy = (
        f"<p>Over {n:,} tokens of the validation text, {_state(run)} is right "
        f"<b>{1 - n_wrong / n:.1%}</b> of the time; always predicting "
        f"{code(token_name(tok, counts.argmax()))} would give {counts.max() / n:.1%}.</p>"
    )
    return accuracy + table(rows, ["the token", "it predicted", "times", "of all mistakes"])


# ---- how it was made ----------------------------------------------------------------------------


def made_part(run: Source, _: dict) -> str:
    parts = [missing(part) for part in (run.record, run.rows, run.ckpt) if is_error(part)]
    facts = {}
    if not is_error(time := attempt(duration, run)):
        facts["time"] = time
    if not is_error(run.rows) and (speeds := points(run.rows, "tokens_per_second")):
        facts["speed"] = f"{median(speed for _, speed in speeds):,.0f} tokens per second (median)"
    if not is_error(run.record):
        others = {k: v for k, v in run.record.items() if k != "options" and v not in ("", [], {})}
        facts |= {escape(visible(name)): cell(value) for name, value in others.items()}
    parts.append(table([[name, fact] for name, fact in facts.items()]))
    if is_error(run.options):
        return "".join(parts)
    summary = f"All {len(run.options)} options"
    parts.append(f"<details><summary>{summary}</summary>{cell(run.options)}</details>")
    return "".join(parts)


def cell(value: object) -> str:
    """A value of run.json as HTML: a table, a command, a list, or text."""
    if isinstance(value, dict):
        shown = {name: item for name, item in value.items() if item not in ("", [], {})}
        return table([[escape(visible(name)), cell(item)] for name, item in shown.items()])
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        words = (f"<span>{escape(visible(shlex.quote(item)))}</span>" for item in value)
        return f"<code>{' '.join(words)}</code>"
    if isinstance(value, list):
        return "".join(map(cell, value))
    return code(visible(str(value)) or '""')


# ---- the file -----------------------------------------------------------------------------------

PARTS = {
    "samples": samples_part,
    "surprise": surprise_part,
    "attention": attention_part,
    "confusions": confusions_part,
    "made": made_part,
}


def write(folders: list[Path], output: Path) -> None:
    """Write the report of the runs in `folders` to `output`, atomically.

    Raises UserError if a folder has nothing of a run.
    """
    if output.suffix != ".html":
        raise UserError(f"--output={output}: a report is HTML; use a name that ends with .html")
    names = [visible(str(folder)) for folder in folders]
    columns = {name: [] for name in ("heading", *PARTS)}
    curves, baselines, data = [], [], []
    for i, folder in enumerate(folders):
        run = read(folder, len(folders))
        curves.append(attempt(read_curves, run, i))
        baselines.append(attempt(read_baselines, run))
        data.append({})
        columns["heading"].append(heading(run))
        for name, part in PARTS.items():
            shown = attempt(part, run, data[-1])
            columns[name].append(missing(shown) if is_error(shown) else shown)
    contents = {name: side_by_side(names, parts) for name, parts in columns.items()}
    template = Path(__file__).with_suffix(".html").read_text("utf-8")
    contents |= {
        "script": content_hash(template, "script"),
        "title": escape(", ".join(names)),
        "loss": loss_chart(curves, baselines),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: contents[match[1]], template)
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        checkpoint.write_file(output, [page.encode()], temporary)
    except OSError as error:
        error.filename = str(output)
        if error.errno not in USER_ERRNOS:
            raise
        raise UserError(f"--output={output}: {error.strerror.lower()}; use another name") from None


def side_by_side(names: list[str], parts: list[str]) -> str:
    """A part of each run; of several runs, under their names."""
    columns = []
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        title = f'<h3 class="c{i % N_COLORS}">{escape(name)}</h3>' if len(names) > 1 else ""
        columns.append(f'<div class="run" data-run="{i}">{title}{part}</div>')
    return f'<div class="runs">{"".join(columns)}</div>'
