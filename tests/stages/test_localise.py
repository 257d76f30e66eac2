"""Localisation of score maps against boxes, beside a slow definition of every measure."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from weakseg import cli
from weakseg.data.images import write_mask
from weakseg.data.samples import Box, Collection, Sample
from weakseg.data.scorefile import ScoreFile, read_scores, write_scores
from weakseg.errors import UserError
from weakseg.pipeline import run_recipe
from weakseg.recipe import load_recipe
from weakseg.runfolder import RunFolder
from weakseg.stages.localise import box_source, localise
from weakseg.stages.seeds import scores_path

SIZE = (40, 60)
CLASSES = tuple("abcdefg")


def recipe_with(boxes: str | None, source: str = "folder"):
    return load_recipe({"data": {"source": source}, "evaluate": {"boxes": boxes}})


# -- the definitions, slowly: one image, one class, one threshold at a time


def overlap(a, b) -> float:
    cells = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
    union = len(cells[0] | cells[1])
    return len(cells[0] & cells[1]) / union if union else 0.0


def drawn_boxes(score_map: np.ndarray, threshold: float) -> list[tuple[int, int, int, int]]:
    """All components' boxes, the one of most pixels first, then the higher, then the left one."""
    labels, count = ndimage.label(
        score_map > np.float32(threshold * score_map.max()), np.ones((3, 3))
    )
    found = []
    for i in range(1, count + 1):
        ys, xs = np.nonzero(labels == i)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        found.append((-len(ys), box[1], box[0], tuple(int(v) for v in box)))
    return [f[3] for f in sorted(found)]


def slowly(samples, scores: Path, truths: dict[str, dict[int, list]], steps: int) -> dict:
    pairs, hits = [], {1: [], 5: []}
    for sample in samples:
        if not truths[sample.id]:
            continue
        seed = read_scores(scores_path(scores, sample.id)).full_size()
        maps = dict(zip(seed.classes.tolist(), seed.scores, strict=True))
        right = set()
        for c, boxes in truths[sample.id].items():

            def best(t, every, c=c, boxes=boxes, maps=maps):
                drawn = drawn_boxes(maps[c], t) if c in maps else []
                drawn = drawn if every else drawn[:1]
                return max((overlap(d, b) for d in drawn for b in boxes), default=0.0)

            sweep = [i / steps for i in range(steps)]
            pairs.append(
                (best(0.2, False), [best(t, False) for t in sweep], [best(t, True) for t in sweep])
            )
            if pairs[-1][0] >= 0.5:
                right.add(c)
        order = sorted(range(len(CLASSES)), key=lambda k: -seed.probabilities[k])
        for k in hits:
            hits[k].append(any(c + 1 in right for c in order[:k]))

    def most(column, iou):
        return max(np.mean([p[column][t] >= iou for p in pairs]) for t in range(steps))

    return {
        "gt_known": np.mean([p[0] >= 0.5 for p in pairs]),
        "top1_error": 1 - np.mean(hits[1]),
        "top5_error": 1 - np.mean(hits[5]),
        "max_box_acc": [most(1, iou) for iou in (0.3, 0.5, 0.7)],
        "max_box_acc_v2_at": [most(2, iou) for iou in (0.3, 0.5, 0.7)],
        "pairs": len(pairs),
        "images": len(hits[1]),
    }


