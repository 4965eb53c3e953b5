"""A report: one HTML file that shows what runs have learned, and how.

    run.json, metrics.csv, samples.txt, best.safetensors, the data set -> report.html

report.html in this folder is the template, with the style and the script. The rest is rendered here
and can be read without JavaScript, which adds the heat maps of attention and what is under the
pointer. A part that cannot be shown says in one line why.

Text of a run or of its data set goes through visible() or token_name(), and then through escape().
"""

import ast
import base64
import json
import math
import os
import re
import secrets
import shlex
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from data import bins
from data.bins import MALFORMED, Dataset, Split
from data.errors import UserError
from data.tokenizer import Tokenizer
from folio import checkpoint, metrics, run_folder, samples
from folio.batch import get_batch
from folio.checkpoint import Checkpoint
from folio.samples import Sample
from model import GPT, GPTConfig, LanguageModel

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
CONTEXT = 512  # longest context of the passage and of the confusions, in tokens
N_LIKELIEST = 5  # tokens that are named as the likeliest
CONFUSION_TOKENS, N_CONFUSIONS = 2**15, 15  # tokens that are predicted; mistakes that are listed
BATCH_LOGITS = 2**25  # float32 logits at a time
ATTENTION_TOKENS, ATTENTION_BYTES = 32, 600_000  # longest sentence; the weights of all heads
CURVE_POINTS, SMOOTHED_SHARE = 800, 1 / 25  # of a curve; of its points that a mean covers
N_SAMPLES, SAMPLE_LENGTH = 12, 2000  # samples of a run; characters of a sample
N_COLORS = 6  # of runs, in report.html
LABEL_HEIGHT = 6.0  # percent of the chart
KEPT = "\n\t\u200c\u200d"  # the joiners are parts of words and of emoji

Points = list[tuple[int, float]]  # (updates, loss)


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
    if isinstance(value, Exception):
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
        model=attempt(lambda: checkpoint.build_model(need(ckpt)).float()),
        tok=attempt(lambda: checkpoint.load_tokenizer(need(ckpt))),
    )


def present(content: dict | list, path: Path) -> dict | list:
    """The content of a file; raises UserError if it is empty."""
    if not content:
        raise UserError(f"{path} {'has nothing to show' if path.exists() else 'is missing'}")
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


def read_options(record: dict | Exception, ckpt: Checkpoint | Exception) -> dict:
    """The options of a run: those in run.json, or else those in its checkpoint."""
    if isinstance(record, dict):
        return dict(record["options"].items())
    meta = need(ckpt).meta
    return {"model": meta["model"], **meta["model_config"], **meta["run_config"]}


def read_dataset(options: dict | Exception, ckpt: Checkpoint | Exception) -> Dataset:
    """The data set of a run; raises UserError if it is not the one that was trained on."""
    options = need(options)
    dataset = bins.load(bins.find(Path(options["data_dir"]), options["dataset"]))
    if isinstance(ckpt, Checkpoint) and dataset.fingerprint != ckpt.meta["dataset"]:
        raise UserError(f"{dataset.folder} is not the data set that {ckpt.path} was trained on")
    return dataset


# ---- text ---------------------------------------------------------------------------------------


def visible(text: str, kept: str = KEPT) -> str:
    """Text in which controls, surrogates and marks of direction are escapes, such as \\u202e."""

    def show(c: str) -> str:
        plain = c.isprintable() or c in kept or unicodedata.category(c) == "Zs"
        return c if plain else c.encode("unicode_escape").decode()

    return "".join(map(show, text))


def token_text(tok: Tokenizer, i: int) -> str:
    """The text of a token; escapes for bytes that are a part of a character."""
    known = i < tok.vocab_size
    return tok.decode_bytes([i]).decode(errors="backslashreplace") if known else ""


