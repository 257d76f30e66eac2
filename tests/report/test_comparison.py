"""The table of several methods, its words, its page: runs written by hand."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from report_bench import Workbench, make_collection, row
from test_report_page import Page

from weakseg.data.samples import Collection
from weakseg.files import write_json
from weakseg.recipe import load_recipe
from weakseg.report.comparison import summary, write_comparison_page, write_tables
from weakseg.report.numbers import Cell, Comparison, Entry
from weakseg.report.verdict import margin
from weakseg.runfolder import RunFolder

COMMAND = "weakseg compare recipe.yaml --methods cam,seam --seeds 3"


class Runs:
    """Writes finished runs of methods, and gathers them as a comparison."""

    def __init__(self, root: Path, collection: Collection) -> None:
        self.root, self.collection = root, collection
        self.out = root / "comparison"
        self.entries: list[Entry] = []

    def add(
        self,
        label: str,
        seed: int,
        mask: float | None = None,
        *,
        method: str = "cam",
        rule: str = "label-free",
        oracle: float | None = None,
        refined: float | None = None,
        segmenter: float | None = None,
        f1: float = 0.9,
        fp: float = 0.3,
        seconds: float = 60.0,
        batch: int = 4,
        name: str = "",
        **entry,
    ) -> Workbench:
        recipe = load_recipe(
            {
                "method": method,
                "refine": ["pamr"] if refined is not None else [],
                "train": {"batch": batch},
            }
        )
        bench = Workbench(
            RunFolder(self.out / (name or f"{label}-{seed}")), self.collection, recipe
        )
        bench.run.path.mkdir(parents=True)
        bench.run.recipe_file.write_text(recipe.to_yaml())
        bench.stage("train", steps=10, device="a <CPU>")
        self._rewrite(bench, "train", seconds=seconds, inputs={"train": {"batch": batch}})
        bench.stage("seeds", f1=f1)
        bench.masks() if seed == 0 else bench.stage("masks")  # pictures are of the first run
        own = method == "recurseed"
        rows = []
        if mask is not None:
            at_best = mask + 0.01 if oracle is None else oracle
            rows.append(row("seed", "train", at_best, "oracle") | {"f1": 0.5})
            if rule != "map" and refined is None:
                rows.append(row("seed", "train", mask, rule))
            if refined is not None:
                rows.append(row("refined: pamr", "train", refined + 0.01, "oracle"))
                rows.append(row("refined: pamr", "train", refined, rule))
            rows.append(row("mask", "train", mask, rule) | {"fp": fp})
        if segmenter is not None:
            head = {"head": "decoder" if own else "segmenter", "flip": False, "scales": [1.0]}
            head["tags"] = "predicted" if own else "none"
            rows.append(row("segmenter", "train", segmenter + 0.05, rule) | head)
            rows.append(row("segmenter", "val", segmenter, rule) | head)
        if rows:
            bench.stage("evaluate", lambda f: write_json(f / "results.json", {"rows": rows}))
        for stage in ("seeds", "masks", "evaluate"):
            self._rewrite(bench, stage, seconds=10.0)
        self.entries.append(Entry(label, seed, bench.run.path, recipe, **entry))
        return bench

    @staticmethod
    def _rewrite(bench: Workbench, stage: str, **values) -> None:
        file = bench.run.stage_folder(stage) / "stage.json"
        if file.is_file():
            write_json(file, json.loads(file.read_text()) | values)

    def comparison(self, planned: int | None = None, equal: str = "steps") -> Comparison:
        entries = tuple(self.entries)
        return Comparison(entries, self.collection, planned or len(entries), equal, COMMAND)

    def table(self) -> list[dict[str, str]]:
        write_tables(self.comparison(), self.out)
        with (self.out / "comparison.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def markdown(self, **more) -> str:
        write_tables(self.comparison(**more), self.out)
        return (self.out / "comparison.md").read_text(encoding="utf-8")

    def page(self, **more) -> Page:
        return Page(write_comparison_page(self.comparison(**more), self.out))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path, make_collection(tmp_path / "data"))


@pytest.fixture
def blind(tmp_path: Path) -> Runs:
    collection = make_collection(tmp_path / "data")
    samples = tuple(replace(sample, mask=None) for sample in collection)
    return Runs(tmp_path, replace(collection, samples=samples))


def three_seeds(runs: Runs) -> None:
    for seed, mask in enumerate((0.40, 0.41, 0.42)):
        runs.add("cam", seed, mask, segmenter=0.35, step_cost=1.0)
    for seed, mask in enumerate((0.50, 0.52, 0.51)):
        runs.add("recurseed", seed, mask, method="recurseed", rule="map", segmenter=0.45,
                 seconds=180.0, step_cost=2.5)  # fmt: skip
    for seed, mask in enumerate((0.39, 0.42, 0.43)):
        runs.add("seam", seed, mask, method="seam")


# --- numbers --------------------------------------------------------------------------------


def test_mean_and_spread_over_seeds(runs: Runs) -> None:
    three_seeds(runs)
    lines = {line.label: line for line in summary(runs.comparison())}
    assert list(lines) == ["cam", "recurseed", "seam"]
    cam = lines["cam"].cells
    assert cam["seed"] == cam["masks"] == "41.0 ± 1.0"
    assert cam["seed best (oracle)"] == "42.0 ± 1.0"
    assert cam["masks FP"] == "30.0 ± 0.0"
    assert lines["seam"].cells["masks"] == f"41.3 ± {100 * stdev((0.39, 0.42, 0.43)):.1f}"
    assert cam["minutes training"] == "1.0"
    assert cam["minutes all stages"] == "1.5"
    assert lines["recurseed"].cells["step, × cam"] == "2.50"
    assert lines["seam"].cells["step, × cam"] == "–"


def test_the_best_of_each_column_is_known(runs: Runs) -> None:
    three_seeds(runs)
    best = {line.label: line.best for line in summary(runs.comparison())}
    assert best["recurseed"] == {"masks", "masks FP", "masks FN", "segmenter", "classifier F1"} | {
        "seed best (oracle)"
    }
    # where several are alike to the digit shown, it is the best of each of them
    assert best["seam"] == {"seed", "masks FP", "masks FN", "classifier F1"} | {
        "minutes training", "minutes all stages",
    }  # fmt: skip
    assert best["cam"] == best["seam"] - {"seed"} | {"step, × cam"}


def test_on_how_many_seeds_the_first_method_is_beaten(runs: Runs) -> None:
    three_seeds(runs)
    cells = {line.label: line.cells["better masks than cam"] for line in summary(runs.comparison())}
    assert cells == {"cam": "–", "recurseed": "3 of 3 seeds", "seam": "2 of 3 seeds"}


def test_one_seed_has_no_spread_and_beats_nobody(runs: Runs) -> None:
    runs.add("cam", 0, 0.40)
    runs.add("seam", 0, 0.45, method="seam")
    lines = summary(runs.comparison())
    assert lines[1].cells["masks"] == "45.0"
    assert not [title for title in lines[0].cells if "better" in title]
    assert "One seed for each method" in runs.markdown()


def test_columns_that_no_run_has_are_left_out(runs: Runs) -> None:
    runs.add("cam", 0, 0.40)
    (line,) = summary(runs.comparison())
    assert list(line.cells) == [
        "seed", "seed best (oracle)", "masks", "masks FP", "masks FN", "classifier F1",
        "minutes training", "minutes all stages",
    ]  # fmt: skip
    assert line.best == frozenset()  # there is no rival


def test_refined_scores_stand_between_seed_and_mask(runs: Runs) -> None:
    runs.add("cam + pamr", 0, 0.44, refined=0.43)
    (line,) = summary(runs.comparison())
    assert "seed" not in line.cells
    assert line.cells["seed best (oracle)"] == "45.0"
    assert line.cells["refined"] == "43.0"
    assert line.cells["refined best (oracle)"] == "44.0"
    assert "after refinement" in runs.markdown()


def test_predictions_of_an_own_network_are_marked(runs: Runs) -> None:
    three_seeds(runs)
    lines = {line.label: line for line in summary(runs.comparison())}
    assert lines["cam"].cells["segmenter"] == "35.0 ± 0.0"
    assert lines["recurseed"].cells["segmenter"] == "45.0 ± 0.0 †"
    assert lines["recurseed"].cells["seed"] == "–"
    text = runs.markdown()
    assert "† Predictions of the method's own network" in text
    assert "recurseed: the scores have a background map" in text


def test_lists_of_the_recipe_go_before_whole_splits(runs: Runs) -> None:
    bench = runs.add("cam", 0, 0.40, segmenter=0.3)
    results = bench.run.stage_folder("evaluate") / "results.json"
    rows = json.loads(results.read_text())["rows"]
    half = [r | {"split": "half", "images": 6, "miou": 0.77} for r in rows if r["split"] == "train"]
    of_val = [r | {"split": "some val", "miou": 0.66} for r in rows if r["split"] == "val"]
    write_json(results, {"rows": rows + half + of_val})
    (line,) = summary(runs.comparison())
    assert line.cells["masks"] == "77.0"
    assert line.cells["segmenter"] == "66.0"
    text = runs.page().text
    assert "measured on half (6 images)" in text
    assert "The same on train" in text
    assert "The same on val" in text


def test_predictions_on_training_images_alone_are_shown(runs: Runs) -> None:
    bench = runs.add("cam", 0, 0.40, segmenter=0.3)
    results = bench.run.stage_folder("evaluate") / "results.json"
    rows = [r for r in json.loads(results.read_text())["rows"] if r["split"] == "train"]
    write_json(results, {"rows": rows})
    assert summary(runs.comparison())[0].cells["segmenter"] == "35.0"


def test_image_steps_are_a_column_only_where_they_differ(runs: Runs) -> None:
    runs.add("cam", 0, 0.40)
    runs.add("seam", 0, 0.40, method="seam")
    assert "image steps" not in summary(runs.comparison())[0].cells
    assert "Equal for all: 40 image steps" in runs.markdown()
    runs.add("puzzle", 0, 0.40, method="puzzle", batch=8)
    assert [line.cells["image steps"] for line in summary(runs.comparison())] == ["40", "40", "80"]
    assert "but differ" in runs.markdown()
    assert "the time that training was given" in runs.markdown(equal="time")


def test_a_warm_up_is_said_and_not_counted(runs: Runs) -> None:
    warm = runs.add("warm-up", 0, batch=16, seconds=300.0).run.path
    runs.entries.clear()
    runs.add("cam", 0, 0.40, warmup=warm)
    runs.add("acr+vit", 0, 0.40, method="acr")
    text = runs.markdown()
    assert "trained for 160 image steps (acr+vit: none)" in text
    assert "5.0 minutes each" in text
    assert "but differ" in text  # 40 + 160 against 40
    rows = runs.table()
    assert {(r["method"], r["image_steps"], r["warmup_image_steps"]) for r in rows} == {
        ("cam", "40", "160"),
        ("acr+vit", "40", ""),
    }


def test_a_method_that_trains_alone_is_compared_with_both_trainings_of_the_others(
    runs: Runs,
) -> None:
    warm = runs.add("warm-up", 0, seconds=300.0).run.path
    runs.entries.clear()
    runs.add("cam", 0, 0.40, warmup=warm)
    alone = runs.add("acr+vit", 0, 0.40, method="acr")
    runs._rewrite(alone, "train", results={"steps": 20})
    text = runs.markdown()
    assert "Equal for all: 80 image steps of training, with those of the shared start" in text
    assert "but differ" not in text
    assert "acr+vit: no shared start, so the minutes include all of the training" in text
    runs._rewrite(alone, "train", results={"steps": 10})
    assert "but differ" in runs.markdown()


# --- tables ---------------------------------------------------------------------------------


def test_the_csv_has_a_row_for_each_number(runs: Runs) -> None:
    three_seeds(runs)
    rows = runs.table()
    assert len(rows) == 3 * 5 + 3 * 4 + 3 * 3
    one = next(r for r in rows if (r["method"], r["seed"], r["stage"]) == ("cam", "1", "mask"))
    assert one["miou"] == "0.4100"
    assert one["f1"] == "0.5000"  # of the same list
    assert (one["rule"], one["threshold"], one["scales"], one["flip"]) == (
        "label-free", "0.2700", "1 0.5", "True",
    )  # fmt: skip
    assert (one["split"], one["images"], one["tags"], one["crf"]) == (
        "train", "12", "given", "none",
    )  # fmt: skip
    assert (one["train_seconds"], one["seconds"], one["step_cost"]) == ("60.0", "90.0", "1.000")
    assert (one["device"], one["command"], one["network"]) == (
        "a <CPU>",
        COMMAND,
        "resnet50.tv_in1k",
    )
    assert one["weakseg"]
    val = next(r for r in rows if r["split"] == "val")
    assert val["f1"] == ""


def test_no_cell_of_the_csv_is_a_formula(runs: Runs) -> None:
    runs.collection = replace(runs.collection, name="=1+1")
    runs.add("@cam", 0, 0.40, name="plain")
    for line in runs.table():
        assert (line["data"], line["method"]) == ("'=1+1", "'@cam")
        assert float(line["miou"]) > 0


def test_without_ground_truth_there_are_costs_and_estimates(blind: Runs) -> None:
    bench = blind.add("cam", 0)
    quality = bench.run.stage_folder("masks") / "quality.csv"
    quality.write_text("id,score\na,0.25\nb,0.75\n")
    blind.add("seam", 0, method="seam", f1=0.8)
    first, second = summary(blind.comparison())
    assert first.cells["mask estimate"] == "0.50"
    assert second.cells["mask estimate"] == "–"
    assert not [title for title in first.cells if "masks" in title or "seed" in title]
    (one, _) = blind.table()
    assert (one["stage"], one["miou"], one["f1"], one["estimate"]) == ("", "", "0.9000", "0.5000")
    page = blind.page()
    assert "mIoU" not in page.text.replace("no mIoU", "").partition("Published numbers, for")[0]
    assert "Whether it ranks methods was not tested" in page.text
    assert "charts" not in page.ids


def test_cells_of_markdown_cannot_be_broken(runs: Runs) -> None:
    runs.collection = replace(runs.collection, name="a|b <script>\n# c")
    runs.add("cam | *x*", 0, 0.40, name="plain")
    text = runs.markdown()
    assert "# a\\|b &lt;script&gt; # c: methods side by side" in text
    assert "| cam \\| \\*x\\* |" in text
    widths = {
        line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")
    }
    assert len(widths) == 1


def test_an_empty_comparison_is_no_error(runs: Runs) -> None:
    assert summary(runs.comparison(planned=4)) == []
    assert "4 of 4 runs are not there yet" in runs.markdown(planned=4)
    assert "No run is finished yet" in runs.page(planned=4).text


def test_a_run_without_any_file_is_a_line_of_dashes(runs: Runs) -> None:
    runs.add("cam", 0, 0.40)
    runs.entries.append(replace(runs.entries[0], label="gone", folder=runs.root / "nowhere"))
    cells = summary(runs.comparison())[1].cells
    assert set(cells.values()) == {"–"}
    assert "gone" in runs.page().text


# --- words ----------------------------------------------------------------------------------


def test_a_margin_is_clear_on_every_seed_and_beyond_the_spread() -> None:
    low, high = Cell({0: 0.40, 1: 0.42}), Cell({0: 0.45, 1: 0.46})
    assert margin(high, low).gain == pytest.approx(0.045)
    assert margin(high, low).clear
    assert margin(low, high).clear
    wide = Cell({0: 0.41, 1: 0.60})  # ahead on both seeds, but 10 points apart themselves
    assert margin(wide, low).won == 2
    assert not margin(wide, low).clear
    assert not margin(Cell({0: 0.9}), Cell({0: 0.1})).clear  # one seed
    assert margin(Cell({0: 0.5}), Cell({1: 0.4})).seeds == 0


def test_a_clear_winner_is_called_the_best(runs: Runs) -> None:
    three_seeds(runs)
    text = runs.page().text
    assert "The masks of recurseed are the best" in text
    assert "9.7 points above seam" in text
    assert "on each of 3 seeds" in text
    assert "recurseed predicts with its own network" in text
    assert "takes 3.0 times as long as cam" in text
    assert "measured at 2.50 times" in text
    assert "Above it: recurseed (+10.0); not told apart from it: seam (+0.3)" in text


def test_a_difference_within_the_spread_is_not_a_victory(runs: Runs) -> None:
    for seed, (cam, seam) in enumerate(((0.40, 0.41), (0.42, 0.41), (0.41, 0.43))):
        runs.add("cam", seed, cam, seconds=60.0)
        runs.add("seam", seed, seam, method="seam", seconds=600.0)
    runs.entries.sort(key=lambda entry: entry.label)
    text = runs.page().text
    assert "The masks of seam and cam cannot be told apart" in text
    assert "on 2 of 3 seeds" in text
    assert "cam is not told apart from seam and costs less" in text
    assert "are the best" not in text


def of_seeds(runs: Runs, **methods: dict[int, float]) -> str:
    for label, masks in methods.items():
        for seed, mask in masks.items():
            runs.add(label, seed, mask)
    return runs.page().text


@pytest.mark.parametrize(
    ("one", "words"),
    [
        ((0.50, 0.50, 0.90), "10.0 points above one (50.0 ± 0.0) on the 2 seeds that both have"),
        ((0.50, 0.51, 0.80, 0.80, 0.80), "9.5 points above one (50.5 ± 0.7) on the 2 seeds"),
    ],
)
def test_the_order_rests_on_the_seeds_that_both_have(
    runs: Runs, one: tuple[float, ...], words: str
) -> None:
    text = of_seeds(runs, one=dict(enumerate(one)), other={0: 0.60, 1: 0.60})
    assert "The masks of other and one cannot be told apart" in text
    assert words in text
    assert "It is ahead of one on 2 of 2 seeds" in text
    assert "are the best" not in text


def test_without_a_common_seed_nothing_is_said_of_one_seed(runs: Runs) -> None:
    text = of_seeds(runs, one={0: 0.50, 1: 0.51}, other={2: 0.40, 3: 0.41}, third={4: 0.30})
    assert "The masks of one have the highest mIoU, on other seeds than other" in text
    assert "They have no seed in common" in text
    assert "one seed" not in text
    assert "No seed in common, so small differences mean nothing" in text


def test_methods_that_are_each_behind_another_have_no_leader(runs: Runs) -> None:
    text = of_seeds(runs, one={0: 0.5, 1: 0.3}, other={1: 0.4, 2: 0.2}, third={2: 0.3, 0: 0.6})
    assert "The masks of third have the highest mIoU, on one seed" in text
    runs.entries.clear()
    text = of_seeds(runs, a={0: 0.5, 1: 0.3}, b={1: 0.4, 2: 0.2}, c={2: 0.3, 0: 0.4})
    assert "Which masks are the best cannot be said" in text


def test_a_tie_is_no_defeat(runs: Runs) -> None:
    text = of_seeds(
        runs, cam={0: 0.6, 1: 0.6, 2: 0.6}, x={0: 0.6, 1: 0.5, 2: 0.5}, y={0: 0.6, 1: 0.6, 2: 0.6}
    )
    assert margin(Cell({0: 0.6, 1: 0.5}), Cell({0: 0.6, 1: 0.6})).lost == 1
    assert "The masks of cam, y and x cannot be told apart" in text
    assert "Equal to it: y (+0.0); not told apart from it: x (−6.7)" in text
    assert "elow it" not in text


def test_equal_values_on_one_seed_have_words_of_their_own(runs: Runs) -> None:
    text = of_seeds(runs, cam={0: 0.6}, x={0: 0.6}, y={0: 0.5})
    assert "The masks of cam and x have the same mIoU" in text
    assert "10.0 points above y (50.0). x has the same as cam on one seed" in text
    assert "Below it: y (−10.0); equal to it: x (+0.0)" in text
    assert "have the highest" not in text


def test_one_seed_is_not_called_a_victory(runs: Runs) -> None:
    runs.add("cam", 0, 0.40)
    runs.add("seam", 0, 0.45, method="seam", oracle=0.50)
    text = runs.page().text
    assert "The masks of seam have the highest mIoU, on one seed" in text
    assert "are the best" not in text
    assert "seam loses 5.0 points to its threshold" in text


def test_a_classifier_that_knows_less_and_kinds_of_errors_are_named(runs: Runs) -> None:
    runs.add("cam", 0, 0.40, f1=0.9, fp=0.5)
    bench = runs.add("puzzle", 0, 0.30, method="puzzle", f1=0.3, fp=0.1)
    results = bench.run.stage_folder("evaluate") / "results.json"
    rows = [r | {"fn": 0.6} for r in json.loads(results.read_text())["rows"]]
    write_json(results, {"rows": rows})
    text = runs.page().text
    assert "puzzle knows the classes less well than the others" in text
    assert "The masks of cam spill over most, those of puzzle miss most" in text


# --- page -----------------------------------------------------------------------------------


def test_a_complete_page_has_every_section(runs: Runs) -> None:
    three_seeds(runs)
    page = runs.page()
    assert page.ids == ["shows", "table", "charts", "pictures", "classes", "runs", "published"]
    # 10 images with image and truth, and a mask of each of the three; no run has scores
    assert page.tags["img"] == 10 * (2 + 3)
    assert page.tags["svg"] == 3
    assert "complete" in page.text
    assert COMMAND in page.text
    assert "They cannot be compared with the numbers above" in page.text
    assert "Wang et al., CVPR 2020" in page.text
    assert page.text.count("oracle") > 3


def test_missing_runs_are_counted(runs: Runs) -> None:
    runs.add("cam", 0, 0.40)
    assert "17 of 18 runs are not there yet" in runs.page(planned=18).text
    assert "1 of 18 runs" in runs.page(planned=18).text
    assert "1 of 2 runs is not there yet" in runs.page(planned=2).text


def test_a_comparison_without_a_command_shows_none(runs: Runs) -> None:
    runs.add("cam", 0, 0.40)
    assert "This command goes on" in runs.page().text
    called = replace(runs.comparison(planned=2), command="")
    page = Page(write_comparison_page(called, runs.out))
    assert "This command goes on" not in page.text
    assert "The same call goes on" in page.text
    assert 'class="command"' not in page.source


def test_links_lead_to_the_runs(runs: Runs) -> None:
    bench = runs.add("cam", 0, 0.40, name="cam #0")
    runs.add("seam", 0, 0.40, method="seam")
    bench.run.report_file.write_text("a report")
    page = runs.page()
    local = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert local == ["cam%20%230/", "cam%20%230/report.html", "seam-0/"]


def test_it_is_self_contained_and_escaped(runs: Runs) -> None:
    three_seeds(runs)
    runs.add("<i>new", 0, 0.40, name="odd")
    page = runs.page()
    assert page.tags["script"] == page.tags["iframe"] == 0
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    for raw in ("<b>x", "<i>labels", "<i>new", "a <CPU>"):
        assert raw not in page.source
        assert raw in page.text
    assert "://" not in page.source


def test_the_same_runs_give_the_same_bytes(runs: Runs) -> None:
    three_seeds(runs)
    first = [runs.page().source, runs.markdown()]
    assert [runs.page().source, runs.markdown()] == first


def test_names_that_are_no_text_are_shown(runs: Runs) -> None:
    odd = runs.out / "cam-\udcff"
    runs.add("cam", 0, 0.40, name=odd.name)
    page = runs.page()
    assert "cam-%FF/" in page.links
    assert runs.markdown()
