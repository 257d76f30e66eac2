"""ClassMix: half of the predicted classes go onto the next image."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.mixing import Scene, build_mix

K = 5


def stripes(*classes: int) -> Tensor:
    """(12, 12) labels: columns of each class, in equal parts."""
    return torch.tensor(classes).repeat_interleave(12 // len(classes)).expand(12, 12)


def scene(*labels: Tensor, sure: bool = False) -> Scene:
    ids = torch.stack(labels)
    value = torch.arange(len(ids))[:, None, None, None].float()
    tags = torch.zeros(len(ids), 256).scatter_(1, ids.flatten(1), 1)[:, 1 : K + 1]
    known = F.one_hot(ids.where(ids != 255, 0), K + 1).movedim(-1, 1).float()
    return Scene(value.expand(-1, 3, 12, 12), tags, ids, probabilities=known if sure else None)


def mixed(of: Scene, seed: int) -> Scene:
    return build_mix("classmix", K)(of, torch.Generator().manual_seed(seed))


def pasted(found: Scene, of: Scene) -> set[int]:
    """The classes of image 0 of which all pixels are on its next one, where no others are."""
    cut = found.images[0, 0] == 0
    classes = set(of.labels[0][cut].tolist())
    assert torch.equal(cut, sum(of.labels[0] == c for c in classes) > 0) if classes else True
    return classes


@pytest.mark.parametrize("sure", [True, False], ids=["probabilities", "labels"])
@pytest.mark.parametrize("classes", [(0, 1), (0, 1, 3), (0, 1, 2, 5), (1, 2, 4)])
def test_half_of_the_classes_are_pasted_each_choice_in_turn(classes: tuple, sure: bool):
    of = scene(stripes(*classes), stripes(4), sure=sure)
    seen = {frozenset(pasted(mixed(of, seed), of)) for seed in range(60)}
    assert seen == {frozenset(c) for c in combinations(classes, len(classes) // 2)}


def test_one_class_pastes_nothing_and_the_next_image_comes_back():
    of = scene(stripes(3), stripes(1), stripes(0))
    found = mixed(of, 0)
    assert found.images[:, 0, 0, 0].tolist() == [1, 2, 0]
    assert (found.images == found.images[..., :1, :1]).all()
    assert torch.equal(found.labels, of.labels[[1, 2, 0]])
    assert torch.equal(found.tags, of.tags[[1, 2, 0]])


def test_tags_are_the_pasted_ones_and_those_below():
    of = scene(stripes(0, 1, 3), stripes(5))
    for seed in range(10):
        found = mixed(of, seed)
        expected = {5} | (pasted(found, of) - {0})
        assert set((1 + found.tags[0].nonzero()[:, 0]).tolist()) == expected


def test_unsure_pixels_are_no_class():
    of = scene(stripes(255, 1), stripes(5))
    assert all(pasted(mixed(of, seed), of) == set() for seed in range(10))


def test_predictions_without_a_tag_do_not_count():
    of = scene(stripes(0, 1, 2), stripes(5), sure=True)
    of.tags[0, 1] = 0  # so the third stripe has no class with any probability: background
    cuts = {
        tuple(torch.unique(mixed(of, seed).images[0, 0, 0], return_counts=True)[1].tolist())
        for seed in range(20)
    }
    assert cuts == {(4, 8), (8, 4)}


def test_a_pasted_label_brings_its_tag_though_the_prediction_says_background():
    of = scene(stripes(0, 2), stripes(5), sure=True)
    swapped = Scene(of.images, of.tags, of.labels.flip(-1), probabilities=of.probabilities)
    seen = set()
    for seed in range(10):
        found = mixed(swapped, seed)
        shown = set(found.labels[0].unique().tolist()) - {0}
        tagged = set((1 + found.tags[0].nonzero()[:, 0]).tolist())
        assert shown <= tagged
        seen.add(frozenset(shown))
    assert len(seen) == 2
