"""Random walks: against dense matrix powers, published outputs, and known answers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.ops.random_walk import (
    _walk_on_gpu,
    edge_affinity,
    feature_affinity,
    half_disc,
    path,
    random_walk,
    random_walk_from_features,
)


def dense(height, width, radius, affinity):
    """(N, N) float64: 1 on the diagonal, affinity((y, x), (v, u)) of pairs closer than radius."""
    cells = [(y, x) for y in range(height) for x in range(width)]
    matrix = np.eye(len(cells))
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells[:i]):
            if (y - v) ** 2 + (x - u) ** 2 < radius**2:
                matrix[i, j] = matrix[j, i] = affinity((v, u), (y, x))
    return matrix


def walked(scores, matrix, beta, steps):
    """x T^steps of (K, h, w) scores."""
    transition = matrix**beta
    transition = np.linalg.matrix_power(transition / transition.sum(0), steps)
    return (scores.reshape(len(scores), -1) @ transition).reshape(scores.shape)


def by_edge(edge):
    """1 - the highest edge among cells of the pair's box less than 1 from the line through both."""

    def affinity(a, b):
        along = np.subtract(b, a)
        highest = 0.0
        for y in range(min(a[0], b[0]), max(a[0], b[0]) + 1):
            for x in range(min(a[1], b[1]), max(a[1], b[1]) + 1):
                aside = along[0] * (x - a[1]) - along[1] * (y - a[0])
                if aside**2 / (along**2).sum() < 1:
                    highest = max(highest, edge[y, x])
        return 1 - highest

    return affinity


def by_features(features):
    return lambda a, b: np.exp(-np.abs(features[:, *a] - features[:, *b]).mean())


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(2, 6),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_equals_the_dense_matrix_power(height, width, radius, steps, seed):
    """Sizes below the radius included."""
    torch.manual_seed(seed)
    scores, edge = torch.rand(2, 3, height, width), torch.rand(2, 1, height, width) ** 2
    features = torch.randn(2, 4, height, width)
    by_edges = random_walk(scores, edge, radius, 3, steps)
    by_likeness = random_walk_from_features(scores, features, radius, 4.5, steps)
    for b in range(2):
        x, e, f = (t[b].double().numpy() for t in (scores, edge, features))
        expected = walked(x * (1 - e), dense(height, width, radius, by_edge(e[0])), 3, steps)
        np.testing.assert_allclose(by_edges[b].numpy(), expected, atol=2e-6)
        expected = walked(x, dense(height, width, radius, by_features(f)), 4.5, steps)
        np.testing.assert_allclose(by_likeness[b].numpy(), expected, atol=2e-6)


def test_default_settings_on_a_larger_grid():
    scores, edge = torch.rand(1, 2, 17, 14), torch.rand(1, 1, 17, 14) ** 3
    x, e = scores[0].double().numpy(), edge[0].double().numpy()
    expected = walked(x * (1 - e), dense(17, 14, 5, by_edge(e[0])), 10, 256)
    np.testing.assert_allclose(random_walk(scores, edge)[0].numpy(), expected, atol=3e-6)


@pytest.mark.realdata
@pytest.mark.parametrize("number", [0, 1])
def test_published_outputs(oracle, number):
    published = oracle(f"random_walk_{number}")
    scores, edge = (torch.from_numpy(published[key])[None] for key in ("scores", "edge"))
    chosen = int(published["radius"]), float(published["beta"]), int(published["steps"])
    found = random_walk(scores, edge, *chosen)
    np.testing.assert_allclose(found[0].numpy(), published["walked"], atol=1e-4)


