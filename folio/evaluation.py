"""Benchmark tasks as EleutherAI's lm-evaluation-harness (version 0.4) defines them.

record -> Question -> encode_pair() -> ids -> log_likelihoods() -> accuracies, perplexity
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from folio.batch import autocast
from folio.ensemble import load_models
from folio.generation import encode_prompt
from folio.machine import find_device

LOGITS = 2**26  # of a batch: 256 MiB in float32


class Score(NamedTuple):
    """How likely a model finds a continuation."""

    log_likelihood: float  # of all its tokens, in nats
    is_greedy: bool  # whether greedy sampling would generate it


class Scorer:
    """A model and its tokenizer: how likely are texts?"""

    def __init__(self, checkpoint_name: str, device: str, dtype: str, cache_dir: str = ""):
        """Load the models of any name that sample.py --checkpoint accepts."""
        model, self.tok, _ = load_models(checkpoint_name, cache_dir)
        self.model, self.dtype = model.to(find_device(device)), dtype

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both. Whitespace at the end of the context becomes part of the continuation.
        An empty context becomes what separates documents."""
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        if not text:
            return self.start_ids(), self.tok.encode(continuation).tolist()
        ids = self.tok.encode(text).tolist()
        return ids, self.tok.encode(text + continuation).tolist()[len(ids) :]

    def start_ids(self) -> list[int]:
        return encode_prompt(self.tok, "", seed=0).tolist()

    @torch.inference_mode()
    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Rate the continuation of each (context, continuation), which are lists of ids.

        If both do not fit into block_size + 1 tokens, the context loses its oldest ones. A
        continuation that is longer than block_size is rated in parts, each after as much of what
        precedes it as fits. Batches are of similar lengths.
        """
        windows = [
            (number, window, n_rated)
            for number, pair in enumerate(pairs)
            for window, n_rated in _windows(*pair, self.model.config.block_size)
        ]
        windows.sort(key=lambda item: len(item[1]), reverse=True)
        totals, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        with tqdm(total=len(windows), unit=" texts", delay=1, disable=None) as bar:
            while windows:
                length = len(windows[0][1]) - 1
                size = max(1, LOGITS // (length * self.model.config.vocab_size))
                batch, windows = windows[:size], windows[size:]
                for (number, _, _), (total, is_greedy) in zip(
                    batch, self._rate(batch), strict=True
                ):
                    totals[number] += total
                    greedy[number] &= is_greedy
                bar.update(len(batch))
        return [Score(*score) for score in zip(totals.tolist(), greedy.tolist(), strict=True)]

    def _rate(self, batch: list[tuple[int, list[int], int]]) -> list[tuple[float, bool]]:
        """The log-likelihood and greediness of the last tokens of windows."""
        device = next(self.model.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        length = max(len(window) for _, window, _ in batch)
        padded = [window + [0] * (length - len(window)) for _, window, _ in batch]
        ids = torch.tensor(padded, device=device)  # (B, T + 1)
        with autocast(device.type, self.dtype):
            logits, _ = self.model(ids[:, :-1])  # (B, T, V)
        rated = []
        for row, targets, (_, window, n) in zip(logits, ids[:, 1:], batch, strict=True):
            end = len(window) - 1
            log_probs = row[end - n : end].float().log_softmax(-1)  # (n, V)
            target = targets[end - n : end]
            total = log_probs.gather(1, target[:, None]).sum(dtype=dtype)
            rated.append(torch.stack((total, (log_probs.argmax(-1) == target).all().to(dtype))))
        return [(total, bool(is_greedy)) for total, is_greedy in torch.stack(rated).tolist()]


def _windows(
    context: list[int], continuation: list[int], block_size: int
) -> Iterator[tuple[list[int], int]]:
    """Windows of at most block_size + 1 ids, with the number of last ones to rate in each."""
    whole = context + continuation
    for begin in range(len(context), len(whole), block_size):
        end = min(begin + block_size, len(whole))
        yield whole[max(0, end - block_size - 1) : end], end - begin


# ---- tasks --------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What may follow a text, and which of it is right."""

    context: str
    choices: list[str]
    label: int


def hellaswag_question(record: dict) -> Question:
    """A record of HellaSwag (Zellers et al. 2019), without WikiHow's marks, such as [step].

    Raises LookupError, TypeError, ValueError or AttributeError if it is something else.
    """

    def plain(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    choices, label = [plain(ending) for ending in record["endings"]], int(record["label"])
    if not (0 <= label < len(choices) and all(choices)):
        raise ValueError(f"label {label} of {len(choices)} endings, or an empty one")
    return Question(plain(context), choices, label)


def hellaswag(questions: list[Question], scorer: Scorer) -> dict[str, np.ndarray]:
    """Whether the right ending is the most likely (acc), and per character (acc_norm), (N,)."""
    pairs = [scorer.encode_pair(q.context, f" {choice}") for q in questions for choice in q.choices]
    scores = iter(scorer.log_likelihoods(pairs))
    acc, acc_norm = [], []
    for question in questions:
        totals = np.array([next(scores).log_likelihood for _ in question.choices])
        n_characters = np.array([len(choice) for choice in question.choices])
        acc.append(totals.argmax() == question.label)
        acc_norm.append((totals / n_characters).argmax() == question.label)
    return {"acc": np.array(acc), "acc_norm": np.array(acc_norm)}


def lambada_question(record: dict) -> Question:
    """A record of LAMBADA (Paperno et al. 2016) as OpenAI published it: a text and its last word.

    Raises LookupError, TypeError, ValueError or AttributeError if it is something else.
    """
    context, _, word = record["text"].rpartition(" ")
    if not word:
        raise ValueError("the text has no last word")
    return Question(context, [f" {word}"], 0)


def lambada(questions: list[Question], scorer: Scorer) -> dict[str, np.ndarray]:
    """Whether greedy sampling gives the last word (acc), (N,), and that word's perplexity."""
    scores = scorer.log_likelihoods(
        [scorer.encode_pair(q.context, q.choices[0]) for q in questions]
    )
    perplexity = math.exp(-np.mean([score.log_likelihood for score in scores]))
    return {"acc": np.array([s.is_greedy for s in scores]), "perplexity": np.array(perplexity)}


def bits_per_byte(texts: list[str], scorer: Scorer) -> dict[str, np.ndarray]:
    """The bits that the model needs per byte of UTF-8, with each text on its own."""
    pairs = [(scorer.start_ids(), scorer.tok.encode(text).tolist()) for text in texts]
    total = sum(score.log_likelihood for score in scorer.log_likelihoods(pairs))
    n_bytes = sum(len(text.encode()) for text in texts)
    return {"bits_per_byte": np.array(-total / n_bytes / math.log(2))}
