"""Promise: a report shows what a run's files say, escaped, in one file that needs no network.

What is missing or damaged is named, and the rest is still shown.
"""

import base64
import hashlib
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_page  # noqa: F401
from conftest import MODERN, SMALL

import runs
from data import bins
from data.tokenizer import CharTokenizer
from folio import checkpoint, inspection, report, samples
from folio.checkpoint import build_model
from folio.samples import Sample
from model import attention

HOSTILE = (  # the start of a validation text
    "x <!-- </script><script>document.title='x'</script> <img src=x "
    "onerror=\"document.title='x'\"> "
    'it\'s "quoted" & {{data}}\x07\u202eabc\u202c\r naïve café 日本語 \u05e9\u05dc\u05d5\n'
)
HEADINGS = ("The loss", "It learns", "surprises", "attention heads", "confuses", "How it was made")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, text) -> Path:
    """A folder with three runs: modern (grouped heads), bigram, and bpe, whose text is hostile."""
    import prepare
    import train

    folder = tmp_path_factory.mktemp("runs")
    texts = {"train.txt": text + " <!--" * 500, "val.txt": HOSTILE + text[:2000]}
    for name, words in texts.items():  # " <!--" becomes a token
        (folder / name).write_bytes(words.encode())
    argv = [f"--input={folder}/train.txt", f"--val_input={folder}/val.txt", f"--data_dir={folder}"]
    assert prepare.main([*argv, "--name=text", "--tokenizer=bpe", "--vocab_size=300"]) == 0
    more_ids = ["--dataset=text", "--block_size=128", "--vocab_size=384"]  # than the tokenizer has
    for name, where, options in (
        ("modern", data_dir, MODERN),
        ("bigram", data_dir, ["--model=bigram"]),
        ("bpe", folder, more_ids),
    ):
        out_dir = folder / name
        argv = [f"--data_dir={where}", f"--out_dir={out_dir}", "--dropout=0", *options]
        assert train.main([*SMALL, *argv]) == 0
        (out_dir / samples.FILE).unlink(missing_ok=True)
        for iter_num, loss in ((10, 3.25), (20, 2.5)):
            continuation = f'said {iter_num}:\n "&" \x1b'
            samples.append(out_dir, Sample(iter_num, loss, "If <b>", continuation))
    return folder


@pytest.fixture
def run(trained, tmp_path, request) -> Path:
    """A copy of one of the runs, "modern" unless the test names another."""
    return shutil.copytree(trained / getattr(request, "param", "modern"), tmp_path / "run")


def page_of(*folders: Path) -> str:
    """The report of these runs, at its usual place."""
    assert runs.main(["report", *map(str, folders)]) == 0
    return (folders[0] / "report.html").read_text("utf-8")


def section(page: str, heading: str) -> str:
    (found,) = re.findall(rf"<h2>[^<]*{heading}.*?</section>", page, re.DOTALL)
    return found


def data_of(page: str) -> list[dict]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(found)


def opened(run: Path) -> tuple:
    """The run's best model and its validation split."""
    ckpt = checkpoint.load(run / "best.safetensors")
    options = ckpt.meta["run_config"]
    dataset = bins.load(bins.find(Path(options["data_dir"]), options["dataset"]))
    return build_model(ckpt), dataset.val


# ---- what is shown ------------------------------------------------------------------------------


def test_a_report_is_one_small_file_that_loads_nothing(run):
    page = page_of(run)
    assert len(page.encode()) < 2_000_000
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    assert policy in page, "no other script may run"
    assert not re.search(r"https?://|<link|<img|\bsrc=|@import|url\(", page)
    assert all(heading in page for heading in HEADINGS) and "{{" not in page
    assert not list(run.glob(".*partial"))


def test_the_heading_and_the_loss_are_those_of_metrics_csv(run):
    page = page_of(run)
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("val_loss")
    best = min(float(row[column]) for row in rows[1:] if row[column])
    assert f"best validation loss <b>{best:.4f}</b> nats per token" in page
    assert "20 updates" in page and "GPT of 2 layers, 2 heads, width 32" in page
    chart, (_, val) = section(page, "The loss"), opened(run)
    train_tokens = np.fromfile(val.path.with_name("train.bin"), val.tokens.dtype)
    bigram = bins.bigram_loss(train_tokens, val.tokens, val.vocab_size)
    assert f"best {best:.4f}<" in chart and f"bigram {bigram:.2f}<" in chart
    assert f"uniform {math.log(val.vocab_size):.2f}<" in chart
    assert chart.count("<polyline") >= 5 and "NaN" not in chart


