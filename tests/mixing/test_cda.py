"""CDA: which objects are gathered, and how they are shown where they do not belong."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weakseg.errors import UserError
from weakseg.mixing import Scene, build_mix
from weakseg.mixing.cda import CDA, _Placement, _sampled

K, S = 3, 20
PLAIN = {"rotation": 0, "flip": False, "smallest": 0.5, "largest": 0.5}


def mix(**config: object) -> CDA:
    built = build_mix({"name": "cda", **config}, K)
    assert isinstance(built, CDA)
    return built


def scene(
    value: float, tags: tuple[int, ...], box: tuple[int, int] = (8, 8), label: int | None = None
) -> Scene:
    """One image of a value, with an object of the first tag at (4, 6), its height and width given."""
    labels = torch.zeros(1, S, S, dtype=torch.int64)
    labels[0, 4 : 4 + box[0], 6 : 6 + box[1]] = label or tags[0]
    known = torch.zeros(1, K)
    known[0, [t - 1 for t in tags]] = 1
    return Scene(
        torch.full((1, 3, S, S), value), known, labels, {"rs": torch.full((1, K, S, S), 0.5)}
    )


def batch(*scenes: Scene) -> Scene:
    return Scene(
        torch.cat([s.images for s in scenes]),
        torch.cat([s.tags for s in scenes]),
        torch.cat([s.labels for s in scenes]),
        {"rs": torch.cat([s.maps["rs"] for s in scenes])},
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- harvest


def test_an_object_is_the_box_around_its_pixels():
    cda, given = mix(), scene(0.5, (2,), (8, 6))
    given.images[0] = torch.arange(S * S).view(S, S) / 64
    given.labels[0, 4, 6] = 255  # a corner that is unsure
    cda(given)
    item = cda.state()["2.0"]
    assert list(cda.state()) == ["2.0"]
    assert item.shape == (4, 8, 6) and item.dtype == torch.float16
    assert torch.equal(item[:3].float(), given.images[0, :, 4:12, 6:12].half().float())
    assert item[3].sum() == 47 and item[3, 0, 0] == 0


def test_objects_are_whole_pixels_of_a_coarser_grid_of_labels():
    cda, given = mix(), scene(0.5, (1,))
    coarse = torch.zeros(1, 5, 5, dtype=torch.int64)
    coarse[0, 1:3, 2:5] = 1
    cda(replace(given, labels=coarse, maps={}))
    assert cda.state()["1.0"].shape == (4, 8, 12)


@pytest.mark.parametrize(
    ("given", "gathered"),
    [
        (scene(0.5, (2,), (8, 5)), True),  # a tenth of the image
        (scene(0.5, (2,), (13, 3)), False),  # less
        (scene(0.5, (2,), (16, 14)), True),
        (scene(0.5, (1, 2)), False),  # two tags
        (scene(0.5, (2,), label=3), False),  # of a class without a tag
        (scene(0.5, (2,), label=255), False),
    ],
)
def test_only_well_sized_objects_of_images_with_one_tag_are_gathered(given: Scene, gathered: bool):
    cda = mix()
    cda(given)
    assert list(cda.state()) == (["2.0"] if gathered else [])


def test_an_object_that_fills_the_image_is_not_gathered():
    full = scene(0.5, (2,))
    full.labels[:, :15] = 2
    for most, count in ((0.7, 0), (0.75, 1)):
        cda = mix(most=most)
        cda(full)
        assert len(cda.state()) == count


def test_the_oldest_makes_room():
    cda = mix(capacity=2)
    for value in (1.0, 2.0, 3.0):
        cda(scene(value, (1,)))
    cda(scene(9.0, (3,)))
    held = {name: item[0, 0, 0].item() for name, item in cda.state().items()}
    assert held == {"1.0": 2, "1.1": 3, "3.0": 9}


def test_the_order_survives_a_checkpoint_of_more_than_ten():
    cda, fresh = mix(capacity=12), mix(capacity=12)
    for value in range(12):
        cda(scene(float(value), (1,)))
    fresh.load_state(cda.state())
    assert [item[0, 0, 0].item() for item in fresh.state().values()] == list(range(12))
    fresh.load_state({})
    assert fresh.state() == {}


def test_large_objects_are_reduced():
    cda = mix(side=4)
    cda(scene(0.5, (1,), (12, 6)))
    item = cda.state()["1.0"]
    assert item.shape == (4, 4, 2)
    torch.testing.assert_close(item[:3], torch.full((3, 4, 2), 0.5).half())
    assert item[3].eq(1).all()


# -- pasting


def test_an_image_meets_no_object_of_its_own_step():
    cda = mix()
    both = batch(scene(1.0, (1,)), scene(2.0, (2,)))
    first = cda(both, seeded())
    assert torch.equal(first.images, both.images) and torch.equal(first.tags, both.tags)
    second = cda(both, seeded())
    assert set(second.images[0].round().unique().tolist()) == {1.0, 2.0}
    assert set(second.images[1].round().unique().tolist()) == {1.0, 2.0}


@pytest.mark.parametrize("seed", range(5))
def test_pasted_pixels_are_the_object_in_all_that_is_known(seed: int):
    cda = mix(**PLAIN)
    cda(scene(7.0, (2,), (12, 6)))
    given = scene(1.0, (1,))
    found = cda(given, seeded(seed))
    cut = found.images[0, 0].round() == 7
    rows, columns = cut.any(1), cut.any(0)
    assert rows.sum() == 10 and columns.sum() == 5  # half of the image, in the object's shape
    assert torch.equal(cut, rows[:, None] & columns)
    assert torch.equal(found.labels[0], given.labels[0].masked_fill(cut, 2))
    for c, level in enumerate((0.0, 1.0, 0.0)):
        assert torch.equal(found.maps["rs"][0, c], torch.where(cut, level, torch.tensor(0.5)))
    assert found.tags.tolist() == [[1, 1, 0]]


def test_sizes_and_places_vary_within_the_image():
    cda = mix(rotation=0, smallest=0.2, largest=0.9)
    cda(scene(7.0, (2,)))
    bank = cda.state()
    areas, corners = set(), set()
    for seed in range(30):
        cda.load_state(bank)
        cut = cda(scene(1.0, (1,)), seeded(seed)).labels[0] == 2
        rows, columns = (cut.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
        assert abs(len(rows) - len(columns)) <= 1 and 4 <= len(rows) <= 18
        areas.add(len(rows))
        corners.add((rows[0], columns[0]))
    assert len(areas) > 6 and len(corners) > 15


def test_only_classes_that_are_not_tagged_are_pasted():
    cda = mix(**PLAIN)
    for c in (1, 2):
        cda(scene(10.0 + c, (c,)))
    bank = cda.state()
    seen = set()
    for seed in range(20):
        for tags, allowed in (((1,), {12}), ((2, 3), {11}), ((3,), {11, 12}), ((1, 2), set())):
            cda.load_state(bank)
            found = cda(scene(1.0, tags), seeded(seed))
            pasted = set(found.images.round().unique().tolist()) - {1.0}
            assert pasted <= allowed and len(pasted) == min(1, len(allowed))
            seen |= {(tags, p) for p in pasted}
    assert ((3,), 11) in seen and ((3,), 12) in seen


def test_what_the_mask_leaves_out_is_not_pasted():
    cda, given = mix(**PLAIN), scene(7.0, (2,))
    given.labels[0, 6:10, 8:12] = 0  # a hole in the middle half
    cda(given)
    cut = cda(scene(1.0, (1,)), seeded()).images[0, 0].round() == 7
    assert 70 <= cut.sum() <= 80  # 100 less 25, but for the grid
    rows, columns = (cut.any(axis).nonzero()[:, 0] for axis in (1, 0))
    assert not cut[rows[0] + 4 : rows[0] + 6, columns[0] + 4 : columns[0] + 6].any()


def test_a_map_with_background_has_none_in_the_object():
    cda, given = mix(**PLAIN), scene(1.0, (1,))
    cda(scene(7.0, (2,)))
    found = cda(replace(given, maps={"p": torch.full((1, K + 1, S, S), 0.25)}), seeded())
    cut = found.labels[0] == 2
    assert found.maps["p"][0, :, cut].T.unique(dim=0).tolist() == [[0, 0, 1, 0]]


def test_maps_of_which_nothing_is_known_are_refused():
    cda, given = mix(), scene(1.0, (1,))
    cda(scene(7.0, (2,)))
    with pytest.raises(ValueError, match="'x' of 2 channels; pass 3 channels"):
        cda(replace(given, maps={"x": torch.zeros(1, 2, S, S)}))


def test_ranges_out_of_order_are_refused():
    for wrong in ({"least": 0.8}, {"smallest": 0.9, "largest": 0.5}):
        with pytest.raises(UserError, match="must not be above"):
            mix(**wrong)


# -- placement


def shown(item: Tensor, side: int = 8, **placement: object) -> list[list[int]]:
    where = _Placement(**{"size": 0.5, "turn": 0.0, "mirror": 1, "place": (0, 0), **placement})
    size = torch.Size((side, side))
    return _sampled(item, where.theta(item, size), size, "nearest", "zeros")[0].int().tolist()


QUARTERS = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])


def rows(*quarters: int) -> list[list[int]]:
    """8 x 8, with the four quarters of a square of 4 in the middle."""
    a, b, c, d = quarters
    empty = [0] * 8
    upper, lower = ([0, 0, x, x, y, y, 0, 0] for x, y in ((a, b), (c, d)))
    return [empty, empty, upper, upper, lower, lower, empty, empty]


def test_an_object_is_scaled_mirrored_and_turned():
    assert shown(QUARTERS) == rows(1, 2, 3, 4)
    assert shown(QUARTERS, mirror=-1) == rows(2, 1, 4, 3)
    assert shown(QUARTERS, turn=math.pi / 2 + 1e-4) == rows(3, 1, 4, 2)  # with the clock
    assert shown(QUARTERS, size=0.25)[3][2:6] == [0, 1, 2, 0]


def test_an_object_is_moved_as_far_as_the_border():
    assert shown(QUARTERS, place=(-1, 1))[4:] == [r[2:6] + [0] * 4 for r in rows(1, 2, 3, 4)[2:6]]
    tall = torch.ones(1, 4, 2)
    assert [sum(r) for r in shown(tall, size=1.0, place=(1, 1))] == [4] * 8
    assert shown(tall, size=1.0, place=(1, 1))[0] == [0] * 4 + [1] * 4
