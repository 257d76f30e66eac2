"""The page as a whole: complete, partial and damaged runs."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_bench import Workbench, overwrite, row

from weakseg.data.samples import Sample
from weakseg.report import write_report

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks the nesting and collects what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("src", "href")]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def written(bench: Workbench) -> Page:
    path = write_report(bench.run, bench.collection, bench.recipe)
    assert path == bench.run.report_file
    return Page(path)


def test_a_complete_run_has_every_section(bench: Workbench) -> None:
    bench.everything()
    page = written(bench)
    wanted = "shows data pictures threshold training results classes worst stages recipe"
    assert " ".join(page.ids) == wanted
    assert "complete" in page.text
    for number in ("38.1 %", "43.9 %", "41.2 %", "50.0 %"):
        assert number in page.text
    # 10 rows of image, scores, mask, overlay, segmenter, truth; 2 worst cases of 3
    assert page.tags["img"] == 10 * 6 + 2 * 3
    assert page.tags["svg"] == 9


def test_it_needs_nothing_but_itself(bench: Workbench) -> None:
    bench.everything()
    page = written(bench)
    assert page.tags["script"] == page.tags["iframe"] == page.tags["object"] == 0
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    styles = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    assert not re.search(r"https?://", page.source)


def test_what_users_wrote_is_escaped(bench: Workbench) -> None:
    bench.everything()
    page = written(bench)
    for raw in ("<b>x", "<i>labels", "<script>", "loss<1>"):
        assert raw not in page.source
        assert raw in page.text
    assert "tiny & co" in page.text


def test_the_same_run_gives_the_same_bytes(bench: Workbench) -> None:
    bench.everything()
    first = write_report(bench.run, bench.collection, bench.recipe).read_bytes()
    assert write_report(bench.run, bench.collection, bench.recipe).read_bytes() == first
    assert [p.name for p in bench.run.path.iterdir() if p.is_file()] == ["report.html"]


def test_oracle_numbers_say_so(bench: Workbench) -> None:
    bench.everything()
    page = written(bench)
    tiles = re.findall(r'class="tile">.*?</div></div>', page.source)
    marked = [tile for tile in tiles if "oracle" in tile]
    assert len(marked) == 1
    assert "41.2 %" in marked[0]
    assert "chose something" in page.text


def test_without_ground_truth_nothing_is_measured(blind: Workbench) -> None:
    blind.check()
    blind.train()
    blind.seeds()
    blind.masks()
    page = written(blind)
    assert "results" not in page.ids
    assert "mIoU" not in page.text
    assert "no ground-truth masks" in page.text
    assert "Look before you trust" in page.text
    assert "7 evaluate" not in page.text
    assert page.tags["img"] == 10 * 4


def test_only_the_check(bench: Workbench) -> None:
    bench.check()
    page = written(bench)
    assert page.ids == ["shows", "data", "pictures", "stages", "recipe"]
    assert "1 of 7 stages done" in page.text
    assert "Next stage: train" in page.text


def test_nothing_at_all(bench: Workbench) -> None:
    page = written(bench)
    assert "0 of 7 stages done" in page.text


def test_a_failed_stage_is_named_with_its_message(bench: Workbench) -> None:
    bench.check()
    bench.fail("train", "the loss is <nan>")
    page = written(bench)
    assert "failed in train" in page.text
    assert page.text.count("the loss is <nan>") == 2
    assert "mend: lower it" in page.text


def test_an_interrupted_stage_is_named(bench: Workbench) -> None:
    bench.check()
    file = bench.run.stage_folder("check") / "stage.json"
    overwrite(file, file.read_text().replace('"done"', '"running"'))
    assert "check running or interrupted" in written(bench).text


def test_a_segmenter_that_is_off_is_not_missed(bench: Workbench) -> None:
    bench.everything()
    for name in ("segment", "predict"):
        (bench.run.stage_folder(name) / "stage.json").unlink()
    settings = bench.recipe.model_copy(
        update={"segmenter": bench.recipe.segmenter.model_copy(update={"enabled": False})}
    )
    assert "complete" in written(replace(bench, recipe=settings)).text


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("check", "check.json"),
        ("masks", "rule.json"),
        ("evaluate", "results.json"),
        ("train", "stage.json"),
        ("seeds", "scores/train/1.npz"),
        ("masks", "masks/train/1.png"),
    ],
)
def test_damaged_files_are_left_out(bench: Workbench, stage: str, file: str) -> None:
    bench.everything()
    for content in ("", "[1]", '{"rows": [3, {}], "sweep": {"miou": "x"}, "problems": 3}'):
        overwrite(bench.run.stage_folder(stage) / file, content)
        assert "Stages" in written(bench).text


def test_unknown_numbers_are_dashes(bench: Workbench) -> None:
    bench.everything()
    bad = {"stage": "mask", "split": "train", "miou": float("nan"), "iou": [None, "x"]}
    results = {"rows": [bad], "worst": {"mask": [["train/1"]]}, "sweep": None}
    overwrite(bench.run.stage_folder("evaluate") / "results.json", results)
    page = written(bench)
    assert "nan" not in page.text
    assert "–" in page.text


def test_images_that_are_gone_leave_a_gap(bench: Workbench) -> None:
    bench.everything()
    for sample in bench.collection:
        sample.image.unlink()
    page = written(bench)
    assert page.tags["img"] == 0
    assert "cannot be read" in page.text


def test_names_that_are_no_text(bench: Workbench) -> None:
    odd = Sample("train/\udcff", bench.collection[0].image, ("cat",))
    samples = (odd, *bench.collection.samples[:2])
    page = written(replace(bench, collection=replace(bench.collection, samples=samples)))
    assert "\\udcff" in page.text


def test_classes_with_few_images_and_a_weak_classifier_are_named(bench: Workbench) -> None:
    bench.everything()
    text = written(bench).text
    assert "3 classes with few training images" in text
    assert "does not know the classes well yet (F1 50.0 %)" in text
    assert "Another threshold would give 6.2 points more" in text
    assert "owl (10.0 %)" in text
    assert "The masks spill over the objects" in text


def test_classes_that_always_come_together_are_named(bench: Workbench) -> None:
    bench.check()
    file = bench.run.stage_folder("check") / "check.json"
    overwrite(file, {"cooccurrence": [[20, 19, 0], [19, 90, 0], [0, 0, 4]]})
    assert "95 % of the images of cat show <b>x" in written(bench).text


def test_problems_of_the_data_are_listed(bench: Workbench) -> None:
    bench.check()
    items = [f"train/{i}" for i in range(11)]
    problem = {"severity": "error", "message": "11 files end too early", "mend": "copy <them>"}
    file = bench.run.stage_folder("check") / "check.json"
    overwrite(file, {"problems": [problem | {"items": items}, "odd"]})
    text = written(bench).text
    assert "1 kind of errors in the data" in text
    assert "11 files end too early" in text
    assert "copy <them>" in text
    assert "train/7 and 3 more" in text


def test_very_many_classes(bench: Workbench) -> None:
    names = tuple(f"class {i:03d}" for i in range(300))
    samples = tuple(replace(s, tags=("class 200",)) for s in bench.collection)
    many = replace(bench.collection, classes=names, samples=samples)
    page = written(replace(bench, collection=many))
    assert "240 more are not shown" in page.text


def test_terms_that_never_were_active_are_named(bench: Workbench) -> None:
    bench.stage("train", steps=60, active_steps={"cls": 60, "late": 0})
    text = written(bench).text
    assert "Loss terms that were never active (train)" in text and "late. The schedule" in text


@pytest.mark.parametrize("falls", [True, False])
def test_a_loss_that_still_falls_is_named(bench: Workbench, falls: bool) -> None:
    bench.train()
    log = bench.run.stage_folder("train") / "logs/from-0000000/metrics.csv"
    rows = [f"{s},0,{1 - s / 61 if falls else 0.5:.4f},0.01" for s in range(1, 61)]
    log.write_text("\n".join(["step,epoch,cls,lr", *rows]))
    assert ("still falling at the end (train)" in written(bench).text) == falls


@pytest.mark.parametrize(("miou", "said"), [(0.43, "3.0 points above"), (0.33, "7.0 points below")])
def test_what_the_segmenter_gains_is_said(bench: Workbench, miou: float, said: str) -> None:
    bench.everything()
    rows = [row("mask", "train", 0.4, "label-free"), row("segmenter", "train", miou, "label-free")]
    overwrite(bench.run.stage_folder("evaluate") / "results.json", {"rows": rows})
    assert f"The segmenter is {said} its own masks" in written(bench).text


def test_a_threshold_among_many_scores_is_named(bench: Workbench) -> None:
    bench.masks()
    said = "Much depends on the threshold"
    assert said not in written(bench).text
    file = bench.run.stage_folder("masks") / "rule.json"
    crowd = [500 if 60 < i < 78 else 1 for i in range(256)]  # around .27
    overwrite(file, {"rule": "label-free", "threshold": 0.27, "histogram": crowd})
    assert said in written(bench).text