def test_samples_are_shown_in_order_with_their_lines(run):
    shown = section(page_of(run), "It learns")
    for iter_num, loss in ((10, "3.250"), (20, "2.500")):
        assert f"update {iter_num} · validation loss {loss}" in shown
        prompt = '<span class="faint">If &lt;b&gt;</span>'
        assert f"{prompt}said {iter_num}:\n &quot;&amp;&quot; \\x1b</pre>" in shown
    assert shown.index("said 10") < shown.index("said 20")


@pytest.mark.parametrize("run", ["modern", "bigram", "bpe"], indirect=True)
def test_the_mean_surprise_is_the_models_loss_on_the_passage(run):
    page, (model, val) = page_of(run), opened(run)
    ids = torch.from_numpy(val.tokens[: min(model.config.block_size, 512) + 1].astype(np.int64))
    with torch.no_grad():
        loss = model(ids[None, :-1], ids[None, 1:])[1].item()
    (shown,) = re.findall(r"Mean surprise: <b>([\d.]+)</b>", section(page, "surprises"))
    assert abs(float(shown) - loss) < 1e-3
    (run_data,) = data_of(page)
    assert abs(np.mean(run_data["surprise"]) - loss) < 1e-3
    with torch.no_grad():
        probs = model(ids[None, :-1])[0][0].softmax(-1)
    for row, likeliest in zip(probs, run_data["likeliest"], strict=True):
        wanted = row.sort(descending=True).values[:5].numpy()
        np.testing.assert_allclose([p for _, p in likeliest], wanted, rtol=6e-3)


