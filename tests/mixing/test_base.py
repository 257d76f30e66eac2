"""What all mixes are made of."""

import pytest
import torch

from weakseg.mixing.base import Scene, beta_draws, enlarged, partners, paste, present


def test_partners_are_others_each_as_often():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([partners(4, generator) for _ in range(600)])
    for i in range(4):
        counts = torch.bincount(draws[:, i], minlength=4)
        assert counts[i] == 0
        assert (counts[torch.arange(4) != i] > 150).all()
    assert partners(1).tolist() == [0] and partners(0).tolist() == []


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_beta_draws_have_the_moments_of_beta(beta: float):
    draws = beta_draws(4000, beta, torch.Generator().manual_seed(0))
    assert draws.min() >= 0 and draws.max() <= 1
    assert draws.mean() == pytest.approx(0.5, abs=0.03)
    assert draws.var() == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.1)
    again = beta_draws(4000, beta, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)


def test_present_lists_background_and_classes_not_unsure_pixels():
    labels = torch.tensor([[[0, 2], [255, 2]], [[255, 255], [3, 1]]])
    assert present(labels, 3).tolist() == [[True, False, True, False], [False, True, False, True]]


def test_pasting_takes_whole_cells_of_the_image():
    cut = torch.tensor([[[True, False], [False, False]], [[False] * 2] * 2])
    scene = Scene(
        images=torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 3, 5, 5),
        tags=torch.eye(2),
        labels=torch.tensor([1, 2])[:, None, None].expand(2, 2, 2),
        maps={"a": torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 2, 2)},
    )
    found = paste(scene, cut, torch.tensor([1, 0]), torch.ones(2, 2))
    assert found.labels.tolist() == [[[1, 2], [2, 2]], [[1, 1], [1, 1]]]
    assert torch.equal(found.maps["a"][:, 0].long(), found.labels)
    # The middle of the third of five pixels lies on the border, and goes with the second cell.
    assert found.images[0, 0, :, 0].tolist() == [1, 1, 2, 2, 2]
    assert torch.equal(found.images[0] == 1, enlarged(cut, (5, 5))[0].expand(3, 5, 5))
    assert (found.images[1] == 1).all()
    assert found.tags.eq(1).all()
