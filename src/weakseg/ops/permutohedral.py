"""The permutohedral lattice: Gaussian filtering in few dimensions, in time linear in the points.

Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010. Points
are put into the plane of R^(d+1) whose coordinates sum to zero, which the lattice cuts into
simplices. Each value is splatted on the d + 1 vertices of its simplex with barycentric weights,
blurred with (1/2, 1, 1/2) along each of d + 1 directions, and sliced back with the same weights.
Only vertices of simplices that hold a point exist; a missing neighbour counts as zero.

Every sum is taken in an order that does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from weakseg.ops.threads import Split, bounds, jit

__all__ = ["LANES", "Lattice", "blurred", "build_lattice"]

LANES = 4  # values that are filtered side by side: index and weight are read once for all of them


@dataclass(frozen=True)
class Lattice:
    """The simplices of N points in d dimensions, M vertices in all.

    Attributes:
        vertices: (N, d + 1) int32, the vertices around each point.
        weights: (N, d + 1) float32, what the point takes from them.
        starts: (M + 1,) int64, where the points of each vertex start in ``points``.
        points: (N (d + 1),) int32, the points of vertex 0 in ascending order, then of vertex 1, ...
        point_weights: (N (d + 1),) float32, what the vertex takes from them.
        neighbours: (d + 1, M, 2) int32, both neighbours in each direction; M where there is none.
    """

    vertices: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    points: np.ndarray
    point_weights: np.ndarray
    neighbours: np.ndarray

    def scale(self, factors: np.ndarray, slicing: float, split: Split) -> None:
        """From now on filters ``factors * values`` and multiplies by ``slicing * factors``.

        Args:
            factors: (N,) float32.
            slicing: Factor of the result alone.
            split: Splits the work.
        """

        def work(part: int, parts: int) -> None:
            _scale_points(
                self.weights, factors * np.float32(slicing), *bounds(len(factors), part, parts)
            )
            _scale_vertices(
                self.points, self.point_weights, factors, *bounds(len(self.points), part, parts)
            )

        split(work)

    def buffers(self, lanes: int) -> tuple[np.ndarray, np.ndarray]:
        """Two (M + 1, lanes / LANES, LANES) arrays for :func:`blurred`; the last row stays zero."""
        shape = (len(self.starts), lanes // LANES, LANES)
        return np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def slice(
        self, blurred: np.ndarray, base: np.ndarray, out: np.ndarray, start: int, stop: int
    ) -> None:
        """Sets points ``start`` .. ``stop`` of ``out`` (N, lanes) to base + blurred value."""
        shape = (len(out), -1, LANES)
        base, out = base.reshape(shape), out.reshape(shape)
        _slice(self.vertices, self.weights, blurred, base, out, start, stop)


def build_lattice(features: np.ndarray, split: Split) -> Lattice:
    """Finds the simplices of points.

    Args:
        features: (d, N) float32, coordinates divided by the Gaussian's standard deviations.
        split: Splits the work.

    Raises:
        ValueError: The points spread over more lattice cells than 62 bits can number.
    """
    d, count = features.shape
    axes = np.arange(1, d + 1)
    # The blur has a standard deviation of sqrt(2/3) (d + 1) in the plane; the root, a unit axis.
    scales = (np.sqrt(2 / 3) * (d + 1) / np.sqrt(axes * (axes + 1))).astype(np.float32)
    strides = _strides(features, scales)

    vertices = np.empty((count, d + 1), np.int32)
    weights = np.empty((count, d + 1), np.float32)
    found: dict[int, np.ndarray] = {}

    def embed(part: int, parts: int) -> None:
        start, stop = bounds(count, part, parts)
        keys = np.empty((stop - start, d + 1), np.int64)
        _embed(features, scales, strides, keys, weights, start, stop)
        found[part], *_ = _number(keys, vertices[start:stop])

    split(embed)
    parts = len(found)
    # In the order of first use of all points, for any number of parts.
    merged = np.empty((sum(map(len, found.values())), 1), np.int32)
    keys = np.concatenate([found[part] for part in range(parts)])
    vertex_keys, table_keys, table = _number(keys[:, None], merged)
    size = len(vertex_keys)
    firsts = np.cumsum([0] + [len(found[part]) for part in range(parts)])
    counts = np.zeros((parts, size), np.int64)

    def count_uses(part: int, parts: int) -> None:
        start, stop = bounds(count, part, parts)
        _count(merged[firsts[part] :, 0], vertices[start:stop], counts[part])

    split(count_uses)
    ends = counts.T.ravel().cumsum().reshape(size, parts).T
    places = np.ascontiguousarray(ends - counts)
    starts = np.append(0, ends[-1])
    points = np.empty(count * (d + 1), np.int32)
    point_weights = np.empty(count * (d + 1), np.float32)
    # One step in direction j: coordinate j grows by d, the others fall by one.
    steps = np.append((d + 1) * strides, 0) - strides.sum()
    neighbours = np.full((d + 1, size, 2), size, np.int32)

    def link(part: int, parts: int) -> None:
        start, stop = bounds(count, part, parts)
        _list_points(vertices, weights, places[part], points, point_weights, start, stop)
        _connect(vertex_keys, table_keys, table, steps, neighbours, *bounds(size, part, parts))

    split(link)
    return Lattice(vertices, weights, starts, points, point_weights, neighbours)


def _strides(features: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(d,) int64 strides that give each lattice point within reach of the features its own key."""
    d = len(scales)
    # The plane's coordinates 0 .. d - 1 from the features; the last one follows from the sum.
    plane = np.triu(np.ones((d, d)))
    plane[np.arange(1, d), np.arange(d - 1)] = -np.arange(1, d)
    extent = np.abs(plane * scales) @ np.ptp(features, axis=1).astype(np.float64)
    sizes = np.ceil(extent) + 6 * (d + 1)  # room for a point's vertices and their neighbours
    if np.log2(sizes).sum() > 62:
        raise ValueError(
            "the kernel is too narrow for points this far apart; pass larger standard deviations"
        )
    return np.append(1, np.cumprod(sizes[:-1])).astype(np.int64)


