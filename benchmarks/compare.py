"""All methods side by side on shapes-v1, with `weakseg compare`: rows in results/compare.csv.

    uv run python benchmarks/compare.py --seeds 3

The table of the README. Images of a seed of the generator on which no default was chosen, and all
methods but ACR's relatives on transformers. Interrupted runs go on; the latest row of each counts.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from rows import append, commit, device

import weakseg

RESULTS = Path(__file__).parent / "results" / "compare.csv"
METHODS = (
    *("cam", "puzzle", "seam", "acr", "recurseed", "recurseed+edgepredictmix"),
    *("cam + pamr", "cam + walk", "recurseed + segmenter"),
)


def main() -> None:
    """Compares, and keeps the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/compare/shapes"))
    args = parser.parse_args()
    command = f"benchmarks/compare.py --seeds {args.seeds}"
    weakseg.compare("shapes/compare", METHODS, out=args.out, seeds=args.seeds, command=command)
    with (args.out / "comparison.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    came = {"device": device(), "commit": commit()}
    append(RESULTS, [row | {k: row.get(k) or v for k, v in came.items()} for row in rows])


if __name__ == "__main__":
    main()
