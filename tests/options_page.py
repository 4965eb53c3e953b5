"""Prints docs/options.md: the options of every script, as --help has them.

python tests/options_page.py > docs/options.md
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import convert  # noqa: E402
import evaluate  # noqa: E402
import prepare  # noqa: E402
import runs  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from folio.options import options_help  # noqa: E402

PAGES = {
    "prepare.py": prepare.PrepareConfig,
    "train.py": train.TrainConfig,
    "sample.py": sample.SampleConfig,
    "evaluate.py": evaluate.EvaluateConfig,
    "convert.py": convert.ConvertConfig,
    "runs.py": runs.RunsConfig,
}


def page() -> str:
    """The whole of docs/options.md."""
    parts = ["# All options\n\nWhat `--help` prints, with the default of each option.\n"]
    for name, cls in PAGES.items():
        parts.append(f"\n## {name}\n\n```text\n{options_help(cls)}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
