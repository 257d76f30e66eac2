"""EdgePredictMix: confident objects are cut along edges of the probabilities."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from weakseg.errors import UserError
from weakseg.mixing import Scene, build_mix
from weakseg.mixing.edgepredictmix import EdgePredictMix
from weakseg.ops import gate, majority_vote, pamr, superpixels

K = 3
SIDE = 40
NO_EDGES = {"low": 9000.0, "high": 9000.0, "iterations": 0}


def mix(**config: object) -> EdgePredictMix:
    built = build_mix({"name": "edgepredictmix", **config}, K)
    assert isinstance(built, EdgePredictMix)
    return built


def scene(probabilities: Tensor, tags: Tensor) -> Scene:
    count, _, height, width = probabilities.shape
    value = torch.arange(count)[:, None, None, None].float()
    return Scene(
        images=value.expand(-1, 3, height, width),
        tags=tags,
        labels=torch.full((count, height, width), 255),
        maps={"rs": value.expand(-1, K, height, width)},
        probabilities=probabilities,
        pictures=torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)),
    )


def bands(*bands: tuple[int, dict[int, float]]) -> Tensor:
    """(K + 1, SIDE, SIDE): up to each column, the probabilities of some classes; .02 else."""
    maps = torch.full((K + 1, SIDE, SIDE), 0.02)
    start = 0
    for stop, levels in bands:
        for c, level in levels.items():
            maps[c, :, start:stop] = level
        start = stop
    return maps


def two() -> Scene:
    """Image 0: background, a strip that may be class 2, and class 2; image 1: background."""
    first = bands((16, {0: 0.98}), (26, {0: 0.5, 2: 0.5}), (SIDE, {0: 0.38, 2: 0.62}))
    second = bands((SIDE, {0: 0.98}))
    return scene(torch.stack([first, second]), torch.tensor([[0.0, 1, 0], [1, 0, 0]]))


@pytest.mark.parametrize("below", ["given", "predicted"])
def test_unsure_pixels_are_filled_up_to_the_edge_and_exactly_the_object_is_pasted(below: str):
    of = two()
    found = mix(iterations=0, below=below)(of)
    labels = mix(iterations=0)._labels(of)
    assert (labels[0, :, :13] == 0).all()
    assert (labels[0, :, 19:] == 2).all(), "the unsure strip takes its superpixel's class"
    assert (labels[1] == 0).all()
    edge = labels[0] == 255
    assert edge.any() and not edge[:, :13].any()
    cut = labels[0] == 2
    assert torch.equal(found.images[0] == 0, cut.expand(3, -1, -1))
    assert torch.equal(found.maps["rs"][0] == 0, cut.expand(K, -1, -1))
    theirs = labels[1] if below == "predicted" else of.labels[1]
    assert torch.equal(found.labels[0], labels[0].where(cut, theirs))
    assert found.tags[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("below", ["given", "predicted"])
def test_an_image_without_confident_foreground_comes_back_as_its_partner(below: str):
    of = two()
    found = mix(iterations=0, below=below)(of)
    assert (found.images[1] == 0).all()
    theirs = mix(iterations=0)._labels(of)[0] if below == "predicted" else of.labels[0]
    assert torch.equal(found.labels[1], theirs)
    assert torch.equal(found.tags[1], of.tags[0])


def test_the_filter_has_three_ranges(monkeypatch):
    def own(maps: Tensor, **_: object) -> Tensor:
        """Each pixel is a superpixel, so the vote changes nothing."""
        return 1 + torch.arange(maps[0, 0].numel()).view(1, *maps.shape[2:])

    monkeypatch.setattr("weakseg.mixing.edgepredictmix.superpixels", own)
    levels = [(8, {2: 0.551}), (16, {2: 0.549}), (24, {2: 0.101}), (SIDE, {2: 0.099})]
    of = scene(bands(*levels)[None], torch.tensor([[0.0, 1, 0]]))
    for config, expected in (
        ({}, [2, 255, 255, 0]),
        ({"background": 0.05}, [2, 255, 255, 255]),
        ({"foreground": 0.1}, [2, 2, 2, 0]),
    ):
        labels = mix(iterations=0, **config)._labels(of)
        assert labels[0, 0, [0, 12, 20, 30]].tolist() == expected


def test_the_order_of_vote_and_filter_matters():
    levels = [
        (24, {0: 0.2, 1: 0.6, 2: 0.2}),  # sure of 1
        (28, {0: 0.1, 1: 0.3, 2: 0.6}),  # sure of 2, in the minority
        (SIDE, {0: 0.3, 1: 0.5, 2: 0.2}),  # 1, not surely
    ]
    of = scene(bands(*levels)[None], torch.tensor([[1.0, 1, 0]]))
    columns = [0, 25, 35]
    assert mix(**NO_EDGES)._labels(of)[0, 0, columns].tolist() == [1, 2, 1]
    vote_first = mix(order="vote-first", **NO_EDGES)
    assert vote_first._labels(of)[0, 0, columns].tolist() == [1, 255, 255]
    lower = mix(order="vote-first", foreground=0.25, **NO_EDGES)
    assert lower._labels(of)[0, 0, columns].tolist() == [1, 1, 1]


@pytest.mark.parametrize("order", ["filter-first", "vote-first"])
def test_untagged_classes_are_never_pasted(order: str):
    maps = bands((20, {0: 0.9}), (SIDE, {3: 0.9}))
    of = scene(maps[None], torch.tensor([[1.0, 0, 0]]))
    assert set(mix(order=order, iterations=0)._labels(of).unique().tolist()) <= {0, 255}


@pytest.mark.parametrize("order", ["filter-first", "vote-first"])
@pytest.mark.parametrize("edges", ["classes", "foreground"])
def test_few_channels_give_what_all_of_them_would(order: str, edges: str):
    generator = torch.Generator().manual_seed(4)
    coarse = 4 * torch.randn(3, K + 1, 5, 5, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    tags = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    of = scene(wide.softmax(1), tags)
    with_background = torch.nn.functional.pad(tags, (1, 0), value=1.0)
    maps = pamr(of.pictures, gate(of.probabilities, with_background))
    regions = superpixels(maps, edges=edges)  # type: ignore[arg-type]
    best, ids = maps[:, 1:].max(1)
    if order == "filter-first":
        labels = torch.full_like(ids, 255)
        labels[best > 0.55] = (ids + 1)[best > 0.55]
        labels[best < 0.1] = 0
        expected = majority_vote(labels, regions, unsure_votes=False)
    else:
        voted = majority_vote(maps.argmax(1), regions, overwrite=True)
        own = maps.gather(1, voted.clamp(max=K)[:, None])[:, 0]
        expected = voted.where((own > 0.55) & (voted != 255), 255)
    found = mix(order=order, edges=edges)._labels(of)
    assert torch.equal(found, expected)
    assert len(expected.unique()) >= 4


@pytest.mark.parametrize(("vote", "strip"), [("all", 255), ("certain", 2)])
def test_mostly_unsure_superpixels_stay_so_where_unsure_pixels_vote(vote: str, strip: int):
    levels = [(4, {0: 0.4, 2: 0.6}), (SIDE, {0: 0.5, 2: 0.5})]
    of = scene(bands(*levels)[None], torch.tensor([[0.0, 1, 0]]))
    labels = mix(vote=vote, **NO_EDGES)._labels(of)
    assert (labels[0, :, :4] == 2).all()
    assert (labels[0, :, 4:] == strip).all()


def test_the_talk_is_the_published_helpers():
    found = mix(preset="talk").config
    assert (found.vote, found.edges, found.below) == ("all", "foreground", "predicted")
    assert found.order == "filter-first" and (found.foreground, found.background) == (0.55, 0.1)
    assert mix(preset="talk", below="given").config.below == "given"


@pytest.mark.realdata
def test_parity_with_the_authors_helpers(oracle):
    """PAMR, filter, superpixels, vote and cut; images of two colours show what was pasted."""
    data = oracle("parity/edgepredictmix")
    for name in ("normal", "unsure"):
        regions = superpixels(torch.from_numpy(data[f"{name}_p"]).float()[None], edges="foreground")
        assert np.array_equal(regions[0] == 0, data[f"{name}_edge"])
        voted = majority_vote(torch.from_numpy(data[f"{name}_in"]).long()[None], regions)
        assert np.array_equal(voted[0], data[f"{name}_out"])
    share, tags = (torch.from_numpy(data[f"mix_{k}"]).float() for k in ("f", "tags"))
    probabilities = torch.zeros(2, K + 1, *share.shape[1:])
    probabilities[:, 0] = 1 - share
    probabilities[torch.arange(2), 1 + tags.argmax(1)] = share
    of = replace(
        scene(probabilities, tags), pictures=torch.from_numpy(data["mix_pictures"]).float() / 255
    )
    mixed = mix(preset="talk")(of, torch.Generator().manual_seed(0)).images[:, 0]
    cut = torch.stack([mixed[0] == 0, mixed[1] == 1])
    assert (cut.numpy() != data["mix_cut"]).mean() < 0.001


def test_what_is_missing_is_named():
    of = two()
    for missing in ("probabilities", "pictures"):
        with pytest.raises(ValueError, match="pass both: .*probabilities"):
            mix()(Scene(**{**vars(of), missing: None}))


def test_thresholds_out_of_order_are_refused():
    with pytest.raises(UserError, match="background is above foreground"):
        mix(background=0.6)