def test_two_cells_by_hand():
    scores = torch.tensor([0.2, 0.9]).reshape(1, 1, 1, 2)
    edge = torch.tensor([0.3, 0.1]).reshape(1, 1, 1, 2)
    x = torch.tensor([0.2 * 0.7, 0.9 * 0.9])
    pair = 0.7**4  # 1 - the higher of both edges
    shrink = ((1 - pair) / (1 + pair)) ** 3  # the difference loses this factor in three steps
    expected = x.mean() + shrink * (x - x.flip(0)) / 2
    torch.testing.assert_close(random_walk(scores, edge, beta=4, steps=3).flatten(), expected)
    features = torch.tensor([[1.0, 2.5], [0.0, -0.5]]).reshape(1, 2, 1, 2)
    pair = np.exp(-1.0) ** 2  # differences 1.5 and 0.5
    expected = torch.tensor([0.2 + 0.9 * pair, 0.9 + 0.2 * pair]) / (1 + pair)
    found = random_walk_from_features(scores, features, beta=2, steps=1)
    torch.testing.assert_close(found.flatten(), expected.float())


def test_a_constant_stays_and_so_does_the_mass_weighted_by_degrees():
    constant = torch.full((1, 1, 20, 30), 0.7)
    assert torch.equal(random_walk(constant, torch.zeros(1, 1, 20, 30)), constant)
    features = torch.randn(1, 4, 9, 8)
    assert torch.equal(
        random_walk_from_features(constant[..., :9, :8], features), constant[..., :9, :8]
    )
    scores = torch.rand(1, 2, 9, 8)
    degrees = dense(9, 8, 5, by_features(features[0].double().numpy())) ** 8
    degrees = torch.from_numpy(degrees.sum(0)).reshape(9, 8)
    found = random_walk_from_features(scores, features, steps=50)
    torch.testing.assert_close((found * degrees).sum((2, 3)), (scores * degrees).sum((2, 3)))
    assert found.amax() < scores.amax()
    assert found.amin() > scores.amin()


@pytest.mark.parametrize("slanted", [False, True])
def test_a_wall_of_edge_stops_the_walk(slanted):
    y, x = torch.meshgrid(torch.arange(14), torch.arange(18), indexing="ij")
    aside = x - (y // 2 + 4 if slanted else 8)
    edge, scores = (aside == 0).float(), (aside < 0).float()
    found = random_walk(scores[None, None], edge[None, None])[0, 0]
    assert found[aside >= 0].eq(0).all()
    torch.testing.assert_close(found[aside < 0], torch.ones(int((aside < 0).sum())))
    edge[5, 4 + 2 if slanted else 8] = 0  # a door
    assert random_walk(scores[None, None], edge[None, None])[0, 0][aside > 1].max() > 0.01


def test_offsets_and_paths():
    for radius, count in ((2, 4), (5, 34), (10, 152)):
        offsets = half_disc(radius)
        assert len(offsets) == len(set(offsets)) == count
        assert not {(-dy, -dx) for dy, dx in offsets} & set(offsets)
        assert all(dy * dy + dx * dx < radius**2 for dy, dx in offsets)
    assert path(0, 3) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert path(2, -2) == [(0, -1), (0, 0), (1, -2), (1, -1), (1, 0), (2, -2), (2, -1)]
    assert path(2, 3) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]


