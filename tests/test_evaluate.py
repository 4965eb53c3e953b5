"""Promise: evaluate.py's scores are those of EleutherAI's lm-evaluation-harness.

Small files whose scores were worked out by hand, and the harness itself as the oracle.
"""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_gpt2_vocabulary
from test_gpt2 import save_gpt2

import evaluate
from data import tokenizer
from folio import checkpoint, evaluation, hf_tokenizer
from model import Bigram, GPTConfig

CHARACTERS = "\n :AabE."


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def table(tmp_path) -> str:
    """A bigram model with these probabilities: after a space a: 1/2, b: 1/4; after anything else a
    space: 1/2, a: 1/4, b: 1/8. The other characters share the rest."""
    probabilities = np.full((8, 8), 1 / 40)
    probabilities[:, [1, 4, 5]] = 1 / 2, 1 / 4, 1 / 8
    probabilities[1] = 1 / 24
    probabilities[1, [4, 5]] = 1 / 2, 1 / 4
    assert np.allclose(probabilities.sum(1), [1] * 8)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8)
    model = Bigram(config)
    model.wte.weight.data = torch.tensor(probabilities).log().float()
    meta = {
        "run_id": "table",
        "model": "bigram",
        "model_config": vars(config),
        "run_config": {},
        "tokenizer": {"kind": "char", "characters": CHARACTERS},
        "dataset": "",
        "progress": {},
        "scaler": {},
        "threads": 1,
    }
    path = tmp_path / "table.safetensors"
    checkpoint.save(path, {"model.wte.weight": model.wte.weight}, meta)
    return str(path)


def evaluate_file(capsys, name: str, task: str, path: str, *argv: str) -> dict[str, float]:
    """The scores that evaluate.py prints."""
    argv = ["--checkpoint", name, "--task", task, "--input", path, "--device=cpu", *argv]
    assert evaluate.main(argv) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{task} of {name}: ")
    return {line.split()[0]: float(line.split()[1]) for line in lines}


# ---- by hand ------------------------------------------------------------------------------------


def test_hellaswag_by_hand(table, tmp_path, capsys):
    # In bits, the endings cost: " a" 2, " b" 3, " a a" 4, " aaa" 6; each per character without the
    # space before it: 2, 3, 4/3, 2. So " a" is the most likely and " a a" is that per character.
    endings = ["a", "b", "a a", "aaa"]
    record = {"activity_label": "A", "ctx_a": "a.", "ctx_b": "ea", "endings": endings}
    records = [{**record, "label": label} for label in (0, 0, "0", 2, 1)]
    path = write_lines(tmp_path / "h.jsonl", records)
    scores = evaluate_file(capsys, table, "hellaswag", path)
    assert scores == {"acc": 3 / 5, "acc_norm": 1 / 5}
    assert evaluate_file(capsys, table, "hellaswag", path, "--limit=2")["acc"] == 1


def test_lambada_by_hand(table, tmp_path, capsys):
    # " a" has the probability 1/2 * 1/2 and is what greedy sampling gives; " b" has 1/2 * 1/4,
    # also after the newline that stands for an empty context. Of two spaces the first, 1/2, belongs
    # to the word as well; the second has 1/24.
    texts = ("b a a", "a b", "a a", "b", "b  a")
    path = write_lines(tmp_path / "l.jsonl", [{"text": text} for text in texts])
    scores = evaluate_file(capsys, table, "lambada", path)
    bits = 2 + 3 + 2 + 3 + (1 + math.log2(24) + 1)
    assert scores == {"acc": 2 / 5, "perplexity": round(2 ** (bits / 5), 4)}


def test_bits_per_byte_by_hand(table, tmp_path, capsys):
    # after a newline, "a" costs 2 bits, " " 1, and "a" after a space 1; "b" after a newline 3
    path = write_lines(tmp_path / "b.jsonl", [{"text": "a a"}, {"text": ""}, {"text": "b"}])
    scores = evaluate_file(capsys, table, "bits_per_byte", path)
    assert scores == {"bits_per_byte": (2 + 1 + 1 + 3) / 4}


def test_wikihows_marks_are_removed():
    record = {
        "activity_label": " Baking",
        "ctx_a": "[header] Mix [title] stir",
        "ctx_b": "THE dough",
    }
    record |= {"endings": [" Rise. [step] Bake.", "x"], "label": "1"}
    question = evaluation.hellaswag_question(record)
    assert question == ("Baking: Mix. stir The dough", ["Rise. Bake.", "x"], 1)


# ---- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_context, n", [(1, 1), (1, 40), (5, 7), (50, 3), (50, 16), (50, 17), (3, 0)]
)
def test_every_token_is_rated_once_after_what_fits(n_context, n):
    context, continuation = list(range(n_context)), list(range(100, 100 + n))
    windows = list(evaluation._windows(context, continuation, block_size=16))
    rated = [window[-k:] for window, k in windows]
    assert sum(rated, []) == continuation
    whole = context + continuation
    for window, k in windows:
        assert 2 <= k + 1 <= len(window) <= 17
        end = whole.index(window[-1]) + 1
        assert window == whole[max(0, end - 17) : end]