@pytest.fixture
def world(tmp_path: Path):
    """Twelve images with masks, and score files that find their objects more or less well.

    Returns samples, their scores, and for each the boxes of its masks' components.
    """
    rng = np.random.default_rng(5)
    samples, truths = [], {}
    for i in range(12):
        mask = np.zeros(SIZE, dtype=np.uint8)
        for c in [] if i == 11 else rng.choice(7, rng.integers(1, 4), replace=False) + 1:
            for _ in range(rng.integers(1, 3)):
                y, x = rng.integers(0, 25), rng.integers(0, 40)
                mask[y : y + rng.integers(6, 15), x : x + rng.integers(6, 20)] = c
        mask[38:] = 255
        present = [int(c) for c in np.unique(mask) if 0 < c < 255]
        tagged = present[:-1] if i == 4 and len(present) > 1 else present  # one class has no map
        maps = []
        for c in tagged:
            noise = cv2.resize(rng.random((5, 8)).astype(np.float32), SIZE[::-1])
            blurred = cv2.GaussianBlur((mask == c).astype(np.float32), (0, 0), 1.5 + i / 4)
            score = (blurred + 0.03 * i * noise)[::2, ::2]
            maps.append(score / score.max())
        probabilities = rng.random(7).astype(np.float32)
        probabilities[[c - 1 for c in tagged]] += 0.2
        sample = Sample(
            f"s/{i}",
            tmp_path / f"{i}.png",
            tuple(CLASSES[c - 1] for c in tagged),
            "train",
            tmp_path / "truth" / f"{i}.png",
        )
        write_mask(sample.mask, mask)
        file = ScoreFile(
            np.array(tagged, np.int16),
            np.array(maps, np.float32).reshape(len(tagged), 20, 30),
            2,
            SIZE,
            probabilities.clip(0, 1),
        )
        write_scores(scores_path(tmp_path / "scores", sample.id), file)
        boxes = {}
        for c in present:
            labels, count = ndimage.label(mask == c, np.ones((3, 3)))
            slices = ndimage.find_objects(labels)[:count]
            boxes[c] = [(x.start, y.start, x.stop, y.stop) for y, x in slices]
        samples.append(sample)
        truths[sample.id] = boxes
    return samples, tmp_path / "scores", truths


def collection_of(samples) -> Collection:
    return Collection("made", CLASSES, tuple(samples), "made up")


def with_boxes(sample: Sample, boxes: dict[int, list]) -> Sample:
    own = tuple(Box(CLASSES[c - 1], *box) for c, each in boxes.items() for box in each)
    return replace(sample, boxes=own)


@pytest.mark.parametrize("kind", ["masks", "auto", "xml"])
def test_every_measure_is_its_definition(world, kind: str):
    samples, scores, truths = world
    if kind == "xml":
        samples = [replace(with_boxes(s, truths[s.id]), mask=None) for s in samples]
    collection = collection_of(samples)
    source = box_source(recipe_with(kind, "voc" if kind == "xml" else "folder"), collection)
    found = localise(samples, scores, source, 12)
    wanted = slowly(samples, scores, truths, 12)
    assert found["pairs_without_map"] == 1
    assert 0 < wanted["gt_known"] < 1
    assert 0 < wanted["top5_error"] <= wanted["top1_error"] < 1
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, atol=1e-9, err_msg=key)
    assert found["max_box_acc_v2"] == pytest.approx(np.mean(wanted["max_box_acc_v2_at"]))
    assert found["boxes"] == (
        "boxes of VOC XML" if kind == "xml" else "boxes of the masks' components"
    )


def test_perfect_maps_have_no_error(world):
    samples, scores, truths = world
    for sample in samples:
        shape = (len(truths[sample.id]), *SIZE)
        maps = np.zeros(shape, np.float32)
        for score, boxes in zip(maps, truths[sample.id].values(), strict=True):
            x0, y0, x1, y1 = boxes[0]
            score[y0:y1, x0:x1] = 1
        ids = np.array(list(truths[sample.id]), np.int16)
        own = np.isin(np.arange(1, 8), ids).astype(np.float32)
        write_scores(scores_path(scores, sample.id), ScoreFile(ids, maps, 1, SIZE, own))
    found = localise(samples, scores, box_source(recipe_with("masks"), collection_of(samples)), 10)
    assert found["gt_known"] == found["max_box_acc_v2"] == 1
    assert found["top1_error"] == found["top5_error"] == 0


def test_without_a_classifier_or_with_few_classes_there_is_no_top_k(world):
    samples, scores, _ = world
    source = box_source(recipe_with("masks"), collection_of(samples))
    first = read_scores(scores_path(scores, samples[0].id))
    write_scores(scores_path(scores, samples[0].id), replace(first, probabilities=None))
    found = localise(samples, scores, source, 4)
    assert found["top1_error"] is None
    assert found["top5_error"] is None
    assert found["gt_known"] is not None
    assert localise(samples[11:], scores, source, 4) is None  # no object at all


