"""The loss on pairs of pixels, and that it is learnt."""

import math

import pytest
import torch

from weakseg.data.loading import MaskBatch
from weakseg.networks.affinity import AffinityNetwork
from weakseg.networks.backbone import make_backbone
from weakseg.ops.confusion import IGNORE
from weakseg.ops.random_walk import half_disc
from weakseg.training.affinity import AffinityLearner, pair_losses

SHARES = {"background": 0.25, "foreground": 0.25, "different": 0.5}


def _slow(affinity, labels, radius, pairs):
    """The definition, pair by pair; of inner ones every neighbour lies inside (methods.md 11.3)."""
    found = {name: [] for name in SHARES}
    batch, height, width = labels.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                for p, (dy, dx) in enumerate(half_disc(radius)):
                    if not (0 <= y + dy < height and 0 <= x + dx < width):
                        continue
                    near = min(height - 1 - y, x, width - 1 - x)
                    if pairs == "inner" and near < radius - 1:
                        continue
                    one, other = int(labels[b, y, x]), int(labels[b, y + dy, x + dx])
                    if IGNORE in (one, other):
                        continue
                    a = float(affinity[b, p, y, x])
                    if one != other:
                        found["different"].append(-math.log(1 - a + 1e-5))
                    else:
                        found["foreground" if one else "background"].append(-math.log(a + 1e-5))
    return {k: SHARES[k] * sum(v) / len(v) for k, v in found.items() if v}


@pytest.mark.parametrize("radius", [2, 3])
@pytest.mark.parametrize("pairs", ["inner", "all"])
def test_pairs_are_those_of_the_definition(radius, pairs):
    generator = torch.Generator().manual_seed(radius)
    labels = torch.randint(0, 3, (2, 6, 7), generator=generator).to(torch.uint8)
    labels[torch.rand(2, 6, 7, generator=generator) < 0.2] = IGNORE
    affinity = torch.rand(2, len(half_disc(radius)), 6, 7, generator=generator)
    expected = _slow(affinity, labels, radius, pairs)
    found = pair_losses(affinity, labels, radius, pairs)
    assert set(found) == set(expected) == set(SHARES)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4)


def test_kinds_without_pairs_are_left_out():
    affinity = torch.full((1, len(half_disc(2)), 4, 4), 0.5)
    assert set(pair_losses(affinity, torch.zeros(1, 4, 4, dtype=torch.uint8), 2)) == {"background"}
    assert not pair_losses(affinity, torch.full((1, 4, 4), IGNORE, dtype=torch.uint8), 2)
    narrow = torch.full((1, len(half_disc(3)), 4, 4), 0.5)  # less than 2 cells to each side
    assert not pair_losses(narrow, torch.zeros(1, 4, 4, dtype=torch.uint8), 3)
    assert pair_losses(narrow, torch.zeros(1, 4, 4, dtype=torch.uint8), 3, "all")


def test_labels_are_taken_in_the_middle_of_cells(tiny_spec):
    masks = torch.full((1, 32, 32), IGNORE)
    masks[:, 2::4, 2::4] = 1
    learner = AffinityLearner(AffinityNetwork(make_backbone(tiny_spec), "irn", True), 3)
    assert set(learner.losses(MaskBatch(torch.randn(1, 3, 32, 32), masks, ["a"]), 0.0)) == {
        "foreground"
    }


@pytest.mark.parametrize("kind", ["irn", "psa"])
def test_training_tells_inside_from_across(tiny_spec, kind):
    """On a square of another colour the loss falls below that of knowing nothing."""
    images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    images[0, 0, 16:48, 16:48], labels[0, 16:48, 16:48] = 2.0, 1
    images[1, 1, 8:40, 24:56], labels[1, 8:40, 24:56] = 2.0, 2
    network = AffinityNetwork(make_backbone(tiny_spec), kind, True)
    learner = AffinityLearner(network, 5, "all")
    optimiser = torch.optim.Adam(learner.parameters(), 3e-3)
    batch = MaskBatch(images, labels, ["a", "b"])
    totals = []
    for _ in range(40):
        optimiser.zero_grad()
        total = sum(learner.losses(batch, 0.0).values())
        total.backward()
        optimiser.step()
        totals.append(float(total))
    assert totals[-1] < 0.6 * totals[0]
    assert totals[-1] < math.log(2)  # affinity 1/2 everywhere
    maps = learner.eval()(images).scores
    if kind == "irn":
        assert maps.min() >= 0 and maps.max() <= 1
