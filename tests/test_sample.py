"""Promise: a prompt and a seed decide a text, and the text is what the options ask for."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_gpt2_vocabulary, script
from hypothesis import given
from hypothesis import strategies as st

import sample
from data import tokenizer
from folio import checkpoint, generation, machine, run_folder
from folio.generation import (
    TextStream,
    encode_prompt,
    generate,
    generate_texts,
    inverse_cdf,
    next_probs,
    sample_token,
    token_probs,
)
from model import GPT, GPTConfig
from sample import SampleConfig


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    """A run of a few updates, with a checkpoint to sample from."""
    import train

    folder = tmp_path_factory.mktemp("out") / "run"
    recipe = str(ROOT / "config/shakespeare_char_cpu.py")
    argv = "--n_layer=1 --n_embd=32 --block_size=16 --max_iters=20 --dataset=small".split()
    argv += ["--sample_tokens=5", f"--data_dir={data_dir}", f"--out_dir={folder}"]
    assert train.main([recipe, *argv]) == 0
    return folder


def say(capsys, run_dir, *argv, status=0):
    assert sample.main([f"--checkpoint={run_dir}", "--device=cpu", *argv]) == status
    return capsys.readouterr()


# ---- from logits to an id


def drawn(logits, *options):
    """The ids that 10,000 evenly spaced uniforms give."""
    grid = (torch.arange(10_000) + 0.5) / 10_000
    return set(sample_token(logits.expand(10_000, -1), grid, *options).tolist())


def test_top_k_keeps_k():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert drawn(logits, 1.0, 2, 1.0) == {1, 3}
    assert drawn(logits, 1.0, 9, 1.0) == {0, 1, 2, 3}
    assert len(drawn(torch.zeros(1, 9), 1.0, 3, 1.0)) == 3


def test_top_p_keeps_the_smallest_set_that_holds_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in [(0.4, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.94, 3), (0.96, 4), (1e-9, 1)]:
        assert drawn(logits, 1.0, None, p) == set(range(kept)), p


def test_top_p_counts_within_top_k():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # of the two that top_k leaves, the first holds 0.625
    assert drawn(logits, 1.0, 2, 0.6) == {0}
    assert drawn(logits, 1.0, 2, 0.7) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1.0, 100.0, 1e300])
def test_any_temperature_gives_probabilities(temperature):
    probs = token_probs(torch.randn(5, 50) * 30, temperature, 1.0)
    assert probs.isfinite().all() and torch.allclose(probs.sum(-1), torch.ones(5))


@given(st.integers(0, 2**32 - 1))
def test_draw_follows_the_probabilities(seed):
    rng = np.random.default_rng(seed)
    probs = torch.from_numpy(rng.dirichlet(np.full(20, 0.3)))[None]
    grid = (torch.arange(10_000) + 0.5) / 10_000
    ids = inverse_cdf(probs.expand(10_000, -1), grid)
    shares = ids.bincount(minlength=20) / 10_000
    assert (shares - probs[0]).abs().max() < 2e-4


@pytest.mark.parametrize("options", [(0, 9, 1.0), (0.7, 9, 1.0), (2.0, 3, 1.0), (1.0, 4, 0.7)])
def test_the_probabilities_are_those_of_the_draw(options):
    logits = torch.tensor([[0.5, 2.0, 1.0, -1.0, 2.0]])
    grid = (torch.arange(10_000) + 0.5) / 10_000
    ids = sample_token(logits.expand(10_000, -1), grid, *options)
    shares = ids.bincount(minlength=5) / 10_000
    assert (shares - next_probs(logits, *options)[0]).abs().max() < 2e-4


def test_draw_never_takes_what_has_no_probability():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for u in (0.0, 0.4999, 0.5, math.nextafter(1, 0), 1.0):
        assert inverse_cdf(probs, torch.tensor([u], dtype=torch.float64)).item() in (1, 3), u


def test_ids_without_a_token_are_never_drawn():
    """A padded vocabulary: however likely, the ids above the tokenizer's stay out."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(1, 1, 16, 8, 64))
    with torch.no_grad():
        model.wte.weight[10:] *= 50
    uniforms = torch.rand(4, 50)
    for temperature in (0, 1.0):
        ids = torch.stack(
            list(
                generate(
                    model, torch.zeros(4, 1, dtype=torch.long), uniforms, temperature, n_ids=10
                )
            )
        )
        assert ids.shape == (50, 4) and ids.max() < 10


# ---- from ids to text


def add(stream, i):
    stream.add(i)
    return stream.take()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=4), st.booleans())
