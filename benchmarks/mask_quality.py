"""How well `weakseg score` sorts masks: rank correlation with true IoU, in results/mask-quality.csv.

    uv run python benchmarks/mask_quality.py --data shapes-held-out --scores acr=runs/methods/acr-2/held-out-cam-x
    uv run python benchmarks/mask_quality.py --data voc --list report_320 --masks cam=runs/quality/cpu-cam-0/5-masks/masks

Masks are those of a folder, or are made of scores with the label-free rule. True IoU of an image is
the mean over the classes that its mask or its ground truth holds; ``foreground`` leaves the
background out. ``worst`` is the mean true IoU of the tenth of the images that is sorted first, beside
that of all (``mean``) and of the tenth that truly is the worst (``best_possible``). The estimate was
chosen on the training images of shapes-v1 and on tune_320.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from rows import append, commit, device
from scipy.stats import spearmanr
from thresholds import collection_of, data_arguments, named

from weakseg.data.images import read_mask, write_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.ops import confusion_matrix, metrics
from weakseg.recipe import MasksConfig
from weakseg.stages.masks import choose_rule, label
from weakseg.stages.score import Masked, score_masks
from weakseg.stages.seeds import scores_path

RESULTS = Path(__file__).parent / "results" / "mask-quality.csv"


def main() -> None:
    """One row for each folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    data_arguments(parser)
    parser.add_argument("--masks", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--scores", nargs="*", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    images = collection_of(args.data, args.voc, args.list)
    command = f"benchmarks/mask_quality.py --data {args.data}"
    command += f" --list {args.list}" if args.list else ""
    for text in args.masks:
        name, folder = named(text)
        _append(images, name, folder, args, f"{command} --masks {name}=...")
    for text in args.scores:
        name, folder = named(text)
        with tempfile.TemporaryDirectory() as made:
            rule = choose_rule(MasksConfig(), folder, images)
            for sample in images:
                seed = read_scores(scores_path(folder, sample.id))
                write_mask(Path(made) / f"{sample.id}.png", label(seed, rule.threshold))
            _append(images, name, Path(made), args, f"{command} --scores {name}=...")


def _append(
    images: Collection, name: str, folder: Path, args: argparse.Namespace, command: str
) -> None:
    scored = score_masks([Masked(s, folder / f"{s.id}.png") for s in images])
    samples = {s.id: s for s in images}
    true = np.array(
        [
            _iou(samples[s.masked.id], s.masked.mask, len(images.classes))
            for s in scored
            if samples[s.masked.id].mask is not None
        ]
    )
    place = -np.arange(len(true))  # the worst come first
    tenth = max(1, len(true) // 10)
    row = {
        "data": args.data,
        "list": args.list,
        "masks": name,
        "images": len(true),
        "spearman": -float(spearmanr(place, true[:, 0])[0]),
        "spearman_foreground": -float(spearmanr(place, true[:, 1])[0]),
        "worst": float(true[:tenth, 0].mean()),
        "mean": float(true[:, 0].mean()),
        "best_possible": float(np.sort(true[:, 0])[:tenth].mean()),
        "device": device(),
        "commit": commit(),
        "command": command,
    }
    append(RESULTS, [row])
    print(
        f"{name}: {row['spearman']:.2f}, foreground {row['spearman_foreground']:.2f}; tenth that "
        f"comes first {row['worst']:.3f}, all {row['mean']:.3f}, worst tenth {row['best_possible']:.3f}",
        file=sys.stderr,
    )


def _iou(sample: Sample, mask: Path, classes: int) -> tuple[float, float]:
    assert sample.mask is not None
    found = metrics(confusion_matrix(read_mask(mask), read_mask(sample.mask), classes))
    known = found.iou[1:][~np.isnan(found.iou[1:])]
    return found.miou, float(known.mean()) if known.size else 1.0


if __name__ == "__main__":
    main()
