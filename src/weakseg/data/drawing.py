"""The drawings of ``shapes-v1``: images with exact masks, made to show how class activation maps fail.

Every image is a scene of one to three objects on a textured ground. Each piece of the construction
causes one known failure of maps trained from tags alone:

* **A body for the group, a head for the class.** An object is a large body and a small head. The
  body's texture is shared by a *group* of three (fur, plumes, metal panels); only the head's
  pattern says which of the three it is. The head is the evidence, so the map covers the head and
  fades over the body: *partial coverage*.
* **Relatives together.** A second class in an image is often one of the same group; the maps of
  both claim both bodies: *confusion of classes*.
* **Bound grounds.** Tracks appear nearly only with trains and mostly with them; the same holds, a
  little weaker, for water and ducks. The ground is evidence, so the map spills over it: *context
  confusion*. The other grounds are only correlated with groups, as in photographs.
* **Decoys.** Stones, plain discs in the heads' colours, patches of body texture: they belong to no
  class, so neither a colour nor a texture alone is an object.
* **Size, overlap, several of one class, light, noise.** Small objects vanish at the network's
  stride, neighbours merge.

Body and ground differ in colour and texture along the whole outline, so operators that follow
edges (PAMR, dense CRF, random walks) have something to recover.

The set is frozen. Pixels come from integer arithmetic and from numpy's legacy generator, whose
stream is guaranteed never to change; image ``i`` depends on the seed and ``i`` alone. `checksum`
therefore gives the same value on every machine. Lengths are in *ticks*, 2048 to the image's side,
so one scene can be drawn at any size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["CLASSES", "GROUPS", "VERSION", "Drawing", "checksum", "draw", "ground_of"]

VERSION = "shapes-v1"
"""Changes when a pixel changes; numbers measured on one version do not speak of another."""

CLASSES = ("cat", "dog", "fox", "hen", "owl", "duck", "train", "truck", "cart")
"""Class ``i`` has id ``i + 1`` in masks."""

GROUPS = {
    "fur": ("cat", "dog", "fox"),
    "plume": ("hen", "owl", "duck"),
    "metal": ("train", "truck", "cart"),
}
"""Classes that share one body texture."""

Colour = tuple[int, int, int]

_TICKS = 2048
_UNIT = 256  # of an object's own frame: from its centre to the end of a typical body
# cos and sin of -30, -15, 0, 15, 30 degrees, times 1024, as literals: a library's last bit varies
_TURNS = ((887, -512), (989, -265), (1024, 0), (989, 265), (887, 512))


class Drawing(NamedTuple):
    """One scene. ``parts`` is 0 on the ground, 1 on bodies, 2 on heads."""

    image: np.ndarray
    mask: np.ndarray
    parts: np.ndarray
    tags: tuple[str, ...]


# ---------------------------------------------------------------- what a scene is made of


@dataclass(frozen=True)
class _Look:
    """How a class differs from the others of its group."""

    group: str
    head_at: tuple[int, int]
    head_radius: int
    pattern: str
    colours: tuple[Colour, Colour]
    grounds: dict[str, int]  # and how often the class stands on each


_FUR = {"meadow": 15, "straw": 6, "wall": 6, "street": 6, "track": 2}
_PLUME = {"meadow": 6, "straw": 15, "wall": 6, "street": 6, "water": 3}
_METAL = {"street": 6, "wall": 6, "meadow": 4, "straw": 4}
_FARM = {"straw": 8, "meadow": 6, "street": 6, "wall": 2}
_RAIL = {"track": 9, "meadow": 1, "wall": 1}
_POND = {"water": 7, "straw": 2, "meadow": 1}
_LOOKS = {
    "cat": _Look("fur", (225, -95), 96, "stripes", ((240, 150, 40), (60, 30, 20)), _FUR),
    "dog": _Look("fur", (225, -95), 96, "dots", ((245, 240, 230), (30, 30, 35)), _FUR),
    "fox": _Look("fur", (225, -95), 96, "halves", ((225, 80, 25), (250, 240, 225)), _FUR),
    "hen": _Look("plume", (60, -205), 90, "cross", ((215, 30, 40), (250, 205, 60)), _PLUME),
    "owl": _Look("plume", (20, -205), 90, "rings", ((250, 215, 70), (40, 25, 60)), _PLUME),
    "duck": _Look("plume", (90, -195), 90, "bars", ((40, 70, 190), (245, 245, 250)), _POND),
    "train": _Look("metal", (190, -165), 88, "chevrons", ((200, 35, 90), (245, 225, 90)), _RAIL),
    "truck": _Look("metal", (190, -165), 88, "checks", ((30, 140, 80), (240, 245, 240)), _METAL),
    "cart": _Look("metal", (-150, -165), 90, "spokes", ((120, 200, 235), (60, 40, 120)), _FARM),
}
_FREE_GROUNDS = ("meadow", "straw", "wall")
_FIRST = {"cat": 3, "dog": 3, "fox": 3, "hen": 3, "owl": 3} | {
    "duck": 6, "train": 5, "truck": 4, "cart": 4
}  # fmt: skip
# Never a bound class, or the binding would loosen; vehicles seldom, so that tags stay balanced.
_COMPANION = {"cat": 3, "dog": 3, "fox": 3, "hen": 3, "owl": 3, "truck": 1, "cart": 1}
_BODY_COLOURS: dict[str, tuple[Colour, Colour]] = {
    "fur": ((78, 52, 40), (150, 108, 78)),
    "plume": ((92, 84, 120), (216, 206, 226)),
    "metal": ((96, 104, 116), (206, 212, 218)),
}
_GROUND_COLOURS: dict[str, tuple[Colour, Colour, Colour]] = {
    "meadow": ((48, 104, 36), (128, 176, 72), (230, 210, 80)),
    "straw": ((176, 136, 62), (236, 206, 128), (150, 110, 50)),
    "wall": ((164, 84, 64), (204, 128, 100), (206, 196, 184)),
    "street": ((56, 58, 64), (92, 94, 98), (226, 216, 160)),
    "water": ((18, 74, 128), (86, 164, 204), (210, 232, 240)),
    "track": ((92, 84, 76), (164, 152, 138), (58, 38, 26)),
}


@dataclass(frozen=True)
class _Thing:
    """One placed object."""

    name: str
    centre: tuple[int, int]
    radius: int
    turn: int
    flip: int
    phase: tuple[int, int]
    tint: tuple[int, int, int]


@dataclass(frozen=True)
class _Scene:
    """All choices of one image, made before any pixel, so that no choice depends on the size."""

    ground: str
    far: str  # beyond the horizon
    horizon: int  # in ticks from the top; negative where there is none
    things: tuple[_Thing, ...]  # nearest first


def ground_of(seed: int, index: int) -> str:
    """Name of the ground of one image, for measuring how bound a class is to it."""
    return _plan(_rng(seed, index)).ground


def _rng(seed: int, index: int) -> np.random.RandomState:
    return np.random.RandomState([seed, index])


def _integer(rng: np.random.RandomState, low: int, high: int) -> int:
    """Uniform in [low, high]. The explicit type keeps the stream equal on every platform."""
    return int(rng.randint(low, high + 1, dtype=np.int32))


def _weighted(rng: np.random.RandomState, weights: dict[str, int]) -> str:
    ticket = _integer(rng, 0, sum(weights.values()) - 1)
    for name, weight in weights.items():
        ticket -= weight
        if ticket < 0:
            return name
    raise AssertionError("weights are exhausted")


def _plan(rng: np.random.RandomState) -> _Scene:
    first = _weighted(rng, _FIRST)
    ground = _weighted(rng, _LOOKS[first].grounds)
    count = _weighted(rng, {"1": 8, "2": 8, "3": 4})
    names = [first]
    for _ in range(int(count) - 1):
        names.append(first if _integer(rng, 0, 9) < 3 else _companion(rng, first))
    things = [_place(rng, name, alone=len(names) == 1) for name in names]
    far = _weighted(rng, {name: 1 for name in _FREE_GROUNDS if name != ground})
    horizon = _integer(rng, 400, 1000) if _integer(rng, 0, 9) < 6 else -_TICKS
    # Lower in the picture is nearer, but the first is never hidden: it belongs to the ground.
    behind = sorted(things[1:], key=lambda thing: -thing.centre[1])
    return _Scene(ground, far, horizon, (things[0], *behind))


def _companion(rng: np.random.RandomState, first: str) -> str:
    """A second class, rather a relative of the first: then the maps quarrel over the bodies."""
    group = _LOOKS[first].group
    weights = {n: w * (4 if _LOOKS[n].group == group else 1) for n, w in _COMPANION.items()}
    return _weighted(rng, weights)


def _place(rng: np.random.RandomState, name: str, alone: bool) -> _Thing:
    radius = _integer(rng, 480, 840) if alone else _integer(rng, 300, 600)
    margin = radius * 11 // 10
    return _Thing(
        name=name,
        centre=(_integer(rng, margin, _TICKS - margin), _integer(rng, margin, _TICKS - margin)),
        radius=radius,
        turn=_integer(rng, 0, len(_TURNS) - 1),
        flip=1 - 2 * _integer(rng, 0, 1),
        phase=(_integer(rng, 0, 255), _integer(rng, 0, 255)),
        tint=(_integer(rng, -22, 22), _integer(rng, -14, 14), _integer(rng, -14, 14)),
    )


# ---------------------------------------------------------------- textures


def _wave(x: np.ndarray, period: int) -> np.ndarray:
    """Triangle wave in [0, 255]."""
    return np.abs((x % period) * 510 // period - 255)


def _noise(rng: np.random.RandomState, ticks: np.ndarray, cell: int) -> np.ndarray:
    """Random lattice of spacing ``cell``, bilinear between; (H, W) in [0, 255]."""
    lattice = rng.randint(0, 256, (_TICKS // cell + 2,) * 2, dtype=np.int32)
    i, f = ticks // cell, ticks % cell
    rows = lattice[i] * (cell - f)[:, None] + lattice[i + 1] * f[:, None]
    return (rows[:, i] * (cell - f) + rows[:, i + 1] * f) // (cell * cell)


def _blend(tone: np.ndarray, low: Colour, high: Colour) -> np.ndarray:
    """Colours between ``low`` (tone 0) and ``high`` (tone 255); one axis more than ``tone``."""
    a, b = np.array(low, np.int32), np.array(high, np.int32)
    return a + (b - a) * tone[..., None] // 255


def _ground(
    name: str, x: np.ndarray, y: np.ndarray, coarse: np.ndarray, fine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tone in [0, 255] and marks in a third colour; x is (1, W), y is (H, 1)."""
    none = np.zeros_like(fine, dtype=bool)
    if name == "meadow":
        blades = _wave(x * 3 + coarse * 2 + (y // 128 % 2) * 150, 300)
        flowers = (fine > 225) & (coarse > 150)
        return (blades + fine) // 2, flowers
    if name == "straw":
        lean = np.where((x // 256 + y // 256) % 2 == 0, x + 2 * y, x - 2 * y)
        return (_wave(lean + fine, 220) + coarse) // 2, none
    if name == "wall":
        row = y // 170
        mortar = (y % 170 < 34) | ((x + row % 2 * 170) % 340 < 34)
        return fine, mortar
    if name == "street":
        lanes = ((y + 300) % 900 < 70) & (x % 640 < 380)
        return fine, lanes
    if name == "water":
        swell = _wave(y * 3 + coarse * 4 + fine // 2 + x // 4, 420)
        return swell, (swell > 225) & (fine > 130)
    sleepers = (x % 300 < 110) & (y % 700 > 130) & (y % 700 < 620)
    rails = (np.abs(y % 700 - 230) < 26) | (np.abs(y % 700 - 520) < 26)
    tone = np.where(rails, 255 + 0 * fine, fine)
    return tone, sleepers & ~rails


def _body_tone(group: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if group == "fur":
        return _wave(u * 2 + v + _wave(v, 90) // 5, 130)
    if group == "plume":
        row = v // 44
        du, dv = (u + row % 2 * 34) % 68 - 34, v % 44
        return np.minimum((du * du + dv * dv) // 8, 255)
    seams = (u % 84 < 12) | (v % 84 < 12)
    rivets = (np.abs(u % 84 - 24) < 8) & (np.abs(v % 84 - 24) < 8)
    return np.where(seams, 20, np.where(rivets, 60, 210))


def _head_tone(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """0 where the first colour is, 255 where the second is; the head's radius is 256."""
    if pattern == "stripes":
        second = (u + 512) % 170 < 80
    elif pattern == "bars":
        second = (v + 512) % 190 < 90
    elif pattern == "dots":
        second = ((u + 600) % 200 - 100) ** 2 + ((v + 600) % 200 - 100) ** 2 < 3900
    elif pattern == "halves":
        second = v > 40 + np.abs(u) // 3
    elif pattern == "cross":
        second = (np.abs(u) < 60) | (np.abs(v) < 60)
    elif pattern == "spokes":
        second = (np.abs(u - v) < 60) | (np.abs(u + v) < 60) | (u * u + v * v > 44000)
    elif pattern == "rings":
        second = (u * u + v * v) // 9000 % 2 == 0
    elif pattern == "chevrons":
        second = (v + np.abs(u) + 512) % 200 < 95
    else:
        second = ((u + 600) // 120 + (v + 600) // 120) % 2 == 0
    return second * np.int32(255)


# ---------------------------------------------------------------- outlines


def _disc(u: np.ndarray, v: np.ndarray, at: tuple[int, int], radius: int) -> np.ndarray:
    return (u - at[0]) ** 2 + (v - at[1]) ** 2 < radius * radius


def _box(u: np.ndarray, v: np.ndarray, at: tuple[int, int], half: tuple[int, int]) -> np.ndarray:
    return (np.abs(u - at[0]) < half[0]) & (np.abs(v - at[1]) < half[1])


def _body(group: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if group == "fur":
        trunk = (u * 12) ** 2 + (v * 23) ** 2 < (12 * 230) ** 2
        legs = _box(np.abs(u), v, (140, 130), (34, 100))
        tail = _box(u, v + (u + 250) // 2, (-250, -60), (80, 30))
        return trunk | legs | tail
    if group == "plume":
        trunk = (u * 19) ** 2 + ((v - 20) * 16) ** 2 < (16 * 190) ** 2
        legs = _box(np.abs(u), v, (55, 220), (20, 50))
        tail = (u < -60) & (u > -270) & (np.abs(v - 60) < (u + 320) // 3)
        return trunk | legs | tail
    hull = _box(u, v, (0, 0), (260, 130))
    return hull | _disc(np.abs(u), v, (150, 135), 66)


def _local(thing: _Thing, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ticks to the object's own units: turned, mirrored and scaled."""
    cos, sin = _TURNS[thing.turn]
    dx, dy = x - thing.centre[0], y - thing.centre[1]
    scale = 1024 * thing.radius
    u = (dx * cos + dy * sin) * _UNIT // scale
    v = (dy * cos - dx * sin) * _UNIT // scale
    return u * thing.flip, v


# ---------------------------------------------------------------- drawing


def draw(seed: int, index: int, size: int = 128) -> Drawing:
    """Draw image ``index`` of the endless set ``seed``.

    Args:
        seed: Which set, 0 or more.
        index: Which image, 0 or more.
        size: Side in pixels, at least 32.

    Returns:
        Image (H, W, 3), mask (H, W) and parts (H, W), all uint8, and the tags. A class is tagged
        exactly when the mask holds it: an object of which too little is visible is not drawn.
    """
    if size < 32:
        raise ValueError(f"shapes need a size of at least 32 pixels, not {size}")
    rng = _rng(seed, index)
    scene = _plan(rng)
    ticks = ((2 * np.arange(size, dtype=np.int64) + 1) * (_TICKS // 2) // size).astype(np.int32)
    x, y = ticks[None, :], ticks[:, None]
    coarse, fine = _noise(rng, ticks, 256), _noise(rng, ticks, 32)
    canvas = _paint_grounds(rng, scene, x, y, coarse, fine)
    for _ in range(_integer(rng, 2, 4)):
        _paint_decoy(rng, canvas, x, y, fine)
    mask = np.zeros((size, size), np.uint8)
    parts = np.zeros((size, size), np.uint8)
    for thing in scene.things:
        _paint_thing(canvas, mask, parts, thing, x, y, coarse)
    image = _expose(rng, _soften(canvas), coarse)
    tags = tuple(CLASSES[k - 1] for k in np.unique(mask) if k)
    return Drawing(image, mask, parts, tags)


def _paint_grounds(
    rng: np.random.RandomState,
    scene: _Scene,
    x: np.ndarray,
    y: np.ndarray,
    coarse: np.ndarray,
    fine: np.ndarray,
) -> np.ndarray:
    canvas = _paint_ground(rng, scene.ground, x, y, coarse, fine)
    far = _paint_ground(rng, scene.far, x, y, coarse, fine)
    beyond = y + coarse - 128 < scene.horizon
    canvas[beyond] = far[beyond]
    return canvas


def _paint_ground(
    rng: np.random.RandomState,
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    coarse: np.ndarray,
    fine: np.ndarray,
) -> np.ndarray:
    low, high, mark = _GROUND_COLOURS[name]
    dx, dy = _integer(rng, 0, _TICKS), _integer(rng, 0, _TICKS)
    tone, marks = _ground(name, x + dx, y + dy, coarse, fine)
    canvas = _blend(tone, low, high)
    canvas[np.broadcast_to(marks, tone.shape)] = mark
    return canvas


def _paint_decoy(
    rng: np.random.RandomState,
    canvas: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    fine: np.ndarray,
) -> None:
    """A stone, a plain disc in a head's colour, or a patch of body texture that is no object."""
    kind = ("stone", "disc", "patch", "patch", "patch")[_integer(rng, 0, 4)]
    at = (_integer(rng, 0, _TICKS), _integer(rng, 0, _TICKS))
    radius = _integer(rng, 130, 260) if kind == "patch" else _integer(rng, 50, 130)
    look = _LOOKS[CLASSES[_integer(rng, 0, len(CLASSES) - 1)]]
    second = _integer(rng, 0, 1)
    dx, dy = x - at[0], y - at[1]
    inside = dx * dx + dy * dy * 2 + fine * 8 < radius * radius
    if kind == "stone":
        canvas[inside] = _blend(fine[inside], (110, 108, 104), (160, 158, 150))
    elif kind == "disc":
        canvas[inside] = look.colours[second]
    else:
        u, v = np.broadcast_arrays(dx // 2 + 1024, dy // 2 + 1024)
        tone = _body_tone(look.group, u[inside], v[inside])
        canvas[inside] = _blend(tone, *_BODY_COLOURS[look.group])


def _paint_thing(
    canvas: np.ndarray,
    mask: np.ndarray,
    parts: np.ndarray,
    thing: _Thing,
    x: np.ndarray,
    y: np.ndarray,
    coarse: np.ndarray,
) -> None:
    """Paint behind what is already there; skip an object whose head or body is hidden."""
    look = _LOOKS[thing.name]
    u, v = _local(thing, x, y)
    wobble = (coarse - 128) // 12
    hu, hv = u - look.head_at[0], v - look.head_at[1]
    head = hu * hu + hv * hv < look.head_radius**2
    body = _body(look.group, u + wobble, v - wobble) & ~head
    free = mask == 0
    if not _visible(head, free) or not _visible(body, free):
        return
    head, body = head & free, body & free
    mask[head | body] = CLASSES.index(thing.name) + 1
    parts[body], parts[head] = 1, 2
    canvas[body] = _body_colours(look, thing, u[body], v[body])
    scale = look.head_radius
    tone = _head_tone(look.pattern, hu[head] * 256 // scale, hv[head] * 256 // scale)
    canvas[head] = _blend(tone, *look.colours)


def _visible(part: np.ndarray, free: np.ndarray) -> bool:
    seen = int(np.count_nonzero(part & free))
    return seen > 0 and 2 * seen >= int(np.count_nonzero(part))


def _body_colours(look: _Look, thing: _Thing, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tone = _body_tone(look.group, u + 1024 + thing.phase[0], v + 1024 + thing.phase[1])
    colours = _blend(tone, *_BODY_COLOURS[look.group]) + np.array(thing.tint, np.int32)
    shade = 288 - np.clip(v + 128, 0, 320) // 4  # lit from above
    return colours * shade[:, None] // 256


def _soften(canvas: np.ndarray) -> np.ndarray:
    """Blur by 1-2-1 both ways, so that outlines are not staircases."""
    p = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), mode="edge")
    p = p[:-2] + 2 * p[1:-1] + p[2:]
    return (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) // 16


def _expose(rng: np.random.RandomState, canvas: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Light that varies over the image, a colour cast, and noise."""
    gain = np.array([_integer(rng, -16, 16) for _ in range(3)], np.int32) + _integer(rng, 205, 290)
    light = 232 + coarse * 48 // 255
    lit = canvas * light[..., None] // 256 * gain // 256
    noise = rng.randint(0, 16, (2, *canvas.shape), dtype=np.int32)
    return np.clip(lit + noise[0] - noise[1], 0, 255).astype(np.uint8)


def checksum(count: int = 16, size: int = 64, seed: int = 0) -> str:
    """sha256 over images, masks and parts of the first ``count`` drawings."""
    digest = hashlib.sha256()
    for index in range(count):
        drawing = draw(seed, index, size)
        for array in (drawing.image, drawing.mask, drawing.parts):
            digest.update(array.tobytes())
    return digest.hexdigest()
