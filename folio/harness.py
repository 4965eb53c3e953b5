"""Folio's models in EleutherAI's lm-evaluation-harness, for all of its tasks.

    pip install lm_eval
    python -m folio.harness run --model folio --model_args checkpoint=out/mine --tasks piqa

The arguments are those of the harness's own command, lm_eval.
"""

import sys
from pathlib import Path

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from folio.evaluation import Scorer
from folio.generation import Sampling, encode_prompt, generate_texts


@register_model("folio")
class FolioModel(LM):
    """A checkpoint, by the name that sample.py --checkpoint accepts."""

    def __init__(
        self, checkpoint: str, device: str | None = None, dtype: str = "float32", **_: object
    ):
        super().__init__()
        self._scorer = Scorer(checkpoint, device or "auto", dtype)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [self._scorer.encode_pair(*request.args) for request in requests]
        return self._scorer.log_likelihoods(pairs)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        pairs = [self._scorer.encode_pair("", *request.args) for request in requests]
        return [score.log_likelihood for score in self._scorer.log_likelihoods(pairs)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy, whatever the task asks for."""
        texts, (model, tok) = [], (self._scorer.model, self._scorer.tok)
        for context, settings in (request.args for request in requests):
            until = settings.get("until") or []
            sampling = Sampling(
                max_new_tokens=settings.get("max_gen_toks", 256),
                temperature=0,
                stop=(until,) if isinstance(until, str) else tuple(until),
            )
            ids = encode_prompt(tok, context, seed=0)
            (stream,) = generate_texts(model, tok, ids, sampling, range(1), lambda _: None)
            texts.append(stream.take())
        return texts


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    # the harness uses a package named evaluate, which is not the script here
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != root.resolve()]
    cli_evaluate()