@pytest.mark.parametrize("kind", ["edge", "features"])
def test_affinities_by_definition_with_nothing_outside(kind):
    maps = torch.rand(1, 1 if kind == "edge" else 3, 6, 7)
    found = (edge_affinity if kind == "edge" else feature_affinity)(maps, 4)[0]
    maps = maps[0].double().numpy()
    affinity = by_edge(maps[0]) if kind == "edge" else by_features(maps)
    assert found.shape == (len(half_disc(4)), 6, 7)
    for (dy, dx), pairs in zip(half_disc(4), found, strict=True):
        for y in range(6):
            for x in range(7):
                inside = y + dy < 6 and 0 <= x + dx < 7
                expected = affinity((y, x), (y + dy, x + dx)) if inside else 0
                assert float(pairs[y, x]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("affinity", [edge_affinity, feature_affinity])
def test_gradient_against_finite_differences(affinity):
    """Values lie at least 0.03 apart, so that no step crosses a kink."""
    maps = 0.03 * (1 + torch.randperm(30)).float().reshape(1, 1, 5, 6)
    maps.requires_grad_()
    weights = torch.randn(1, len(half_disc(4)), 5, 6)
    (gradient,) = torch.autograd.grad((affinity(maps, 4) * weights).sum(), maps)
    for i in range(30):
        step = torch.zeros(30).index_fill(0, torch.tensor(i), 0.01).reshape(maps.shape)
        with torch.no_grad():
            change = affinity(maps + step, 4).double() - affinity(maps - step, 4).double()
        expected = float((change * weights).sum()) / 0.02
        assert float(gradient.flatten()[i]) == pytest.approx(expected, abs=2e-3)
    assert gradient.abs().max() > 0.1


def test_walk_on_other_devices_gives_the_same():
    scores, edge = torch.rand(2, 3, 20, 9), torch.rand(2, 1, 20, 9) ** 2
    affinity = edge_affinity(edge, 5) ** 10
    matrices = [torch.from_numpy(dense(20, 9, 5, by_edge(e[0].numpy()))) ** 10 for e in edge]
    scale = torch.stack([1 / m.sum(0).reshape(20, 9) for m in matrices]).float()
    found = _walk_on_gpu(scores * (1 - edge), affinity, scale, half_disc(5), 64)
    torch.testing.assert_close(found, random_walk(scores, edge, steps=64), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same():
    scores, edge = torch.rand(2, 3, 20, 9), torch.rand(2, 1, 20, 9)
    found = random_walk(scores.cuda(), edge.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), random_walk(scores, edge), atol=1e-5, rtol=0)


def test_threads_do_not_change_a_bit():
    scores, edge = torch.rand(1, 2, 70, 11), torch.rand(1, 1, 70, 11) ** 2
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(random_walk(scores, edge, steps=20))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_half_precision_is_walked_in_float32():
    scores, edge = torch.rand(1, 2, 7, 8).half(), torch.rand(1, 1, 7, 8).half()
    features = torch.randn(1, 3, 7, 8).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = random_walk(scores, edge), random_walk_from_features(scores, features)
    assert {f.dtype for f in found} == {torch.float32}
    assert torch.equal(found[0], random_walk(scores.float(), edge.float()))
    assert torch.equal(found[1], random_walk_from_features(scores.float(), features.float()))


def test_inputs_are_left_alone():
    scores, maps = torch.rand(2, 3, 8, 7).transpose(2, 3), torch.rand(2, 1, 8, 7).transpose(2, 3)
    copies = scores.clone(), maps.clone()
    scores.requires_grad_(), maps.requires_grad_()
    for walk in (random_walk, random_walk_from_features):
        found = walk(scores, maps, steps=3)
        assert not found.requires_grad
        assert torch.equal(found, walk(scores.contiguous(), maps.contiguous(), steps=3))
    assert torch.equal(scores, copies[0])
    assert torch.equal(maps, copies[1])


def test_refusals():
    scores, edge = torch.rand(2, 3, 6, 7), torch.rand(2, 1, 6, 7)
    for error, words, arguments in (
        (ValueError, "batch with scores", (scores[0], edge)),
        (TypeError, "floating-point", (scores.long(), edge)),
        (TypeError, "floating-point", (scores, edge.long())),
        (ValueError, "one channel, not 3", (scores, scores)),
        (ValueError, "as many of each", (scores, edge[:1])),
        (ValueError, "interpolate", (scores, edge[..., :4])),
        (ValueError, "radius must be at least 2", (scores, edge, 1)),
        (ValueError, "steps must be at least 1", (scores, edge, 5, 10, 0)),
    ):
        with pytest.raises(error, match=words):
            random_walk(*arguments)
    with pytest.raises(ValueError, match="interpolate"):
        random_walk_from_features(scores, scores[..., :4])
    with pytest.raises(ValueError, match="radius"):
        feature_affinity(scores, 0)