def token_name(tok: Tokenizer, i: int) -> str:
    """The text of a single token, with spaces visible; at most about 24 characters."""
    text = visible(token_text(tok, i), kept="").replace(" ", "\u2423") or f"id {i}"
    return text if len(text) <= 24 else f"{text[:22]}\u2026"


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


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
    if isinstance(run.model, LanguageModel):
        size = f", {run.model.n_params():,} parameters"
    if options["model"] != "gpt":
        return f"{escape(options['model'])} model{size}"
    n_layer, n_head, n_embd = (int(options[name]) for name in ("n_layer", "n_head", "n_embd"))
    return f"GPT of {n_layer} layers, {n_head} heads, width {n_embd}{size}"


def data_set(run: Source) -> str:
    name, vocabulary = escape(visible(need(run.options)["dataset"])), ""
    if isinstance(run.tok, Tokenizer):
        vocabulary = f" ({run.tok.kind} tokens, {run.tok.vocab_size:,} ids)"
    return f"data set {name}{vocabulary}"


def updates(run: Source) -> str:
    if isinstance(run.rows, list):
        return f"{int(run.rows[-1]['iter_num']):,} updates"
    return f"{need(run.ckpt).meta['progress']['iter_num']:,} updates"


def best_loss(run: Source) -> str:
    if isinstance(run.rows, list) and (val := points(run.rows, "val_loss")):
        iter_num, loss = lowest(val)
        bits = dict(points(run.rows, "val_bits_per_byte")).get(iter_num)
    else:
        loss = need(run.ckpt).meta["progress"]["best_val_loss"]
        bits = attempt(lambda: need(run.dataset).val.bits_per_byte(loss))
    per_byte = f" ({bits:.3f} bits per byte)" if isinstance(bits, float) else ""
    return f"best validation loss <b>{loss:.4f}</b> nats per token{per_byte}"


def duration(run: Source) -> str:
    names = ("train_seconds", "wall_seconds")
    last = run.rows[-1] if isinstance(run.rows, list) else need(run.ckpt).meta["progress"]
    train, wall = (metrics.format_seconds(float(last[name])) for name in names)
    return f"{train} of training, {wall} in all"


# ---- the loss -----------------------------------------------------------------------------------


@dataclass
class Curves:
    """The losses of a run in nats per token."""

    train: Points  # of single batches
    val: Points
    baselines: dict[str, float] | Exception


def points(rows: list[dict[str, str]], column: str) -> Points:
    """A column of metrics.csv by update, without what is not finite."""
    found = [(int(row["iter_num"]), float(row[column])) for row in rows if row[column]]
    return [(x, y) for x, y in found if math.isfinite(y)]


def lowest(curve: Points) -> tuple[int, float]:
    return min(curve, key=lambda point: point[1])


def read_curves(run: Source) -> Curves:
    rows = need(run.rows)
    train, val = points(rows, "loss"), points(rows, "val_loss")
    if not train and not val:
        raise UserError(f"{run.folder / 'metrics.csv'} has no loss")
    return Curves(train, val, attempt(baselines, run))


def baselines(run: Source) -> dict[str, float]:
    data = need(run.dataset)
    bigram = bins.bigram_loss(data.train.tokens, data.val.tokens, data.vocab_size)
    return {"bigram": bigram, "uniform": math.log(data.vocab_size)}


def smoothed(curve: Points) -> Points:
    """The moving average of a curve: exponential weights, over SMOOTHED_SHARE of its points."""
    kept, weight, mean, result = 1 - 1 / max(1, len(curve) * SMOOTHED_SHARE), 0.0, 0.0, []
    for x, y in curve:
        weight = kept * weight + 1
        mean += (y - mean) / weight
        result.append((x, mean))
    return result


def thinned(curve: Points) -> Points:
    """At most about CURVE_POINTS of a curve, with the last."""
    return curve[: -1 : math.ceil(len(curve) / CURVE_POINTS)] + curve[-1:]


