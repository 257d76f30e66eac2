"""CutMix: one box of another image, and tags that say how much of each is left."""

import pytest
import torch
from torch import Tensor

from weakseg.mixing import Scene, build_mix
from weakseg.mixing import cutmix as module

S = 16


def scene(count: int = 2, tags: Tensor | None = None) -> Scene:
    value = torch.arange(count)[:, None, None]
    return Scene(
        images=value[:, None].expand(count, 3, S, S).float(),
        tags=torch.eye(count) if tags is None else tags,
        labels=value.expand(count, S, S),
    )


def mixed(seed: int, of: Scene | None = None, **config: object) -> Scene:
    mix = build_mix({"name": "cutmix", **config}, 2)
    return mix(of or scene(), torch.Generator().manual_seed(seed))


def boxes(found: Scene) -> list[Tensor]:
    """Where each image is not its own; in a batch of two."""
    return [found.labels[i] != i for i in range(len(found.labels))]


@pytest.mark.parametrize("seed", range(8))
def test_one_box_is_hidden_and_tags_are_the_shares_that_are_left(seed: int):
    found = mixed(seed)
    for i, hidden in enumerate(boxes(found)):
        rows, columns = hidden.any(1), hidden.any(0)
        assert torch.equal(hidden, rows[:, None] & columns[None, :])
        for side in (rows, columns):  # one piece
            assert side.int().diff().abs().sum() <= 2
        share = hidden.float().mean().item()
        assert found.tags[i, i].item() == pytest.approx(1 - share)
        assert found.tags[i, 1 - i].item() == pytest.approx(share)


def test_the_box_has_the_area_that_was_drawn_unless_clipped(monkeypatch):
    monkeypatch.setattr(module, "beta_draws", lambda *_: torch.full((2,), 0.75).double())
    sides = []
    for seed in range(40):
        for hidden in boxes(mixed(seed)):
            sides += [int(hidden.any(0).sum()), int(hidden.any(1).sum())]
    assert max(sides) == 8  # sqrt(1 - .75) of 16
    assert 4 <= min(sides) < 8, "the centre is uniform, so some boxes are clipped"
    assert sides.count(8) > len(sides) // 3


def test_centres_are_everywhere(monkeypatch):
    monkeypatch.setattr(module, "beta_draws", lambda *_: torch.full((2,), 0.99).double())
    seen = sum(sum(boxes(mixed(seed))) for seed in range(250))
    quarters = [q.sum() for half in torch.as_tensor(seen).chunk(2) for q in half.chunk(2, dim=1)]
    assert min(quarters) > 0.7 * max(quarters)


def test_a_class_of_both_keeps_its_whole_tag():
    tags = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    found = mixed(3, scene(tags=tags))
    assert (found.tags[:, 1] == 1).all()
    share = boxes(found)[0].float().mean().item()
    assert 0 < share < 1
    assert found.tags[0, 0].item() == pytest.approx(1 - share)


def test_the_union_keeps_all_tags():
    assert (mixed(3, tags="union").tags == 1).all()
    assert torch.equal(mixed(3, tags="union", probability=0).tags, torch.eye(2))


def test_as_many_are_mixed_as_asked_for():
    untouched = mixed(0, probability=0)
    assert torch.equal(untouched.labels, scene().labels)
    assert torch.equal(untouched.images, scene().images)
    assert torch.equal(untouched.tags, scene().tags)
    count = sum(bool(h.any()) for seed in range(100) for h in boxes(mixed(seed, probability=0.3)))
    assert 30 < count < 90  # of 200
