"""Promise: every command in README.md, CONTRIBUTING.md and docs/ works as it is written.

They are collected from blocks of code, cells of notebooks and sentences. Each is run in a copy of a
folder that has the files, data sets and runs which they name, with further arguments that make it
small, or is in NOT_RUN with the reason. Of those too, the script must exist and know the options.
"""

import ast
import gzip
import hashlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from options_page import PAGES

from data.files import SHAKESPEARE
from evaluate import TASKS
from folio.options import build_options, read_options

NAMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_TEXTS = {path.name: path.read_text("utf-8") for path in NAMES if path.exists()}
COMMAND = re.compile(
    r"(?:\w+=\S* )*(?:(?:python3?|py|torchrun|pip|echo|apt-get) \S|(?:pytest|\.ci/run)(?: |$))"
)
NOT_RUN = {  # the start of commands: why they are not run
    "pip install ": "needs a network",
    "py -3 ": "is for Windows",
    "apt-get ": "needs a network",
    "pytest": "runs this test",
    "ruff ": "is a part of .ci/run",
    "python sample.py --serve": "goes on until it is stopped; test_serve has it",
    ".ci/run": "runs this test",
    "python tests/": "benchmarks take minutes",
    "python prepare.py openwebtext": "needs a network",
    "python -m folio.harness run ": "needs a network",
    "torchrun --standalone --nproc_per_node=8 ": "needs eight GPUs",
    "torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py": "two GPUs",
    "torchrun --nnodes=2 ": "needs two machines",
}
PLACES = {"=N": "=2", "/content/drive/MyDrive": "drive"}  # what a command has, what is run instead
RUN = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --micro_batch_size=0"
RUN += " --max_iters=3 --eval_tokens=64 --sample_tokens=8 --device=cpu --dtype=float32"
SMALL = {  # further arguments, which override earlier ones
    "train": RUN.split(),
    "sample": ["--num_samples=2", "--max_new_tokens=5", "--device=cpu"],
    "evaluate": ["--device=cpu"],
}
POSITIONAL = {"prepare": ("dataset",)}  # of the scripts in NOT_RUN
OTHERS = {  # options of other programs
    "standalone", "nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint",
    "max-restarts", "index-url", "help", "key", "flag", "model_args", "tasks", "large",
    "check", "logdir",
}  # fmt: skip