@pytest.mark.parametrize("run", ["modern", "bpe"], indirect=True)
def test_attention_weights_are_those_that_the_model_uses(run):
    model, val = opened(run)
    idx, outputs, inputs = torch.from_numpy(val.tokens[None, :12].astype(np.int64)), [], []
    for block in model.h:
        block.attn.register_forward_hook(lambda m, args, out: outputs.append(out))
        block.attn.register_forward_pre_hook(lambda m, args: inputs.append(args))
    with torch.no_grad():
        layers = inspection.attention_weights(model, idx)
        for block, (x, rope, *_), w, out in zip(model.h, inputs, layers, outputs, strict=True):
            q, k, v = block.attn.queries_keys_values(x, rope)
            assert w.shape == (1, 2, 12, 12)
            y = w @ v.repeat_interleave(2 // v.shape[1], dim=1)
            torch.testing.assert_close(y, attention(q, k, v), atol=1e-5, rtol=1e-4)
            y = block.attn.c_proj(y.transpose(1, 2).reshape(x.shape))
            torch.testing.assert_close(y, out, atol=1e-5, rtol=1e-4)
    (run_data,) = data_of(page_of(run))
    n = len(run_data["sentence"])
    assert n == min(model.config.block_size, 32) and len(run_data["heads"]) == 2 * 2
    with torch.no_grad():
        idx = torch.from_numpy(val.tokens[None, :n].astype(np.int64))
        weights = inspection.attention_weights(model, idx)[1][0, 1].numpy()
    stored = np.frombuffer(base64.b64decode(run_data["heads"][3]), np.uint8) / 255
    np.testing.assert_allclose(stored, weights[np.tril_indices(n)], atol=0.5 / 255 + 1e-6)


def test_many_heads_make_the_sentence_shorter(run, monkeypatch):
    monkeypatch.setattr(report, "ATTENTION_BYTES", 200)
    (run_data,) = data_of(page_of(run))
    assert len(run_data["sentence"]) == 8  # 4 heads x 36 weights x 4 / 3 < 200
    assert sum(map(len, run_data["heads"])) <= 200


@pytest.mark.parametrize("run", ["bpe"], indirect=True)
def test_confusions_are_counted_over_the_validation_text(run):
    shown, (model, val) = section(page_of(run), "confuses"), opened(run)
    ids, pairs, n = val.tokens.astype(np.int64), {}, 0
    T = model.config.block_size
    assert (len(ids) - 1) % T  # the last window reaches beyond the end
    for start in range(0, len(ids) - 1, T):
        window = torch.from_numpy(ids[start : start + T + 1])
        with torch.no_grad():
            predicted = model(window[None, :-1])[0][0].argmax(-1)
        for pair in zip(window[1:].tolist(), predicted.tolist(), strict=True):
            pairs[pair] = pairs.get(pair, 0) + 1
            n += 1
    wrong = sorted((count for (a, b), count in pairs.items() if a != b), reverse=True)
    assert n == len(ids) - 1 < report.CONFUSION_TOKENS
    assert f"Over {n:,} tokens" in shown and f"<b>{1 - sum(wrong) / n:.1%}</b>" in shown
    rows = re.findall(r"<td>([\d,]+)</td><td><span[^>]*></span>([\d.]+%)", shown)
    assert rows == [(f"{count:,}", f"{count / sum(wrong):.1%}") for count in wrong[:15]]


def test_the_record_is_shown_as_it_is(run):
    record = json.loads((run / "run.json").read_text())
    record |= {
        "command": ["train.py", "config/a b.py", "--x=<i>"],
        "software": {"torch": "2.13.0"},
        "started": "2026-01-02T03:04:05",
        "before": [{"until": 10, "options": {"learning_rate": 0.125}}],
        "later": {"deep": {"key": None}},
    }
    (run / "run.json").write_text(json.dumps(record))
    shown = section(page_of(run), "How it was made")
    for wanted in (
        "<span>train.py</span> <span>&#x27;config/a b.py&#x27;</span> <span>&#x27;--x=&lt;i&gt;",
        "<td>torch</td><td><code>2.13.0</code>",
        "<code>2026-01-02T03:04:05</code>",
        "<td>learning_rate</td><td><code>0.125</code>",
        "<td>key</td><td><code>None</code>",
        "tokens per second",
    ):
        assert wanted in shown, wanted
    assert "launch" not in shown  # it is empty
    _, options = shown.split("<details>")
    assert "<td>n_kv_head</td><td><code>1</code>" in options
    assert "<td>eval_tokens</td><td><code>1048576</code>" in options


def test_a_model_that_is_not_finite_is_named(run):
    ckpt = checkpoint.load(run / "best.safetensors")
    ckpt.tensors["model.wte.weight"][:] = torch.nan
    checkpoint.save(run / "best.safetensors", ckpt.tensors, ckpt.meta)
    page = page_of(run)
    for heading in ("What surprises it", "What its attention heads look at", "What it confuses"):
        assert "best.safetensors has weights that are not finite" in section(page, heading)


def test_absurd_numbers_are_left_out(run):
    before = section(page_of(run), "The loss")
    with open(run / "metrics.csv", "a") as file:
        file.write(f"{10**400},{10**400},,1e308,,,,,,,1,1\n")
        file.write("40,640,,,,inf,-1e308,,,,1,1\n")
    assert runs.main(["plot", str(run), f"--output={run / 'plot.svg'}"]) == 0
    assert section(page_of(run), "The loss") == before


# ---- several runs, other models -----------------------------------------------------------------


def test_several_runs_are_side_by_side(trained, tmp_path):
    folders = [trained / name for name in ("modern", "bigram", "bpe")]
    output = tmp_path / "all.html"
    assert runs.main(["report", *map(str, folders), f"--output={output}"]) == 0
    page = output.read_text("utf-8")
    for heading in HEADINGS[1:]:
        parts = re.split(r'<div class="run" data-run="\d">', section(page, heading))[1:]
        assert all(str(folder) in part for folder, part in zip(folders, parts, strict=True))
    chart = section(page, "The loss")
    assert chart.count(">best ") == chart.count(", best ") == 3 and all(
        str(folder) in chart for folder in folders
    )
    assert chart.count(">uniform ") == 2  # that of two data sets
    assert "A bigram model has no attention" in section(page, "attention heads")
    assert [("heads" in run_data) for run_data in data_of(page)] == [True, False, True]


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found |= {tag, *(name for name, _ in attrs)}


@pytest.mark.parametrize("run", ["bpe"], indirect=True)
def test_text_of_the_data_set_cannot_become_markup(run):
    hostile = run.rename(run.with_name("<img src=x> &amp; {{data}}"))
    record = json.loads((hostile / "run.json").read_text())
    record["<img>"] = {"</script><img>": "<img>"}
    (hostile / "run.json").write_text(json.dumps(record))
    samples.append(hostile, Sample(30, 2.0, "</pre><img>", "\udc80\u202e{{title}}"))
    page = page_of(hostile)
    assert not {"img", "onerror", "src"} & Tags(page).found
    assert page.count("<script") == page.count("</script>") == 2
    passage = section(page, "surprises")
    assert "{{data}}</h1>" in page and "> &lt;!--</i>" in passage
    assert "<" not in page.split('id="data">')[1].split("</script>")[0]
    assert "\\x07" in passage and "\u202e" not in page and "\x07" not in page
    assert "{{data}}" in re.sub("<[^>]*>", "", passage)
    shown = "".join(data_of(page)[0]["tokens"])
    assert "\u2423" in shown and " " not in shown
    assert "\\xe6\\x97\\xa5" in shown  # the bytes of a character that is no token


def test_every_token_has_a_visible_name():
    tok = CharTokenizer("a \n\t\u00a0\u200d\u202e\u05e9\U0001f600")
    names = [inspection.token_name(tok, i) for i in tok.encode(tok.characters).tolist()]
    wanted = ["a", "\u2423", "\\n", "\\t", "\\xa0", "\\u200d", "\\u202e", "\u05e9", "\U0001f600"]
    assert names == wanted
    assert inspection.token_name(tok, 99) == "id 99"  # a model may have more ids
    assert inspection.visible("a\u202e \u200d\n\ud800") == "a\\u202e \u200d\n\\ud800"


# ---- what is missing or damaged -----------------------------------------------------------------

LACKS = {  # file: the sections that say so, and what they say
    "run.json": {"How it was made": "run.json"},
    "metrics.csv": {"The loss": "metrics.csv", "How it was made": "metrics.csv"},
    "samples.txt": {"It learns": "samples.txt"},
    "*.safetensors": {
        "surprises": "best.safetensors",
        "attention heads": "best.safetensors",
        "confuses": "best.safetensors",
        "How it was made": "best.safetensors",
    },
}


@pytest.mark.parametrize("damage", ["missing", "damaged"])
@pytest.mark.parametrize("name", LACKS)
def test_a_section_says_what_is_missing_and_the_others_stay(run, name, damage):
    for path in run.glob(name):
        content = path.read_bytes()
        path.unlink()
        if damage == "damaged":
            path.write_bytes(b"\xff\x00[" + content[: len(content) // 2][::-1])
    page = page_of(run)
    for heading in HEADINGS:
        notes = re.findall(r'<p class="missing">(.*?)</p>', section(page, heading))
        wanted = [LACKS[name][heading]] if heading in LACKS[name] else []
        assert len(notes) == len(wanted), (heading, notes)
        for file, note in zip(wanted, notes, strict=True):
            assert file in note or file.replace("best", "ckpt") in note
    assert "Mean surprise" in page or name == "*.safetensors"
    assert "validation loss <b>" in page and "2 layers" in page


def test_the_latest_state_is_shown_if_the_best_is_damaged(run):
    (run / "best.safetensors").unlink()
    assert page_of(run).count("<code>ckpt.safetensors</code>") == 2


def test_another_data_set_than_the_one_trained_on_is_not_shown(run, trained):
    record = json.loads((run / "run.json").read_text())
    for change, problem in (
        ({"data_dir": str(trained), "dataset": "text"}, "is not the data set that"),
        ({"data_dir": str(trained), "dataset": "gone"}, "is missing"),
        ({"data_dir": 3}, "TypeError"),
    ):
        changed = {**record, "options": {**record["options"], **change}}
        (run / "run.json").write_text(json.dumps(changed))
        page = page_of(run)
        for heading in ("The loss", "surprises", "attention heads", "confuses"):
            (note,) = re.findall(r'<p class="missing">(.*?)</p>', section(page, heading))
            assert problem in note
        assert "<polyline" in page and "said 20" in page and "Mean surprise" not in page


def test_a_folder_without_a_run_is_an_error(tmp_path, capsys, run):
    assert runs.main(["report", str(run), str(tmp_path / "none")]) == 2
    assert "none is not a run's folder" in capsys.readouterr().err
    assert not (run / "report.html").exists()
    assert runs.main(["report"]) == 2


def test_an_older_report_stays_until_the_new_one_is_complete(run, monkeypatch, capsys):
    page_of(run)
    (run / "report.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert runs.main(["report", str(run)]) == 1
    assert "report.html" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "old" and not list(run.glob(".*partial"))


def test_a_long_run_makes_no_large_file(run):
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    with open(run / "metrics.csv", "w") as file:
        print(header, file=file)
        for i in range(1, 20_000):
            losses = {"loss": f"{5 + math.sin(i):.4f}", "val_loss": f"{2 + 1 / i:.7f}"}
            print(*(cells | {"iter_num": i} | losses).values(), sep=",", file=file)
        print(*(cells | {"iter_num": 20_000, "loss": "nan"}).values(), sep=",", file=file)
    for i in range(100):
        samples.append(run, Sample(100 + i, 2.0, "If", "x" * 20_000))
    page = page_of(run)
    assert len(page) < 150_000 and "nan" not in section(page, "The loss")
    shown = section(page, "It learns")
    assert "12 of 102" in shown and "update 10 " in shown and "update 199 " in shown


# ---- in a browser -------------------------------------------------------------------------------


def test_hovering_shows_the_likeliest_tokens_and_the_weights(run, open_page):  # noqa: F811
    (run_data,) = data_of(page_of(run))
    page = open_page(f"file://{run / 'report.html'}")
    tip, token = page.locator("#tip"), page.locator(".passage i[style]").nth(7)
    assert not tip.is_visible()
    token.hover()
    assert tip.is_visible() and f"surprise {run_data['surprise'][7]:.2f} nats" in tip.inner_text()
    likeliest = page.locator("#tip td:first-child").all_inner_texts()
    assert likeliest == [name for name, _ in run_data["likeliest"][7]] and len(likeliest) == 5
    page.mouse.move(1, 1)
    assert not tip.is_visible()
    page.locator(".passage i[style]").first.focus()
    page.keyboard.press("ArrowRight")
    assert tip.is_visible() and f"surprise {run_data['surprise'][1]:.2f} nats" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    canvas = page.locator("canvas").nth(3)
    size = canvas.bounding_box()["width"] / len(run_data["sentence"])
    canvas.hover(position={"x": 1.5 * size, "y": 2.5 * size})
    weight = page.evaluate("document.querySelectorAll('canvas')[3].weight(2, 1)")
    stored = np.frombuffer(base64.b64decode(run_data["heads"][3]), np.uint8)
    assert weight == stored[4] / 255  # rows of 1, 2, 3 weights
    names, text = run_data["sentence"], tip.inner_text()
    assert tip.is_visible() and "layer 2, head 2" in text
    assert f"weight {weight:.2f} from {names[2]} to {names[1]}" in text
    assert 0 < page.evaluate("scrollY") and 0 <= tip.bounding_box()["y"] < 720
    drawn = "c => c.getContext('2d').getImageData(1, 2, 1, 1).data[3] / 255"
    assert abs(canvas.evaluate(drawn) - math.sqrt(weight)) < 0.01
    assert page.errors == []


@pytest.mark.parametrize("names", [("bpe",), ("bpe", "modern")])
def test_the_page_fits_a_phone(trained, tmp_path, open_page, names):  # noqa: F811
    output = tmp_path / "report.html"
    assert runs.main(["report", *(str(trained / n) for n in names), f"--output={output}"]) == 0
    for scheme in ("light", "dark"):
        viewport = {"width": 400, "height": 800}
        page = open_page(f"file://{output}", viewport=viewport, color_scheme=scheme, has_touch=True)
        page.locator(".passage i[style]").nth(3).tap()
        tip = page.locator("#tip")
        assert tip.is_visible()
        page.locator("canvas").nth(1).tap(position={"x": 60, "y": 90})
        assert tip.is_visible() and "layer 1, head 2" in tip.inner_text()
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 393
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        more_heads = "for (let i = 0; i < 10; i++) l.append(l.lastElementChild.cloneNode(true))"
        page.evaluate(f"document.querySelectorAll('.layer').forEach(l => {{ {more_heads} }})")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert page.errors == [] and "<" not in page.title() and page.title() != "x"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