def test_the_data_s_own_boxes_come_before_masks_and_are_named(world):
    samples, _, truths = world
    boxed = [with_boxes(s, truths[s.id]) if i % 2 else s for i, s in enumerate(samples)]
    for origin, words in (
        ("coco", "boxes of COCO"),
        ("voc", "boxes of VOC XML"),
        ("folder", "boxes of the source 'folder'"),
    ):
        source = box_source(recipe_with("auto", origin), collection_of(boxed))
        assert source.words == words
        assert [source.known(s) for s in boxed] == [False, True] * 6
    moved = [with_boxes(boxed[1], {1: [(0, 0, 5, 5)]}), *boxed[2:]]
    changed = box_source(recipe_with("auto"), collection_of(moved)).fingerprint
    assert changed != box_source(recipe_with("auto"), collection_of(boxed)).fingerprint
    assert box_source(recipe_with("masks"), collection_of(boxed)).words.startswith(
        "boxes of the masks"
    )
    assert box_source(recipe_with(None), collection_of(boxed)) is None
    strange = replace(boxed[1], boxes=(Box("none of ours", 0, 0, 5, 5), Box("a", 5, 5, 5, 9)))
    assert box_source(recipe_with("auto"), collection_of([strange])).read(strange) == {}


def test_boxes_that_are_not_there_are_refused(world):
    samples, _, truths = world
    bare = collection_of(replace(s, mask=None) for s in samples)
    boxed = collection_of(with_boxes(s, truths[s.id]) for s in samples)
    for kind, origin, collection, mend in (
        ("xml", "folder", boxed, "data.source: voc"),
        ("coco", "voc", boxed, "data.source: coco"),
        ("coco", "coco", bare, "evaluate.boxes: masks"),
        ("masks", "folder", bare, "data.masks"),
        ("auto", "folder", bare, "data.masks"),
    ):
        with pytest.raises(UserError, match="evaluate.boxes") as error:
            box_source(recipe_with(kind, origin), collection)
        assert mend in error.value.mend


def test_evaluate_writes_prints_and_reports_the_boxes(tiny, tmp_path, capsys):
    recipe = load_recipe(tiny.model_dump(), sets=["segmenter.enabled=false", "refine=[pamr]"])
    out = tmp_path / "run"
    run_recipe(recipe, out)
    run = RunFolder(out)
    before = run.record("evaluate")
    assert not (run.stage_folder("evaluate") / "boxes.json").exists()
    assert "boxes" not in before.inputs["evaluate"]
    cli.app(["evaluate", str(out), "--boxes", "masks"], result_action="return_value")
    printed = " ".join(capsys.readouterr().err.split())
    assert "Localisation against boxes of the masks' components" in printed
    after = run.record("evaluate")
    assert after.fingerprint != before.fingerprint
    rows = json.loads((run.stage_folder("evaluate") / "boxes.json").read_text())["rows"]
    assert [r["stage"] for r in rows] == ["seed", "refined: pamr"]
    for row in rows:
        assert row["split"] == "train"
        assert row["scales"] == [1.0, 0.5]
        assert row["tags"] == "given"
        assert row["boxes"] == "boxes of the masks' components"
        assert "0.2 of the maximum" in row["rule"]
        assert row["pairs"] >= row["images"] > 0
        assert row["gt_known"] <= row["max_box_acc"][1] + 0.2  # one threshold beside the sweep
    with (run.stage_folder("evaluate") / "boxes.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(r["gt_known"]) for r in table] == [r["gt_known"] for r in rows]
    assert table[0]["ious"] == "0.3 0.5 0.7"
    report = run.report_file.read_text(encoding="utf-8")
    assert 'id="localised"' in report
    assert "against boxes of the masks&#39; components" in report
    cli.app(["evaluate", str(out), "--set", "evaluate.boxes=null"], result_action="return_value")
    assert not (run.stage_folder("evaluate") / "boxes.json").exists()
    assert 'id="localised"' not in run.report_file.read_text(encoding="utf-8")


def test_boxes_alone_are_enough_to_evaluate(tiny, tmp_path, monkeypatch):
    from weakseg.stages.check import collect

    def boxed(data):
        found = collect(data)
        own = (
            replace(s, mask=None, boxes=(Box(s.tags[0], 4, 4, 40, 40),) if s.tags else ())
            for s in found
        )
        return replace(found, samples=tuple(own))

    monkeypatch.setattr("weakseg.pipeline.collect", boxed)
    recipe = load_recipe(tiny.model_dump(), sets=["segmenter.enabled=false", "evaluate.boxes=auto"])
    run_recipe(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.record("evaluate").status == "done"
    rows = json.loads((run.stage_folder("evaluate") / "boxes.json").read_text())["rows"]
    assert [r["boxes"] for r in rows] == ["boxes of the source 'shapes'"]
    report = run.report_file.read_text(encoding="utf-8")
    assert 'id="localised"' in report
    assert "Its boxes are read to evaluate the score maps" in report
    assert "nothing here is measured against truth" not in report
