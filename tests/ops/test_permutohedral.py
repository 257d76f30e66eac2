"""The lattice on its own: partition of unity, Gaussian response, same bits for any number of parts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.ops.permutohedral import LANES, blurred, build_lattice
from weakseg.ops.threads import splitter


def _filter(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) values filtered, without normalisation."""
    with splitter(1) as split:
        lattice = build_lattice(features, split)
        lanes = np.repeat(values[:, None], LANES, 1).astype(np.float32)
        spread = blurred([lattice], lanes, [lattice.buffers(LANES)], split)[0]
        out = np.zeros_like(lanes)
        lattice.slice(spread, out, out, 0, len(values))
    assert (out == out[:, :1]).all()
    return out[:, 0]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 60), st.floats(0.01, 30), st.integers(0, 2**32 - 1))
def test_points_lie_in_their_simplices(d, count, spread, seed):
    features = (np.random.default_rng(seed).normal(size=(d, count)) * spread).astype(np.float32)
    with splitter(1) as split:
        lattice = build_lattice(features, split)
    assert lattice.weights.min() > -1e-3 and lattice.weights.max() < 1 + 1e-3
    np.testing.assert_allclose(lattice.weights.sum(1), 1, atol=1e-3)
    assert all(len(set(row)) == d + 1 for row in lattice.vertices.tolist())
    size = len(lattice.starts) - 1
    assert set(lattice.vertices.ravel()) == set(range(size))
    for v in range(size):  # both listings of point and vertex say the same
        of_vertex = slice(*lattice.starts[v : v + 2])
        rows, corners = np.nonzero(lattice.vertices == v)
        np.testing.assert_array_equal(lattice.points[of_vertex], rows)
        np.testing.assert_array_equal(
            lattice.point_weights[of_vertex], lattice.weights[rows, corners]
        )


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_vertices_of_a_simplex_are_neighbours(d):
    # From one vertex of a simplex to the next is one step back, in each direction once.
    features = np.random.default_rng(0).normal(size=(d, 200)).astype(np.float32)
    with splitter(1) as split:
        lattice = build_lattice(features, split)
    size = len(lattice.starts) - 1
    for j in range(d + 1):
        on, back = lattice.neighbours[j].T
        has = on < size
        np.testing.assert_array_equal(back[on[has]], np.flatnonzero(has))
    ring = np.append(lattice.vertices, lattice.vertices[:, :1], 1)
    for row in ring.tolist():
        directions = [
            j
            for a, b in zip(row, row[1:], strict=False)
            for j in range(d + 1)
            if b == lattice.neighbours[j, a, 1]
        ]
        assert sorted(directions) == list(range(d + 1))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_it_filters_with_a_gaussian_of_deviation_one(d):
    axis = np.arange(-4, 4.01, 0.25 if d < 3 else 0.5, dtype=np.float32)
    features = np.stack(np.meshgrid(*[axis] * d, indexing="ij")).reshape(d, -1)
    distance = (features.astype(np.float64) ** 2).sum(0)
    found = _filter(features, (distance == 0).astype(float))
    found, expected = found / found.sum(), np.exp(-0.5 * distance)
    expected /= expected.sum()
    variance = (found * features.astype(np.float64) ** 2).sum(1)
    assert np.abs(found - expected).sum() < 0.2
    np.testing.assert_allclose(variance, 1, atol=0.35)  # splatting and slicing widen it


def test_it_is_linear_and_symmetric_up_to_rounding():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 150)).astype(np.float32)
    a, b = rng.random((2, 150))
    both = _filter(features, 2 * a + b)
    np.testing.assert_allclose(both, 2 * _filter(features, a) + _filter(features, b), rtol=1e-4)
    assert both.min() > 0


@pytest.mark.parametrize("d", [2, 5])
def test_any_number_of_parts_builds_the_same_lattice(d):
    features = np.random.default_rng(0).normal(size=(d, 1500)).astype(np.float32) * 3
    with splitter(1) as split:
        alone = build_lattice(features, split)
    for threads in (2, 3, 5):
        with splitter(threads) as split:
            shared = build_lattice(features, split)
        for name, array in vars(alone).items():
            np.testing.assert_array_equal(array, getattr(shared, name), err_msg=name)


def test_points_too_far_apart_are_refused():
    features = np.array([[0, 1e7]] * 5, dtype=np.float32)
    with splitter(1) as split, pytest.raises(ValueError, match="too narrow"):
        build_lattice(features, split)