def test_a_stream_shows_the_text_up_to_stop(text, stop, inside):
    if inside and text:
        stop = text[len(text) // 2 :][:3]
    tok = tokenizer.ByteTokenizer()
    stream = TextStream(tok, (stop,))
    shown = "".join(add(stream, i) for i in tok.encode(text).tolist())
    stream.finish()
    assert shown + stream.take() == (text.partition(stop)[0] if stop else text)


def test_a_stream_never_splits_a_character():
    tok = tokenizer.ByteTokenizer()
    stream = TextStream(tok)
    pieces = [add(stream, i) for i in tok.encode("aé🙂b").tolist()]
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b"]


def test_a_character_cut_off_by_the_end_is_marked():
    stream = TextStream(tokenizer.ByteTokenizer())
    assert add(stream, 0xC3) == ""
    stream.finish()
    assert stream.take() == "\ufffd"


def test_what_might_have_become_stop_is_shown_at_the_end():
    stream = TextStream(tokenizer.ByteTokenizer(), stop=("END",))
    assert [add(stream, i) for i in b"xEN"] == ["x", "", ""]
    stream.finish()
    assert stream.take() == "EN"


@needs_gpt2_vocabulary
def test_end_of_text_ends_a_sample():
    stream = TextStream(tokenizer.GPT2Tokenizer())
    assert add(stream, 15496) == "Hello"
    assert add(stream, 50256) == "" and stream.ended and add(stream, 995) == ""
    assert stream.ids == [15496, 50256]


# ---- the script


def test_the_same_seed_the_same_text(capsys, run_dir):
    first = say(capsys, run_dir, "--seed=1", "--prompt=The").out
    assert first.startswith("The") and len(first) == 3 + 500 + 1
    assert say(capsys, run_dir, "--seed=1", "--prompt=The").out == first
    assert say(capsys, run_dir, "--seed=2", "--prompt=The").out != first


def test_a_sample_does_not_depend_on_how_many_there_are(run_dir):
    ckpt = run_folder.open_checkpoint(str(run_dir / "best.safetensors"))
    model, tok = checkpoint.build_model(ckpt), tokenizer.load(ckpt.meta["tokenizer"])
    options = SampleConfig(max_new_tokens=40)
    texts = []
    for samples in (range(5), range(1), range(3, 5)):
        streams = generate_texts(model, tok, tok.encode("a"), options, samples, lambda _: None)
        texts.append([stream.take() for stream in streams])
    assert texts[1] == texts[0][:1] and texts[2] == texts[0][3:] and len(set(texts[0])) == 5


@pytest.mark.parametrize("n", [1, 2])
def test_the_model_is_prepared_for_one_text_or_several(capsys, run_dir, monkeypatch, n):
    prepare, seen = sample.prepare_for_sampling, []

    def spy(model, dtype, single):
        seen.append(single)
        prepare(model, dtype, single)

    monkeypatch.setattr(sample, "prepare_for_sampling", spy)
    say(capsys, run_dir, f"--num_samples={n}", "--max_new_tokens=2")
    assert seen == [n == 1]


def test_greedy_is_top_k_1(capsys, run_dir):
    greedy = say(capsys, run_dir, "--temperature=0", "--max_new_tokens=50").out
    assert say(capsys, run_dir, "--top_k=1", "--max_new_tokens=50", "--seed=5").out == greedy
    assert say(capsys, run_dir, "--top_p=1e-9", "--max_new_tokens=50", "--seed=6").out == greedy


def test_a_text_of_several_samples(capsys, run_dir):
    out = say(capsys, run_dir, "--num_samples=3", "--max_new_tokens=20", "--prompt=It").out
    assert out.count("-" * 80) == 3 and out.count("It") >= 3


def test_stop_ends_a_sample(capsys, run_dir):
    whole = say(capsys, run_dir, "--prompt=a", "--max_new_tokens=200").out[:-1]
    stop = whole[100:103]
    out = say(capsys, run_dir, "--prompt=a", "--max_new_tokens=200", f"--stop={stop}").out[:-1]
    assert out == "a" + whole[1:].partition(stop)[0]


def test_prompts_from_everywhere(capsys, run_dir, tmp_path):
    (tmp_path / "start.txt").write_text("one\ntwo")
    short = ("--max_new_tokens=1", "--temperature=0")
    for prompt in (r"one\ntwo", f"FILE:{tmp_path / 'start.txt'}"):
        assert say(capsys, run_dir, f"--prompt={prompt}", *short).out.startswith("one\ntwo")
    done = script("sample.py", f"--checkpoint={run_dir}", "--prompt=-", *short, input="one\ntwo")
    assert done.stdout.startswith("one\ntwo") and done.returncode == 0


def test_a_prompt_longer_than_the_block_is_cropped_and_said(capsys, run_dir):
    prompt = "the first words of this "
    said = say(capsys, run_dir, f"--prompt={prompt}", "--max_new_tokens=30", "--temperature=0")
    assert "the prompt has 24 tokens; only the last 16 are used" in said.err
    cropped = say(
        capsys, run_dir, f"--prompt={prompt[-16:]}", "--max_new_tokens=30", "--temperature=0"
    )
    assert said.out.removeprefix(prompt) == cropped.out.removeprefix(prompt[-16:])


def test_an_empty_prompt_begins_somewhere():
    chars = tokenizer.CharTokenizer("\nab")
    assert encode_prompt(chars, "", 0).tolist() == [0]
    first_ids = [encode_prompt(tokenizer.CharTokenizer("abc"), "", s)[0] for s in range(20)]
    assert set(first_ids) == {0, 1, 2}


def test_without_a_checkpoint_the_newest_run_speaks(capsys, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to(run_dir.parent)
    assert sample.main(["--max_new_tokens=5", "--device=cpu"]) == 0
    assert "out/run: iteration 20" in capsys.readouterr().err


def test_a_thousand_samples_go_to_a_file(capsys, run_dir, tmp_path, monkeypatch):
    """A line of JSON each, in batches that fit into memory, the same whatever fits."""
    argv = ("--prompt=The", "--num_samples=1000", "--max_new_tokens=40", "--seed=3", "--stop=e")
    written = []
    for name, size in (("all.jsonl", 2**40), ("parts.jsonl", 2**23)):
        monkeypatch.setattr(generation, "available_memory", lambda _, size=size: size)
        assert say(capsys, run_dir, *argv, f"--output={tmp_path / name}").out == ""
        written.append([json.loads(line) for line in (tmp_path / name).open(encoding="utf-8")])
    assert written[0] == written[1] and len(written[0]) == 1000
    tok = tokenizer.load(run_folder.open_checkpoint(str(run_dir)).meta["tokenizer"])
    for number, line in enumerate(written[0]):
        assert line["prompt"] == "The" and line["seed"] == 3 and line["number"] == number
        assert tok.decode(line["tokens"]).partition("e")[0] == line["text"]
    assert len({line["text"] for line in written[0]}) > 500
    shown = say(capsys, run_dir, *argv[:1], "--num_samples=3", *argv[2:]).out
    assert shown == "".join(f"The{line['text']}\n{'-' * 80}\n" for line in written[0][:3])


def test_a_file_that_is_there_is_not_overwritten(capsys, run_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text("mine")
    for name in ("a.jsonl", "no/such.jsonl"):
        err = say(capsys, run_dir, f"--output={tmp_path / name}", status=2).err
        assert f"--output={tmp_path / name}" in err and "use another name" in err
    assert (tmp_path / "a.jsonl").read_text() == "mine"


def test_an_interrupted_file_without_samples_goes(capsys, run_dir, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "searchsorted", interrupt)
    say(capsys, run_dir, f"--output={tmp_path / 'a.jsonl'}", status=130)
    assert not (tmp_path / "a.jsonl").exists()


def test_a_containers_memory_is_its_limit(tmp_path, monkeypatch):
    here = machine.available_memory(torch.device("cpu"))
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    for text, expected in (("1000000", 10**6), ("max", here)):
        limit.write_text(text)
        assert machine.available_memory(torch.device("cpu")) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_full_disk_leaves_whole_lines(run_dir, tmp_path):
    import resource

    def write_at_most(size):
        words = ["--num_samples=300", "--max_new_tokens=50", f"--output={tmp_path / 'a.jsonl'}"]
        done = script(
            "sample.py",
            f"--checkpoint={run_dir}",
            *words,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )
        assert done.returncode == 1 and "a.jsonl" in done.stderr, done.stderr

    write_at_most(100)
    assert not (tmp_path / "a.jsonl").exists(), "not even one line"
    write_at_most(20_000)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(len(lines)))
    assert 10 < len(lines) < 300


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_trouble(run_dir, closed):
    words = (
        f"{sys.executable} {ROOT}/sample.py --checkpoint={run_dir} --max_new_tokens=5 --prompt=-"
    )
    done = subprocess.run(
        f"echo The | {words} {closed}", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