def loss_chart(names: list[str], found: list[Curves | Exception]) -> str:
    """All runs in one chart, with what is missing of them."""
    notes = [curves for curves in found if is_error(curves)]
    drawn = {i: curves for i, curves in enumerate(found) if not is_error(curves)}
    notes += [curves.baselines for curves in drawn.values() if is_error(curves.baselines)]
    known = [c.baselines.items() for c in drawn.values() if not is_error(c.baselines)]
    lines = sorted({(kind, round(loss, 2)) for items in known for kind, loss in items})
    return (_chart(names, drawn, lines) if drawn else "") + "".join(map(missing, notes))


def _chart(names: list[str], drawn: dict[int, Curves], lines: list[tuple[str, float]]) -> str:
    """An SVG without text, stretched to the width of the page, and HTML labels on top of it."""
    curves = [curve for c in drawn.values() for curve in (c.train, c.val)]
    values = [y for curve in curves for _, y in curve] + [loss for _, loss in lines]
    right = max(x for curve in curves for x, _ in curve) or 1
    top = max(values)
    if lines:  # a loss that diverges would flatten the rest
        top = min(top, 1.3 * max(loss for _, loss in lines))
    bottom = min(values) - 0.05 * (top - min(values) or 1)
    top += 0.05 * (top - bottom)

    def at(x: float, y: float) -> tuple[float, float]:  # in percent, from the top left
        return 100 * x / right, 100 * (top - y) / (top - bottom)

    def path(curve: Points, style: str) -> str:
        corners = " ".join("{:.2f},{:.2f}".format(*at(x, y)) for x, y in thinned(curve))
        return f'<polyline class="{style}" points="{corners}"/>'

    shapes, labels, legend = [], [], []
    for y in ticks(bottom, top):
        shapes.append(path([(0, y), (right, y)], "grid"))
        legend_top = at(0, y)[1]
        labels.append(f'<span class="y" style="top:{legend_top:.2f}%">{y:g}</span>')
    for x in ticks(0, right):
        labels.append(f'<span class="x" style="left:{at(x, 0)[0]:.2f}%">{x:,.0f}</span>')
    texts = []  # (percent from the top, from the left, style, text)
    for kind, loss in lines:
        shapes.append(path([(0, loss), (right, loss)], "baseline"))
        texts.append((at(0, loss)[1], 100.0, "", f"{kind} {loss:.2f}"))
    for i, run in drawn.items():
        train, val = (i, i) if len(names) > 1 else (0, 1)
        train, val = f"c{train % N_COLORS}", f"c{val % N_COLORS}"
        shapes.append(path(run.train, f"batch {train}"))
        shapes.append(path(smoothed(run.train), f"smooth {train}"))
        shapes.append(path(run.val, f"val {val}"))
        dots = [f"M{x:.2f},{y:.2f}h0" for x, y in (at(*point) for point in thinned(run.val))]
        shapes.append(f'<path class="dots {val}" d="{"".join(dots)}"/>')
        best = ""
        if run.val:
            x, y = at(*lowest(run.val))
            shapes.append(f'<path class="best {val}" d="M{x:.2f},{y:.2f}h0"/>')
            best = "best {1:.4f} at update {0:,}".format(*lowest(run.val))
            texts.append((y + LABEL_HEIGHT, x, val, f"best {lowest(run.val)[1]:.4f}"))
        if len(names) > 1:
            legend.append(
                f'<span class="{val}">{escape(names[i])}: {best or "not evaluated"}</span>'
            )
        else:
            legend.append(f'<span class="{train}">training loss of single batches, smoothed</span>')
            legend.append(f'<span class="{val}">validation loss: {best or "not evaluated"}</span>')
    for y, x, style, text in spread(texts):
        side = f"right:{100 - x:.2f}%" if x > 50 else f"left:{x:.2f}%"
        labels.append(f'<span class="text {style}" style="top:{y:.2f}%;{side}">{text}</span>')
    return (
        f'<div class="chart"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="losses by update">{"".join(shapes)}</svg>{"".join(labels)}</div>'
        f'<p class="axis">updates</p><p class="legend">{"".join(legend)}</p>'
    )