def blurred(
    lattices: Sequence[Lattice],
    values: np.ndarray,
    buffers: Sequence[tuple[np.ndarray, np.ndarray]],
    split: Split,
) -> list[np.ndarray]:
    """Splats the same values on several lattices and blurs them, side by side.

    Args:
        lattices: Where to filter.
        values: (N, lanes) float32, a multiple of ``LANES`` of them.
        buffers: Two arrays for each lattice, from :meth:`Lattice.buffers`; overwritten.
        split: Splits the work.

    Returns:
        For each lattice the buffer with the result, for :meth:`Lattice.slice`.
    """
    values = values.reshape(len(values), -1, LANES)

    def splat(part: int, parts: int) -> None:
        for lattice, (first, _) in zip(lattices, buffers, strict=True):
            # Vertices have very different numbers of points: share the points out evenly.
            cuts = np.searchsorted(lattice.starts, bounds(len(lattice.points), part, parts))
            _splat(lattice.starts, lattice.points, lattice.point_weights, values, first, *cuts)

    def blur(direction: int, part: int, parts: int) -> None:
        for lattice, pair in zip(lattices, buffers, strict=True):
            if direction < len(lattice.neighbours):
                neighbours = lattice.neighbours[direction]
                old, new = pair[direction % 2], pair[(direction + 1) % 2]
                _blur(neighbours, old, new, *bounds(len(neighbours), part, parts))

    split(splat)
    for direction in range(max(len(lattice.neighbours) for lattice in lattices)):
        split(partial(blur, direction))
    return [
        pair[len(lattice.neighbours) % 2] for lattice, pair in zip(lattices, buffers, strict=True)
    ]


@jit
def _embed(features, scales, strides, keys, weights, start, stop):
    """Writes the keys of the vertices of points ``start`` .. ``stop``, and the weights on them."""
    d = len(features)
    side, inverse = np.int64(d + 1), np.float32(1 / (d + 1))
    all_strides = strides.sum()
    place = np.empty(d + 1, np.float32)
    corner = np.empty(d + 1, np.int64)
    rank = np.empty(d + 1, np.int64)
    order = np.empty(d + 1, np.int64)
    weight = np.empty(d + 2, np.float32)
    for i in range(start, stop):
        total = np.float32(0)
        for j in range(d, 0, -1):
            step = features[j - 1, i] * scales[j - 1]
            place[j] = total - np.float32(j) * step
            total += step
        place[0] = total

        # The nearest point of multiples of d + 1 need not lie in the plane.
        excess = np.int64(0)
        for j in range(d + 1):
            nearest = np.int64(np.floor(place[j] * inverse + np.float32(0.5)))
            corner[j] = nearest * side
            excess += nearest
        # The order of the remainders, largest first, names the simplex around that point.
        rank[:] = excess
        for j in range(d):
            left = place[j] - np.float32(corner[j])
            for k in range(j + 1, d + 1):
                if left < place[k] - np.float32(corner[k]):
                    rank[j] += 1
                else:
                    rank[k] += 1
        # Back into the plane: the coordinates that were rounded furthest go the other way.
        for j in range(d + 1):
            if rank[j] < 0:
                rank[j] += side
                corner[j] += side
            elif rank[j] > d:
                rank[j] -= side
                corner[j] -= side
            order[rank[j]] = j

        weight[:] = 0
        for j in range(d + 1):
            left = (place[j] - np.float32(corner[j])) * inverse
            weight[d - rank[j]] += left
            weight[d - rank[j] + 1] -= left
        weight[0] += np.float32(1) + weight[d + 1]

        key = np.int64(0)
        for j in range(d):
            key += corner[j] * strides[j]
        for j in range(d + 1):
            keys[i - start, j] = key
            weights[i, j] = weight[j]
            # On to the next vertex: one coordinate falls by d, the others grow by one.
            key += all_strides
            if order[d - j] < d:
                key -= side * strides[order[d - j]]


