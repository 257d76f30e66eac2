"""The card of a model folder: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from weakseg.markdown import plain

__all__ = ["NUMBERS", "card"]

NUMBERS = (
    *("stage", "split", "images", "scales", "flip", "crf", "tags", "rule", "threshold"),
    *("miou", "fp", "fn"),
)
"""What a row of ``details["numbers"]`` holds, as the evaluation names it."""

_KEPT = ("numbers",)  # details that have a section of their own


def card(config: Mapping[str, Any]) -> str:
    """The card of a model folder, from its ``config.json``."""
    details = config["details"]
    facts = "\n".join(
        f"* {plain(key)}: {plain(value)}" for key, value in details.items() if key not in _KEPT
    )
    classes = plain(", ".join(config["classes"]))
    given = "projection" in config.get("method", {})
    title = "Given classifier, projected" if given else f"{config['task'].capitalize()} trained"
    front = yaml.safe_dump(_front(config), sort_keys=False, allow_unicode=True)
    return f"""---
{front}---

# {title} by weakseg

Segments {len(config["classes"])} classes: {classes}. Mask ids follow this order from 1; 0 is
background. {_origin(config)}

## How to use it

```python
import weakseg

model = weakseg.load("this/folder")  # or owner/name on the hub
mask = model.predict("image.jpg")
```

## How it was trained

{facts}

## Numbers

{_numbers(details.get("numbers", []))}

## Limits

* What it learnt comes from the tags: things that nearly always appear together with a class (rails
  with trains, water with boats) may be labelled as that class.
* Outlines are weaker than those of a network that was trained on drawn masks.
* {_threshold(config)}{_reading(config)}

## Classes

| id | class | colour in masks |
|---|---|---|
{_table(config["classes"], config["palette"])}

## Licence

Not stated. Whoever shares this model sets `license` above; images and weights that training
started from have terms of their own.
"""


def _origin(config: Mapping[str, Any]) -> str:
    if "projection" in config.get("method", {}):
        return "Its maps are those of a classifier that was trained elsewhere: weakseg trained nothing."
    corrected = config["details"].get("corrected masks")
    if corrected:
        return (
            f"It was trained from image tags, and from {plain(corrected)} masks corrected by hand."
        )
    return "It was trained from image tags: no pixel label was used."


def _front(config: Mapping[str, Any]) -> dict[str, Any]:
    details = config["details"]
    method = str(details.get("method", config.get("method", {}).get("name", "")))
    front: dict[str, Any] = {
        "library_name": "weakseg",
        "pipeline_tag": "image-segmentation",
        "license": "unknown",
        "tags": ["weakseg", "weakly-supervised-segmentation", "semantic-segmentation"]
        + ([method] if method else []),
    }
    honest = [row for row in details.get("numbers", []) if row["rule"] != "oracle"]
    if honest:
        name = str(details.get("data", "images"))
        front["model-index"] = [
            {
                "name": f"{method} {details.get('network', '')}".strip() or "weakseg",
                "results": [
                    {
                        "task": {"type": "image-segmentation"},
                        "dataset": {"name": name, "type": name, "split": row["split"]},
                        "metrics": [
                            {
                                "type": "mean_iou",
                                "value": round(100 * row["miou"], 2),
                                "name": f"mIoU % ({_conditions(row)})",
                            }
                        ],
                    }
                    for row in honest
                ],
            }
        ]
    return front


def _numbers(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "None were measured: no ground-truth masks were given."
    lines = ["| what | split | images | mIoU % | FP % | FN % | conditions |", "|" + "---|" * 7]
    for row in rows:
        shares = " | ".join(f"{100 * row[key]:.1f}" for key in ("miou", "fp", "fn"))
        lines.append(
            f"| {plain(row['stage'])} | {plain(row['split'])} | {plain(row['images'])} | {shares} | "
            f"{plain(_conditions(row))} |"
        )
    return (
        "\n".join(lines) + "\n\nmIoU is over the whole data set, background included. Ground-truth "
        "masks were used to measure alone, except where it says oracle."
    )


def _conditions(row: Mapping[str, Any]) -> str:
    flip = ", flip" if row["flip"] else ""
    threshold = "" if row["threshold"] is None else f" {row['threshold']:.2f}"
    scales = " ".join(f"{scale:g}" for scale in row["scales"])
    return (
        f"scales {scales}{flip}, CRF {row['crf']}, tags {row['tags']}, "
        f"threshold {row['rule']}{threshold}"
    )


def _threshold(config: Mapping[str, Any]) -> str:
    value = config["inference"]["threshold"]
    if value is None:
        return "Background is what the network or the default threshold makes it."
    rule = config["details"].get("threshold rule", "constant")
    return f"Background is where no class scores above {value:.3g} (rule: {plain(rule)})."


def _reading(config: Mapping[str, Any]) -> str:
    """How image files were read, where that is not plain 8-bit RGB."""
    depth, bands = (config["preprocessing"].get(key) for key in ("depth", "bands"))
    lines = ""
    if depth is not None:
        low, high = depth if isinstance(depth, list | tuple) else (0, 2**depth - 1)
        lines += f"\n* Values of more than 8 bits: {low:g} to {high:g} become 0 to 255."
    if bands is not None and bands != "alpha":
        lines += f"\n* Of an image file it reads the bands {', '.join(map(str, bands))}."
    return lines


def _table(classes: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
    rows = enumerate(zip(["background", *classes], palette, strict=True))
    return "\n".join(f"| {i} | {plain(name)} | #{bytes(rgb).hex()} |" for i, (name, rgb) in rows)
