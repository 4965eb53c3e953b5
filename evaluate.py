"""Evaluate a model on a benchmark.

    python evaluate.py --checkpoint gpt2 --task hellaswag            10,042 questions
    python evaluate.py --checkpoint gpt2 --task lambada --limit 500  the first 500 of 5,153
    python evaluate.py --task bits_per_byte --input book.txt         the newest run in out/
    python evaluate.py --task hellaswag --input hellaswag_val.jsonl  a file that you have

The scores are those of EleutherAI's lm-evaluation-harness. For its other tasks, see
folio/harness.py.
"""

from folio.process import script  # isort: skip  (first, for Ctrl-C during other imports)
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from data import documents
from data.errors import UserError
from folio import evaluation, run_folder
from folio.evaluation import Scorer
from folio.options import PathStr, PathStrs, build_options, read_options


class Task(NamedTuple):
    url: str  # where its records can be downloaded
    parse: Callable[[dict], Any] | None  # a record -> a question; None: the input is text
    score: Callable[[list, Scorer], dict]


TASKS = {
    "hellaswag": Task(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        evaluation.hellaswag_question,
        evaluation.hellaswag,
    ),
    "lambada": Task(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        evaluation.lambada_question,
        evaluation.lambada,
    ),
    "bits_per_byte": Task("", None, evaluation.bits_per_byte),
}


@dataclass
class EvaluateConfig:
    task: Literal["", "hellaswag", "lambada", "bits_per_byte"] = ""  # what to evaluate
    input: PathStrs = ()  # its files or URLs; empty: hellaswag and lambada are downloaded once
    limit: Annotated[int, "[0, inf)"] = 0  # use only that many records or documents; 0: all
    data_dir: PathStr = "data"  # downloads are stored in its folder .downloads

    # the model
    checkpoint: PathStr = ""  # file, folder or Hub id; a,b: their mean; empty: the newest run
    cache_dir: PathStr = ""  # folder for models of the Hub; empty: Hugging Face's default cache
    device: str = "auto"  # cuda, mps, cpu; auto: the first that exists
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of matrix products


@script
def main(argv: list[str]) -> None:
    given, _ = read_options(EvaluateConfig, argv)
    options = build_options(EvaluateConfig, given)
    if not options.task:
        raise UserError(f"--task is one of {', '.join(TASKS)}")
    task = TASKS[options.task]
    if not (options.input or task.url):
        raise UserError(f"--task={options.task} needs --input=FILE")
    items = list(islice(read_items(options, task), options.limit or None))
    if not items:
        raise UserError(f"{', '.join(options.input)}: nothing to evaluate")
    name = options.checkpoint or str(run_folder.newest_run(Path("out")))
    scorer = Scorer(name, options.device, options.dtype, options.cache_dir)
    scores = task.score(items, scorer)
    unit = "records" if task.parse else "documents"
    print(f"{options.task} of {name}: {len(items):,} {unit}, {options.dtype}")
    for metric, values in scores.items():
        error = ""
        if values.size > 1:
            error = f" +/- {values.std(ddof=1) / math.sqrt(values.size):.4f}"
        print(f"{metric:<14}{values.mean():.4f}{error}")


def read_items(options: EvaluateConfig, task: Task) -> Iterator[Any]:
    """The texts or questions of a task, in order; raises UserError for a wrong record."""
    downloads = Path(options.data_dir) / ".downloads"
    try:
        corpus = documents.Corpus(options.input or (task.url,), downloads)
    except UserError as error:
        advice = "" if options.input else "; if you have the file: --input=FILE"
        raise UserError(f"{error}{advice}") from None
    if task.parse is None:
        for document in corpus:
            if text := b"".join(document.blocks()).decode():
                yield text
        return
    for source, record in corpus.records():
        try:
            yield task.parse(record)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{source} is not a record of {options.task} ({reason})") from None


if __name__ == "__main__":
    raise SystemExit(main())