# ---- what users may bring -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, line, says",
    [
        (
            "lambada",
            '{"txt": "a b"}',
            "bad.jsonl, line 2 is not a record of lambada (KeyError: 'text')",
        ),
        ("lambada", '{"text": 1}', "line 2 is not a record of lambada"),
        ("lambada", '{"text": ""}', "line 2 is not a record of lambada"),
        ("lambada", "[1]", "bad.jsonl, line 2: not a JSON object"),
        ("lambada", "a b", "bad.jsonl, line 2: not JSON"),
        ("hellaswag", '{"text": "a b"}', "line 2 is not a record of hellaswag"),
        ("lambada", '{"text": "a zz"}', "the vocabulary has no 'z'"),
    ],
)
def test_a_wrong_record_is_named(table, tmp_path, capsys, task, line, says):
    good = {"text": "a b"}
    if task == "hellaswag":
        good = {"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a"], "label": 0}
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    argv = ["--checkpoint", table, "--task", task, "--input", str(tmp_path / "bad.jsonl")]
    assert evaluate.main(argv) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "--task is one of hellaswag, lambada, bits_per_byte"),
        (["--task=bits_per_byte"], "--task=bits_per_byte needs --input=FILE"),
        (["--task=piqa"], "task must be one of"),
        (["--task=lambada", "--input=gone.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_wrong_options(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(argv) == 2
    assert says in capsys.readouterr().err


# ---- the harness --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory) -> Path:
    """A random model of GPT-2's kind, with GPT-2's tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2(folder, n_positions=64)
    for name, data in hf_tokenizer.files(tokenizer.GPT2Tokenizer()).items():
        (folder / name).write_bytes(data)
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, text) -> dict[str, str]:
    """Twenty records of random words for each task."""
    folder, choose, words = tmp_path_factory.mktemp("tasks"), random.Random(0), text.split()

    def some(least: int, most: int) -> str:
        return " ".join(choose.choices(words, k=choose.randint(least, most)))

    hellaswag = [
        {
            "activity_label": some(1, 2),
            "ctx_a": f"{some(1, 12)} [header] {some(1, 3)} [title] ",
            "ctx_b": some(0, 3),
            "endings": [f"{some(1, 8)} [step] {some(0, 3)}." for _ in range(4)],
            "label": str(choose.randrange(4)),
        }
        for _ in range(20)
    ]
    texts = [{"text": some(1, 60)} for _ in range(20)]
    records = {"hellaswag": hellaswag, "lambada": texts, "bits_per_byte": texts}
    return {task: write_lines(folder / f"{task}.jsonl", rows) for task, rows in records.items()}


def their_tasks(files: dict[str, str]) -> list:
    """The harness's tasks of these names, on our files."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.hellaswag.utils import process_docs

    settings = {
        "hellaswag": {
            "output_type": "multiple_choice",
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "lambada": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
            "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
        },
        "bits_per_byte": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    source = {"dataset_path": "json", "test_split": "test"}
    return [
        ConfigurableTask(
            config={
                "task": task,
                **source,
                "dataset_kwargs": {"data_files": {"test": files[task]}},
                **how,
            }
        )
        for task, how in settings.items()
    ]


def their_scores(model, files: dict[str, str]) -> dict[str, dict[str, float]]:
    import lm_eval

    found = lm_eval.simple_evaluate(model, tasks=their_tasks(files), bootstrap_iters=0)
    return {
        task: {key.removesuffix(",none"): value for key, value in scores.items() if ",none" in key}
        for task, scores in found["results"].items()
    }


@needs_gpt2_vocabulary
def test_the_harness_gives_the_same_scores(gpt2_folder, files, capsys, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lm_eval.models.huggingface import HFLM

    from folio.harness import FolioModel

    theirs = their_scores(HFLM(str(gpt2_folder), device="cpu", dtype="float32"), files)
    adapted = their_scores(FolioModel(str(gpt2_folder), device="cpu"), files)
    capsys.readouterr()
    for task, path in files.items():
        ours = evaluate_file(capsys, str(gpt2_folder), task, path)
        assert ours, task
        for metric, value in ours.items():
            assert value == pytest.approx(theirs[task][metric], rel=1e-5, abs=6e-5), (task, metric)
            assert adapted[task][metric] == pytest.approx(theirs[task][metric], rel=1e-5)


def test_the_adapter_from_the_command_line(table, tmp_path):
    """Also for a task that generates text, with a tokenizer that the harness does not know."""
    pytest.importorskip("lm_eval")
    write_lines(tmp_path / "q.jsonl", [{"question": "a", "answer": " a a a a"}] * 3)
    (tmp_path / "spell.yaml").write_text(
        f"""
task: spell
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    what = f"--model folio --model_args checkpoint={table} --device cpu --tasks spell"
    done = subprocess.run(
        [sys.executable, "-m", "folio.harness", "run", *what.split(), f"--include_path={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "|exact_match|" in done.stdout.replace(" ", ""), done.stderr