def commands_in(page: str) -> list[str]:
    """All commands in the text of a page, each on one line, without comments."""
    blocks = []

    def take(block: re.Match) -> str:
        if block["kind"] != "text":
            blocks.append(textwrap.dedent(block["code"]).replace("\\\n", ""))
        return "\n"

    prose = re.sub(r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$", take, page, flags=re.M | re.S)
    prose = re.sub(r"(?<=\n)(?P<kind>)(?P<code>(?:    .*\n|\n(?=    ))+)", take, prose)
    spans = re.findall(r"`([^`]+)`", prose)
    lines = [line.strip().lstrip("!%") for block in blocks for line in block.splitlines()]
    found = []
    for line in [*lines, *(" ".join(span.split()) for span in spans)]:
        if COMMAND.match(line):
            parts = re.sub(r"\s#.*", "", line).split(" && ")
            found += [" ".join(re.sub(r"^(\w+=\S* )+", "", part).split()) for part in parts]
    for name, words in re.findall(r'\b(\w+)\.main\((\[".*?\])\)', page, re.S):
        found.append(f"python {name}.py {shlex.join(ast.literal_eval(words))}")
    return found


COMMANDS = {c: name for name, text in PAGE_TEXTS.items() for c in commands_in(text)}


def why_not_run(command: str) -> str:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")


def split(command: str) -> tuple[str, str, list[str]]:
    """The text that echo pipes into a script, the script's name, and its arguments."""
    piped, _, command = command.rpartition(" | ")
    for written, instead in PLACES.items():
        command = re.sub(rf"{written}\b", instead, command)
    words = shlex.split(command.partition(" > ")[0])
    script = next((word for word in words if word.endswith(".py")), "")
    return piped.removeprefix("echo "), script, words[words.index(script) + 1 :] if script else []


@pytest.fixture(scope="module")
def template(tmp_path_factory, text) -> Path:
    """A folder with everything that the commands name."""
    from test_gpt2 import nanogpt_checkpoint

    import convert
    import prepare
    import train
    from data import bins

    text += "《春夜》"  # the prompt of docs/languages.md
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(ROOT / "config", folder / "config")
    lines = "".join(json.dumps({"body": part}) + "\n" for part in text.split("\n\n")).encode()
    question = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": [*"abcd"], "label": 1}
    downloads = {
        "https://example.org/a.txt": text,
        SHAKESPEARE: text,
        TASKS["hellaswag"].url: json.dumps(question),
        TASKS["lambada"].url: json.dumps({"text": "This is a word"}),
    }
    files = {
        f"data/.downloads/{hashlib.sha256(url.encode()).hexdigest()[:16]}/{Path(url).name}": content
        for url, content in downloads.items()
    }
    names = "book.txt", "notes/a.txt", "more/of/b.md", "names.txt", "poems.txt", "prose.txt", "FILE"
    for name, content in {**dict.fromkeys(names, text), **files, "start.txt": text[:9]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8", newline="")
    (folder / "docs.jsonl.gz").write_bytes(gzip.compress(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert prepare.main(["--name=mine", "--input=book.txt"]) == 0
        for name in ("other", "NAME", "shakespeare", "shakespeare_char", "poems", "prose", "tuned"):
            shutil.copytree("data/mine", f"data/{name}")
        argv = ["config/shakespeare_char.py", "--dataset=mine", "--out_dir=out/mine"]
        assert train.main([*argv, *SMALL["train"], "--max_iters=2"]) == 0
        for name in ("a", "b", "quickstart", "poems", "prose"):
            shutil.copytree("out/mine", f"out/{name}")
        argv = ["config/shakespeare_char_gpt2.py", "--out_dir=out/finetune_shakespeare"]
        assert train.main([*argv, *SMALL["train"]]) == 0
        for name in ("gpt2", "distilgpt2", "hf/mine"):
            assert convert.main(["out/finetune_shakespeare", name]) == 0
        vocab_size = bins.load(folder / "data/mine").vocab_size
        nanogpt_checkpoint(folder / "ckpt.pt", True, False, vocab_size)
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if not why_not_run(c)])
def test_a_command_works(command, template, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(template, tmp_path / "commands")
    monkeypatch.chdir(folder)
    piped, script, argv = split(command)
    if command.startswith("torchrun "):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        words = [*launcher, "--standalone", ROOT / script, *argv, *SMALL["train"]]
        subprocess.run(words, timeout=120, check=True)
        return
    assert script in PAGES, f"{COMMANDS[command]}: {command} is not run, and not in NOT_RUN"
    if script == "convert.py":
        shutil.rmtree(folder / argv[1], ignore_errors=True)  # which other commands name
    name = script.removesuffix(".py")
    small = SMALL.get(name, [])
    if "bpe" in argv:
        small = [*small, "--vocab_size=300"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((piped or "Once").encode())))
    code = importlib.import_module(name).main([*argv, *small])
    assert code == 0, f"{COMMANDS[command]}: {capsys.readouterr().err}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if why_not_run(c)])
def test_a_command_that_is_not_run_names_what_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, script, argv = split(command)
    files = re.findall(r"-r (\S+)|-m (folio\.\w+)|^(\.ci/\w+)", command)
    for file, module, program in files:
        assert importlib.util.find_spec(module) if module else (ROOT / (file or program)).is_file()
    if script in PAGES:
        cls = PAGES[script]
        given, _ = read_options(cls, argv, POSITIONAL.get(script.removesuffix(".py"), ()))
        build_options(cls, given)
    elif script:
        source = (ROOT / script).read_text("utf-8")
        for option in re.findall(r"--\w+", command):
            assert option in source, option


def test_the_list_of_what_is_not_run_is_exact():
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in COMMANDS), f"no command: {start}"
    for command in COMMANDS:
        assert sum(command.startswith(start) for start in NOT_RUN) <= 1, command


@pytest.mark.parametrize("name", PAGE_TEXTS)
def test_every_option_that_is_named_exists(name):
    known = {field for cls in PAGES.values() for field in cls.__dataclass_fields__} | OTHERS
    for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGE_TEXTS[name]):
        assert option in known, f"--{option}"