@jit
def _slot(key, table_keys, table):
    """Where the key is in the hash table, or the free slot where it belongs."""
    mask = np.uint64(len(table) - 1)
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while table[slot] >= 0 and table_keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@jit
def _number(keys, numbers):
    """Numbers distinct keys in the order of first use.

    Args:
        keys: (N, corners) int64.
        numbers: (N, corners) int32, written.

    Returns:
        The distinct keys, and the hash table as its keys and their numbers (-1 where free).
    """
    capacity = 1 << 10
    table_keys, table = np.empty(capacity, np.int64), np.full(capacity, -1, np.int32)
    found = np.empty(capacity // 2, np.int64)
    size = 0
    for i in range(keys.shape[0]):
        for j in range(keys.shape[1]):
            key = keys[i, j]
            if i > 0 and key == keys[i - 1, j]:  # usual for neighbouring pixels
                numbers[i, j] = numbers[i - 1, j]
                continue
            slot = _slot(key, table_keys, table)
            if table[slot] < 0:
                if 2 * size == capacity:
                    capacity *= 2
                    table_keys, table = (
                        np.empty(capacity, np.int64),
                        np.full(capacity, -1, np.int32),
                    )
                    for k in range(size):
                        slot = _slot(found[k], table_keys, table)
                        table_keys[slot], table[slot] = found[k], k
                    found = np.append(found, np.empty(capacity // 2 - size, np.int64))
                    slot = _slot(key, table_keys, table)
                found[size] = table_keys[slot] = key
                table[slot] = size
                size += 1
            numbers[i, j] = table[slot]
    return found[:size].copy(), table_keys, table


@jit
def _count(merged, vertices, counts):
    """Renames a part's vertices to those of all parts, and counts their uses."""
    for i in range(vertices.shape[0]):
        for j in range(vertices.shape[1]):
            v = merged[vertices[i, j]]
            vertices[i, j] = v
            counts[v] += 1


@jit
def _list_points(vertices, weights, places, points, point_weights, start, stop):
    """Lists points by vertex; ``places`` is where this part's first point of each vertex goes."""
    for i in range(start, stop):
        for j in range(vertices.shape[1]):
            v = vertices[i, j]
            points[places[v]], point_weights[places[v]] = i, weights[i, j]
            places[v] += 1


@jit
def _connect(vertex_keys, table_keys, table, steps, neighbours, start, stop):
    """Finds the neighbours one step on; each of them has this vertex one step back."""
    for j in range(len(steps)):
        for v in range(start, stop):
            slot = _slot(vertex_keys[v] + steps[j], table_keys, table)
            if table[slot] >= 0:
                neighbours[j, v, 0] = table[slot]
                neighbours[j, table[slot], 1] = v


@jit
def _scale_points(weights, factors, start, stop):
    for i in range(start, stop):
        for j in range(weights.shape[1]):
            weights[i, j] *= factors[i]


@jit
def _scale_vertices(points, point_weights, factors, start, stop):
    for k in range(start, stop):
        point_weights[k] *= factors[points[k]]


# Below, lanes are in groups: (N, groups, LANES).


@jit
def _splat(starts, points, point_weights, values, out, start, stop):
    for v in range(start, stop):
        for g in range(values.shape[1]):
            a = b = c = d = np.float32(0)
            for k in range(starts[v], starts[v + 1]):
                w, i = point_weights[k], points[k]
                a += w * values[i, g, 0]
                b += w * values[i, g, 1]
                c += w * values[i, g, 2]
                d += w * values[i, g, 3]
            out[v, g, 0], out[v, g, 1], out[v, g, 2], out[v, g, 3] = a, b, c, d


@jit
def _blur(neighbours, old, new, start, stop):
    half = np.float32(0.5)
    for v in range(start, stop):
        left, right = neighbours[v, 0], neighbours[v, 1]
        for g in range(old.shape[1]):
            for k in range(LANES):
                new[v, g, k] = old[v, g, k] + half * (old[left, g, k] + old[right, g, k])


@jit
def _slice(vertices, weights, blurred, base, out, start, stop):
    for i in range(start, stop):
        for g in range(out.shape[1]):
            a, b, c, d = base[i, g, 0], base[i, g, 1], base[i, g, 2], base[i, g, 3]
            for j in range(vertices.shape[1]):
                v, w = vertices[i, j], weights[i, j]
                a += w * blurred[v, g, 0]
                b += w * blurred[v, g, 1]
                c += w * blurred[v, g, 2]
                d += w * blurred[v, g, 3]
            out[i, g, 0], out[i, g, 1], out[i, g, 2], out[i, g, 3] = a, b, c, d