def spread(texts: list[tuple]) -> list[tuple]:
    """Labels, (percent from the top, ...), moved so that none covers another."""
    result, limit = [], 100.0
    for y, *rest in sorted(texts, reverse=True):
        limit = min(y, limit)
        result.append((limit, *rest))
        limit -= LABEL_HEIGHT
    return result


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in an interval: about five, multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 6)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ---- what the model does ------------------------------------------------------------------------


def samples_section(run: Source, _: dict) -> str:
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


def first_window(model: LanguageModel, split: Split) -> tuple[Tensor, Tensor]:
    """idx and targets (1, T) at the start of a split, T at most CONTEXT."""
    T = min(model.config.block_size, CONTEXT, len(split.tokens) - 1)
    return get_batch(split, np.zeros(1, np.int64), T, "cpu")


@torch.inference_mode()
def surprise_section(run: Source, data: dict) -> str:
    model, tok, dataset = need(run.model), need(run.tok), need(run.dataset)
    idx, targets = first_window(model, dataset.val)
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
    spans = [_passage_token(tok, int(idx[0, 0]), '<i class="faint">')]
    for i, s in zip(targets[0].tolist(), surprise.tolist(), strict=True):
        spans.append(_passage_token(tok, i, f'<i style="--a:{min(1, s / blind):.2f}">'))
    return (
        f"<p>By {_state(run)}. Mean surprise: <b>{surprise.mean():.4f}</b> nats per token.</p>"
        f'<p class="scale"><span>0: it was certain</span><span class="bar hot"></span>'
        f"<span>{blind:.2f}: a blind guess among {tok.vocab_size:,} tokens</span></p>"
        f'<p class="passage" dir="auto">{"".join(spans)}</p>'
    )


def _passage_token(tok: Tokenizer, i: int, tag: str) -> str:
    text = visible(token_text(tok, i)) or token_name(tok, i)
    return f"{tag}{escape(text).replace(chr(10), chr(0x21B5) + chr(10))}</i>"


def _state(run: Source) -> str:
    ckpt = need(run.ckpt)
    return f"{code(ckpt.path.name)}, update {ckpt.meta['progress'].get('iter_num', 0):,}"


@torch.inference_mode()
def attention_section(run: Source, data: dict) -> str:
    model, tok, dataset = need(run.model), need(run.tok), need(run.dataset)
    if not isinstance(model, GPT):
        return "<p>A bigram model has no attention: it sees only the last token.</p>"
    idx, _ = first_window(model, dataset.val)
    most = ATTENTION_BYTES // run.n_runs * 3 // 4  # bytes before base64
    n_maps, T = model.config.n_layer * model.config.n_head, min(ATTENTION_TOKENS, idx.shape[1])
    while T > 1 and n_maps * T * (T + 1) // 2 > most:
        T -= 1
    data["sentence"] = [token_name(tok, i) for i in idx[0, :T].tolist()]
    data["heads"], rows = [], []
    rows_of, columns_of = np.tril_indices(T)
    for layer, weights in enumerate(attention_weights(model, idx[:, :T]), 1):
        lower = (weights[0].numpy()[:, rows_of, columns_of] * 255).round().astype(np.uint8)
        data["heads"] += [base64.b64encode(head.tobytes()).decode() for head in lower]
        cells = [
            f'<figure><canvas data-name="layer {layer}, head {head}"></canvas>'
            f"<figcaption>{habit(w)}</figcaption></figure>"
            for head, w in enumerate(weights[0], 1)
        ]
        rows.append(f'<div class="layer"><b>layer {layer}</b>{"".join(cells)}</div>')
    sentence = "".join(f"<i>{escape(name)}</i>" for name in data["sentence"])
    return (
        f'<p class="sentence">{sentence}</p><p class="scale"><span>0</span>'
        '<span class="bar cool"></span><span>1: all of its weight</span></p>'
        "<noscript><p>The maps need JavaScript.</p></noscript>"
        f'<div class="heads">{"".join(rows)}</div>'
    )


