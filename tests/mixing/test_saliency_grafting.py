"""Grafting: salient cells move, and tags are weighted by the saliency that is left."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weakseg.mixing import Scene, build_mix

T = 0.5
HIGH = math.exp(0.9 / T) / (math.exp(0.9 / T) + 3 * math.exp(0.1 / T))
"""The share of one cell of .9 among three of .1."""
FIRST = torch.tensor([[0.9, 0.1], [0.1, 0.1]])


def scene(first: Tensor = FIRST, tags: Tensor | None = None) -> Scene:
    """Image 0 has class 1 in its first cell; image 1 class 2 in its last one."""
    maps = torch.zeros(2, 3, 2, 2)
    maps[0, 1], maps[1, 2] = first, FIRST.flip(0, 1)
    maps[0, 2] = 0.95  # of which image 0 has no tag
    value = torch.arange(2.0)[:, None, None, None]
    return Scene(
        images=value.expand(2, 3, 8, 8),
        tags=torch.eye(2) if tags is None else tags,
        labels=torch.arange(2)[:, None, None].expand(2, 8, 8),
        probabilities=maps.repeat_interleave(4, 2).repeat_interleave(4, 3),
    )


def mixed(of: Scene, seed: int = 0, **config: object) -> Scene:
    section = {"name": "saliencygrafting-style", "cells": 2, "temperature": T, **config}
    return build_mix(section, 2)(of, torch.Generator().manual_seed(seed))


def test_the_salient_cell_is_grafted_and_tags_are_kept_shares():
    found = mixed(scene(), keep=1)
    grafted = torch.zeros(8, 8, dtype=torch.bool)
    grafted[:4, :4] = True
    assert torch.equal(found.labels[0] == 0, grafted)
    assert torch.equal(found.images[0] == 0, grafted.expand(3, 8, 8))
    assert torch.equal(found.labels[1] == 1, grafted.flip(0, 1))
    # Image 0 gives its only salient cell; image 1 loses one of its three poor ones.
    poor = (1 - HIGH) / 3
    torch.testing.assert_close(found.tags[0], torch.tensor([HIGH, 1 - poor]))
    torch.testing.assert_close(found.tags[1], torch.tensor([1 - poor, HIGH]))


def test_a_class_of_both_takes_the_larger_weight():
    of = scene(tags=torch.tensor([[1.0, 0], [1, 1]]))
    assert mixed(of, keep=1).tags[0, 0].item() == pytest.approx(max(HIGH, _left(of)))


def _left(of: Scene) -> float:
    """What image 1 keeps of its saliency where it loses its first cell: .1 or, of class 1, 0."""
    best = (of.probabilities[1, 1:, ::4, ::4] * of.tags[1][:, None, None]).amax(0)
    shares = (best / T).flatten().softmax(0)
    return 1 - shares[0].item()


@pytest.mark.parametrize(
    ("first", "tags", "cells"),
    [
        (torch.full((2, 2), 0.4), None, 2),
        (torch.full((2, 2), 0.4), None, 9),  # of which the mean is rounded down
        (FIRST, torch.tensor([[0.0, 0], [0, 1]]), 2),
    ],
    ids=["even", "even but for rounding", "untagged"],
)
def test_without_salient_cells_the_partner_comes_back(
    first: Tensor, tags: Tensor | None, cells: int
):
    of = scene(first, tags)
    found = mixed(of, keep=1, cells=cells)
    assert (found.labels[0] == 1).all()
    assert torch.equal(found.tags[0], of.tags[1])


def test_cells_are_drawn_as_often_as_asked_for():
    def grafts(**config: object) -> float:
        return (
            sum((mixed(scene(), s, **config).labels[0] == 0).any().item() for s in range(80)) / 80
        )

    assert grafts(keep=0) == 0
    assert grafts(keep=0.25) == pytest.approx(0.25, abs=0.15)
    assert grafts() == pytest.approx(0.5, abs=0.15)


def test_probabilities_are_asked_for():
    with pytest.raises(ValueError, match=r"pass Scene\(probabilities"):
        mixed(replace(scene(), probabilities=None))