def attention_weights(model: GPT, idx: Tensor) -> list[Tensor]:
    """The weights (B, n_head, T, T) of each layer: what each token's row gives to which token."""
    inputs = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda attn, args: inputs.append((attn, *args[:2])))
        for block in model.h
    ]
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for attn, x, rope in inputs:
        q, k, _ = attn.queries_keys_values(x, rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        result.append(scores.masked_fill(later, -math.inf).softmax(-1))
    return result


def habit(weights: Tensor) -> str:
    """Where a head looks most, on average over the tokens after the second; weights (T, T)."""
    places = {"itself": 0, "the token before": 1}
    means = {name: weights.diagonal(-n)[2 - n :].mean().item() for name, n in places.items()}
    means["the first token"] = weights[2:, 0].mean().item()
    name = max(means, key=means.get)
    return f"{name}: {means[name]:.0%}" if means[name] >= 0.3 else "spread out"


@torch.inference_mode()
def confusions_section(run: Source, _: dict) -> str:
    model, tok, dataset = need(run.model), need(run.tok), need(run.dataset)
    true, predicted = predictions(model, dataset.val)
    wrong = true != predicted
    pairs, counts = np.unique(np.stack((true[wrong], predicted[wrong])), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:N_CONFUSIONS]
    n, n_wrong, most = len(true), int(wrong.sum()), np.bincount(true)
    rows = [
        [
            *(code(token_name(tok, i)) for i in pairs[:, j].tolist()),
            f"{counts[j]:,}",
            f'<span class="meter" style="--a:{counts[j] / counts[order[0]]:.2f}"></span>'
            f"{counts[j] / n_wrong:.1%}",
        ]
        for j in order
    ]
    accuracy = (
        f"<p>Over {n:,} tokens of the validation text, {_state(run)} is right about "
        f"<b>{1 - n_wrong / n:.1%}</b>. Always predicting {code(token_name(tok, most.argmax()))} "
        f"would be right about {most.max() / n:.1%}.</p>"
    )
    return accuracy + (table(rows, ["the token", "it predicted", "times", "of all mistakes"]))


def predictions(model: LanguageModel, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The ids of up to CONFUSION_TOKENS tokens of a split, and the likeliest ones; each (N,)."""
    T = min(model.config.block_size, CONTEXT)
    starts = bins.eval_windows(len(split.tokens), T, CONFUSION_TOKENS)
    size, found = max(1, BATCH_LOGITS // (T * model.config.vocab_size)), []
    for first in range(0, len(starts), size):
        idx, targets = get_batch(split, starts[first : first + size], T, "cpu")
        pairs = torch.stack((targets, model(idx)[0].argmax(-1)))  # (2, B, T)
        found.append(pairs[:, targets != bins.IGNORED])
    true, predicted = torch.cat(found, dim=1)[:, :CONFUSION_TOKENS].numpy()
    return true, predicted


# ---- how it was made ----------------------------------------------------------------------------


def made_section(run: Source, _: dict) -> str:
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
    options, defaults = need(run.options), train_defaults()
    changed = {k: v for k, v in options.items() if k not in defaults or defaults[k] != v}
    rest = {k: v for k, v in options.items() if k not in changed}
    parts.append(
        f"<details><summary>All {len(options)} options</summary>"
        f"<p>{len(changed)} differ from the defaults:</p>{cell(changed)}"
        f"<p>The others:</p>{cell(rest)}</details>"
    )
    return "".join(parts)


def cell(value: object) -> str:
    """A value of run.json as HTML: a table, a command, a list, or text."""
    if isinstance(value, dict):
        return table([[escape(visible(name)), cell(item)] for name, item in value.items()])
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return code(visible(shlex.join(value)))
    if isinstance(value, list):
        return "".join(map(cell, value))
    return code(visible(str(value)))


def train_defaults() -> dict[str, object]:
    """The defaults of train.py's options, from its source, because no file imports a script."""
    tree = ast.parse(TRAIN.read_text("utf-8"))
    (cls,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainConfig")
    declared = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
    own = {node.target.id: eval(ast.unparse(node.value), {}) for node in declared}
    return {f.name: f.default for f in fields(GPTConfig)} | own


# ---- the file -----------------------------------------------------------------------------------

SECTIONS = (  # title, what one sees and what to look for, the part of a run
    (
        "It learns",
        "The same prompt (faint), continued by the model as it was after so many updates. Look for "
        "what comes first: common characters, then words, then punctuation, and at last sentences "
        "that hold together.",
        samples_section,
    ),
    (
        "Where it is surprised",
        "The start of the validation text, which it was not trained on. The stronger a token's "
        "color, the less it was expected: its surprise is -ln of the probability that the model "
        "gave to it. Point at a token (or tap it, or use the arrow keys) to see what was expected "
        "instead. Look for the first letters of words and names, which are hard, and their ends.",
        surprise_section,
    ),
    (
        "Where it looks",
        "Attention: each map is one head, a row of it is one token of the sentence below, and the "
        "row's cells show how the head spreads its weight over that token and those before it. "
        "Point at a map to read a row. Look for diagonals (it looks at the token before) and for "
        "columns (one token that all look at); below each map is where its weight goes on average.",
        attention_section,
    ),
    (
        "What it confuses",
        "The model's likeliest token where it is wrong, most frequent pairs first. Look for the "
        "default that it falls back to, and for pairs that look or sound alike.",
        confusions_section,
    ),
    (
        "How it was made",
        "What is needed to repeat the run, and how long it took.",
        made_section,
    ),
)
LOSS = (
    "The loss is the mean surprise per token in nats; lower is better. The validation text is not "
    "trained on: where its loss rises while that of training falls, the model overfits. Dashed: a "
    "blind guess among all tokens (uniform), and a table of how often each token follows another "
    "(bigram). What is gained below that line comes from more than one token of context."
)


def write(folders: list[Path], output: Path) -> None:
    """Write the report of the runs in `folders` to `output`, atomically.

    Raises UserError if a folder has nothing of a run.
    """
    names = [visible(str(folder)) for folder in folders]
    heads, curves, parts, data = [], [], [[] for _ in SECTIONS], []
    for folder in folders:
        run = read(folder, len(folders))
        data.append({})
        heads.append(heading(run))
        curves.append(attempt(read_curves, run))
        for column, (_, _, section) in zip(parts, SECTIONS, strict=True):
            part = attempt(section, run, data[-1])
            column.append(missing(part) if is_error(part) else part)
    body = [_columns(names, heads, "h1"), f"<section><h2>Loss</h2><p>{LOSS}</p>"]
    body.append(f"{loss_chart(names, curves)}</section>")
    for column, (title, explanation, _) in zip(parts, SECTIONS, strict=True):
        columns = _columns(names, column, "h3" if len(names) > 1 else "")
        body.append(f"<section><h2>{title}</h2><p>{explanation}</p>{columns}</section>")
    contents = {
        "title": escape(", ".join(names)),
        "body": "\n".join(body),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_suffix(".html").read_text("utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: contents[match[1]], template)
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.write_bytes(page.encode())
        os.replace(temporary, output)
    except OSError as error:
        error.filename = str(output)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def missing(error: Exception) -> str:
    """The line in place of a part that cannot be shown."""
    kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
    return f'<p class="missing">Not shown: {escape(visible(f"{kind}{error}"))}</p>'


def _columns(names: list[str], parts: list[str], title: str) -> str:
    """A part of each run, side by side, under the run's name."""
    columns = []
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        style = f' class="c{i % N_COLORS}"' if len(names) > 1 else ""
        head = f"<{title}{style}>{escape(name)}</{title}>" if title else ""
        columns.append(f'<div class="run" data-run="{i}">{head}{part}</div>')
    return f'<div class="runs">{"".join(columns)}</div>'
