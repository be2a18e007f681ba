"""The toybox world: nouns, contexts, colours, and the bodies that an instance is built of.

One vector of 16 numbers in [0, 1) is one instance: its proportions, colours and pattern. A view
adds the context, the camera and the light. Lengths are in world units; an object is about 2 high
or wide, stands on the plane y = 0, faces +z, and y points up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dbadapter.toybox.names import COLORS, CONTEXTS, NOUNS

__all__ = [
    "VECTOR_SIZE",
    "Instance",
    "Scene",
    "View",
    "bodies",
    "labels",
    "materials",
    "sample_instance",
    "sample_scene",
    "sample_view",
]

Array = npt.NDArray[np.float32]
Point = tuple[float, float, float]

VECTOR_SIZE = 16
_PATTERN_EDGES = (0.5, 0.7, 0.85)  # half of all instances are plain

# One row a body: kind, centre (3), rotation (9, rows map world to body), size (4), rounding, material.
BODY_WIDTH = 19
ELLIPSOID, BOX, CONE, TORUS, WEDGE = range(5)
# One row a material: colour (3), second colour (3), pattern, pattern scale.
MATERIAL_WIDTH = 8
BODY, ACCENT, DARK, WOOD, GLASS, GLOW = range(6)
_LONG = {"car", "house", "boat", "dog", "fish", "robot"}  # patterned on x and y, the others around y


@dataclass(frozen=True)
class Instance:
    """One object for ever: a noun and its vector, shape (16,), values in [0, 1)."""

    noun: str
    vector: Array

    @property
    def color(self) -> int:
        """Index of the body's colour in `COLORS`."""
        return int(self.vector[8] * len(COLORS))

    @property
    def accent(self) -> int:
        """Index of the accent colour, never the body's."""
        return (self.color + 1 + int(self.vector[9] * (len(COLORS) - 1))) % len(COLORS)

    @property
    def second_color(self) -> int:
        """Index of the pattern's second colour, never the body's."""
        return (self.color + 1 + int(self.vector[12] * (len(COLORS) - 1))) % len(COLORS)

    @property
    def pattern(self) -> int:
        """Index in `PATTERNS`."""
        return int(np.searchsorted(_PATTERN_EDGES, self.vector[11], side="right"))


@dataclass(frozen=True)
class View:
    """Where an instance stands and how it is seen; angles in radians."""

    context: int
    yaw: float
    elevation: float
    distance: float
    shift: tuple[float, float]
    light: float  # azimuth of the sun around y, 0 is behind the camera
    seed: float  # varies the clouds, the stars and the floor, in [0, 1)


@dataclass(frozen=True)
class Scene:
    """One picture to render."""

    instance: Instance
    view: View


def sample_instance(rng: np.random.Generator, noun: str | None = None) -> Instance:
    """Return a random instance of `noun`, or of a random noun."""
    name = noun if noun is not None else NOUNS[int(rng.integers(len(NOUNS)))]
    return Instance(name, rng.random(VECTOR_SIZE, dtype=np.float32))


def sample_view(rng: np.random.Generator, context: int | None = None) -> View:
    """Return a random view in `context` (an index of `CONTEXTS`), or in a random one."""
    place = int(rng.integers(len(CONTEXTS))) if context is None else context
    return View(
        context=place,
        yaw=math.radians(rng.uniform(-42, 42)),
        elevation=math.radians(rng.uniform(6, 15)),
        distance=float(rng.uniform(4.2, 4.9)),
        shift=(float(rng.uniform(-0.12, 0.12)), float(rng.uniform(-0.08, 0.08))),
        light=math.radians(float(rng.choice((-1, 1)) * rng.uniform(25, 65))),
        seed=float(rng.random()),
    )


def sample_scene(rng: np.random.Generator, noun: str | None = None, context: int | None = None) -> Scene:
    """Return a random instance in a random view; either may be fixed."""
    return Scene(sample_instance(rng, noun), sample_view(rng, context))


def labels(scene: Scene) -> tuple[int, int, int, int]:
    """Return the exact labels (noun, context, colour, pattern) as indices."""
    made = scene.instance
    return NOUNS.index(made.noun), scene.view.context, made.color, made.pattern


def materials(instance: Instance) -> Array:
    """Return the instance's materials, shape (6, 8): colour, second colour, pattern, pattern scale."""
    v = instance.vector
    palette = np.array(list(COLORS.values()), np.float32)

    def shade(index: int, jitter: float) -> Array:
        color = palette[index]
        return np.asarray(np.clip(color * (0.88 + 0.24 * jitter), 0, 1), np.float32)

    rows = np.zeros((6, MATERIAL_WIDTH), np.float32)
    rows[BODY, :3] = shade(instance.color, float(v[10]))
    rows[BODY, 3:6] = shade(instance.second_color, float(v[14]))
    rows[BODY, 6] = instance.pattern + (10 if instance.noun in _LONG else 0)
    rows[BODY, 7] = 0.38 + 0.12 * v[13]
    rows[ACCENT, :3] = shade(instance.accent, float(v[15]))
    rows[DARK, :3] = (0.08, 0.08, 0.09)
    rows[WOOD, :3] = (0.45, 0.28, 0.14)
    rows[GLASS, :3] = (0.62, 0.82, 0.95)
    rows[GLOW, :3] = (1.0, 0.62, 0.12)
    return rows


def _turn(axis: str, degrees: float) -> Array:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }[axis]
    return np.array(matrix, np.float32)


def _body(
    kind: int,
    center: Point,
    size: tuple[float, ...],
    material: int,
    turn: Array | None = None,
    rounding: float = 0.0,
) -> Array:
    row = np.zeros(BODY_WIDTH, np.float32)
    row[0] = kind
    row[1:4] = center
    row[4:13] = (np.eye(3, dtype=np.float32) if turn is None else turn.T).reshape(-1)
    row[13 : 13 + len(size)] = size
    row[17], row[18] = rounding, material
    return row


def _ball(center: Point, radii: Point, material: int, turn: Array | None = None) -> Array:
    return _body(ELLIPSOID, center, radii, material, turn)


def _box(
    center: Point, half: Point, material: int, turn: Array | None = None, rounding: float = 0.04
) -> Array:
    return _body(BOX, center, half, material, turn, rounding)


def _cone(
    center: Point, bottom: float, top: float, half_height: float, material: int, turn: Array | None = None
) -> Array:
    return _body(CONE, center, (bottom, top, half_height), material, turn, 0.02)


def _torus(center: Point, major: float, minor: float, material: int, turn: Array | None = None) -> Array:
    return _body(TORUS, center, (major, minor), material, turn)


def _wedge(
    center: Point,
    bottom: float,
    top: float,
    half_height: float,
    depth: float,
    material: int,
    turn: Array | None = None,
) -> Array:
    return _body(WEDGE, center, (bottom, top, half_height, depth), material, turn, 0.015)


def _mug(u: Array) -> list[Array]:
    r, h = 0.6 + 0.2 * u[0], 1.25 + 0.6 * u[1]
    top = r * (0.92 + 0.25 * u[2])
    ring = 0.3 + 0.12 * u[3]
    return [
        _cone((0, h / 2, 0), r, top, h / 2, BODY),
        _cone((0, h, 0), top - 0.1, top - 0.1, 0.03, DARK),
        _torus((0, h, 0), top - 0.03, 0.06, ACCENT, _turn("x", 90)),
        _torus((r + 0.6 * (top - r) + 0.05, h / 2, 0), ring, 0.1 + 0.04 * u[4], ACCENT),
    ]


def _teapot(u: Array) -> list[Array]:
    r, h = 0.72 + 0.12 * u[0], 0.55 + 0.2 * u[1]
    return [
        _ball((0, h, 0), (r, h, r), BODY),
        _cone((r + 0.12, h * 1.1, 0), 0.17, 0.09, 0.36 + 0.08 * u[2], ACCENT, _turn("z", -38)),
        _torus((-r - 0.02, h, 0), 0.32 + 0.1 * u[3], 0.085, ACCENT),
        _ball((0, 2 * h - 0.04, 0), (0.42, 0.14, 0.42), ACCENT),
        _ball((0, 2 * h + 0.16, 0), (0.12, 0.12, 0.12), ACCENT),
    ]


def _car(u: Array) -> list[Array]:
    length, high, cabin = 1.1 + 0.15 * u[0], 0.24 + 0.08 * u[1], 0.5 + 0.2 * u[2]
    at, wheel = -0.25 + 0.25 * u[3], 0.26 + 0.06 * u[4]
    floor = wheel + 0.02
    rows = [
        _box((0, floor + high, 0), (length, high, 0.5), BODY, None, 0.1),
        _wedge((at, floor + 2 * high + 0.2, 0), cabin + 0.14, cabin - 0.12, 0.22, 0.42, GLASS),
        _box((at, floor + 2 * high + 0.43, 0), (cabin - 0.08, 0.05, 0.43), BODY),
        _ball((length, floor + high, 0.3), (0.08, 0.1, 0.1), GLOW),
    ]
    for x in (-0.62 * length, 0.62 * length):
        for z in (-0.45, 0.45):
            rows.append(_cone((x, wheel, z), wheel, wheel, 0.1, DARK, _turn("x", 90)))
    rows.append(_cone((-0.62 * length, wheel, 0.53), 0.11, 0.11, 0.04, ACCENT, _turn("x", 90)))
    rows.append(_cone((0.62 * length, wheel, 0.53), 0.11, 0.11, 0.04, ACCENT, _turn("x", 90)))
    return rows


def _house(u: Array) -> list[Array]:
    w, h, d, roof = 0.75 + 0.2 * u[0], 0.5 + 0.15 * u[1], 0.55 + 0.2 * u[2], 0.28 + 0.14 * u[3]
    side = -0.35 if u[4] < 0.5 else 0.35
    return [
        _box((0, h, 0), (w, h, d), BODY, None, 0.01),
        _wedge((0, 2 * h + roof, 0), w + 0.2, 0.02, roof, d + 0.12, ACCENT),
        _box((side, 0.36, d), (0.16, 0.36, 0.05), WOOD, None, 0.01),
        _box((-side, h + 0.08, d), (0.18, 0.18, 0.05), GLASS, None, 0.01),
        _box((w * 0.5, 2 * h + roof * 1.3, -0.1), (0.1, roof * 0.8, 0.1), WOOD, None, 0.01),
    ]


def _robot(u: Array) -> list[Array]:
    w, h, leg = 0.45 + 0.15 * u[0], 0.4 + 0.12 * u[1], 0.26 + 0.1 * u[2]
    head, arm = 0.3 + 0.08 * u[3], 0.34 + 0.1 * u[4]
    top = 2 * leg + 2 * h + 0.06
    rows = [
        _box((0, 2 * leg + h, 0), (w, h, 0.3), BODY),
        _box((0, top + head * 0.8, 0), (head, head * 0.8, 0.26), BODY),
        _cone((0, top + 1.6 * head + 0.12, 0), 0.04, 0.04, 0.14, ACCENT),
        _ball((0, top + 1.6 * head + 0.28, 0), (0.1, 0.1, 0.1), ACCENT),
    ]
    for s in (-1, 1):
        rows.append(_ball((s * head * 0.45, top + head * 0.9, 0.27), (0.1, 0.1, 0.06), GLASS))
        rows.append(
            _box((s * (w + 0.14), 2 * leg + h + 0.1, 0), (0.1, arm, 0.12), ACCENT, _turn("z", s * 12))
        )
        rows.append(_box((s * w * 0.5, leg, 0.02), (0.15, leg, 0.17), ACCENT))
    return rows


def _tree(u: Array) -> list[Array]:
    trunk = 0.22 + 0.12 * u[1]
    rows = [_cone((0, trunk, 0), 0.17, 0.14, trunk, WOOD)]
    if u[0] < 0.5:
        w = 0.72 + 0.2 * u[2]
        for i in range(3):
            rows.append(_cone((0, 2 * trunk + 0.3 + 0.45 * i, 0), w * (1 - 0.24 * i), 0.06, 0.34, BODY))
    else:
        w, h = 0.68 + 0.2 * u[2], 0.66 + 0.2 * u[3]
        rows.append(_ball((0, 2 * trunk + h * 0.85, 0), (w, h, w), BODY))
        rows[0] = _cone((0, trunk + 0.1, 0), 0.17, 0.14, trunk + 0.1, WOOD)
    return rows


def _rocket(u: Array) -> list[Array]:
    r, h, nose = 0.34 + 0.12 * u[0], 0.55 + 0.2 * u[1], 0.28 + 0.1 * u[2]
    base = 0.28
    rows = [
        _cone((0, base + h, 0), r, r * 0.95, h, BODY),
        _cone((0, base + 2 * h + nose, 0), r * 0.97, 0.03, nose, ACCENT),
        _ball((0, base + 1.4 * h, r * 0.9), (0.16, 0.16, 0.08), GLASS),
        _cone((0, 0.18, 0), 0.1, r * 0.7, 0.14, DARK),
    ]
    for angle in (0, 120, 240):
        turn = _turn("y", angle + 90 * float(u[3] > 0.5))
        place = turn @ np.array([r + 0.1, 0.42, 0], np.float32)
        center = (float(place[0]), float(place[1]), float(place[2]))
        rows.append(_wedge(center, 0.32, 0.05, 0.38 + 0.08 * u[4], 0.06, ACCENT, turn))
    return rows


def _boat(u: Array) -> list[Array]:
    length, high = 0.95 + 0.2 * u[0], 0.22 + 0.1 * u[1]
    sail, at = 0.55 + 0.12 * u[2], -0.2 + 0.3 * u[3]
    return [
        _wedge((0, high, 0), length * 0.65, length, high, 0.42, BODY),
        _cone((at, 2 * high + sail, 0), 0.05, 0.04, sail + 0.1, WOOD),
        _wedge((at + 0.05, 2 * high + 0.16 + sail, 0.06), 0.5 + 0.2 * u[4], 0.02, sail - 0.04, 0.04, ACCENT),
    ]


def _bottle(u: Array) -> list[Array]:
    r, h, neck = 0.38 + 0.14 * u[0], 0.5 + 0.16 * u[1], 0.12 + 0.06 * u[2]
    top = 2 * h + 0.36
    return [
        _cone((0, h, 0), r, r, h, BODY),
        _cone((0, 2 * h + 0.16, 0), r, neck, 0.18, BODY),
        _cone((0, top + 0.12, 0), neck, neck, 0.2, BODY),
        _cone((0, top + 0.4, 0), neck + 0.05, neck + 0.05, 0.12, ACCENT),
    ]


def _snowman(u: Array) -> list[Array]:
    a, b, c = 0.56 + 0.1 * u[0], 0.42 + 0.08 * u[1], 0.32 + 0.05 * u[2]
    mid, head = a * 1.75 + b * 0.55, a * 1.75 + b * 1.4 + c * 0.75
    rows = [
        _ball((0, a * 0.95, 0), (a, a * 0.95, a), BODY),
        _ball((0, mid, 0), (b, b, b), BODY),
        _ball((0, head, 0), (c, c, c), BODY),
        _cone((0, head, c + 0.12), 0.09, 0.02, 0.17, GLOW, _turn("x", 90)),
        _torus((0, head - c * 0.75, 0), 0.26, 0.1, ACCENT, _turn("x", 90)),
        _cone((0, head + c * 0.8, 0), 0.38 + 0.06 * u[3], 0.38 + 0.06 * u[3], 0.03, DARK),
        _cone((0, head + c * 0.8 + 0.22, 0), 0.24, 0.22, 0.2, DARK),
    ]
    for s in (-1, 1):
        rows.append(_ball((s * 0.12, head + 0.09, c * 0.9), (0.06, 0.06, 0.05), DARK))
    return rows


def _dog(u: Array) -> list[Array]:
    length, fat, leg = 0.62 + 0.15 * u[0], 0.3 + 0.1 * u[1], 0.26 + 0.12 * u[2]
    y, head = 2 * leg + fat * 0.55, 0.32 + 0.06 * u[3]
    hx, hy = length + 0.12, y + fat * 0.6 + 0.26
    rows = [
        _ball((0, y, 0), (length, fat, fat * 0.95), BODY),
        _ball((hx, hy, 0), (head, head * 0.92, head * 0.85), BODY),
        _ball((hx + head * 0.95, hy - 0.08, 0), (0.22, 0.14, 0.16), ACCENT),
        _ball((hx + head * 0.95 + 0.2, hy - 0.04, 0), (0.07, 0.07, 0.07), DARK),
        _cone((-length - 0.1, y + 0.26, 0), 0.09, 0.05, 0.3, BODY, _turn("z", 35)),
    ]
    for s in (-1, 1):
        ear = _turn("x", -s * 12)
        rows.append(
            _ball((hx - 0.1, hy + 0.1, s * head * 0.85), (0.13, 0.26 + 0.1 * u[4], 0.08), ACCENT, ear)
        )
        rows.append(_ball((hx + head * 0.7, hy + 0.12, s * 0.15), (0.06, 0.07, 0.05), DARK))
        for x in (-0.62 * length, 0.62 * length):
            rows.append(_cone((x, leg, s * fat * 0.6), 0.11, 0.13, leg, BODY))
    return rows


def _fish(u: Array) -> list[Array]:
    length, h = 0.78 + 0.15 * u[0], 0.46 + 0.16 * u[1]
    y = h + 0.18
    return [
        _ball((0.15, y, 0), (length, h, 0.3), BODY),
        _wedge((-length - 0.02, y, 0), 0.42 + 0.1 * u[2], 0.08, 0.26, 0.06, ACCENT, _turn("z", -90)),
        _wedge((0.05, y + h + 0.06, 0), 0.38, 0.16 + 0.1 * u[3], 0.16, 0.05, ACCENT),
        _wedge((0.1, y - h - 0.02, 0), 0.1, 0.26, 0.13, 0.05, ACCENT),
        _ball((0.62 * length + 0.15, y + 0.12, 0.2), (0.13, 0.13, 0.08), GLASS),
        _ball((0.62 * length + 0.18, y + 0.12, 0.26), (0.06, 0.06, 0.05), DARK),
    ]


_BUILD: dict[str, Callable[[Array], list[Array]]] = {
    "mug": _mug, "teapot": _teapot, "car": _car, "house": _house, "robot": _robot, "tree": _tree,
    "rocket": _rocket, "boat": _boat, "bottle": _bottle, "snowman": _snowman, "dog": _dog, "fish": _fish,
}  # fmt: skip


def _reach(row: Array) -> Array:
    """Return the half extents of a body's axis-aligned box in the world, shape (3,)."""
    kind, size = int(row[0]), row[13:17]
    if kind in (ELLIPSOID, BOX):
        half = size[:3]
    elif kind == CONE:
        widest = max(size[0], size[1])
        half = np.array([widest, size[2], widest])
    elif kind == TORUS:
        half = np.array([size[0] + size[1], size[0] + size[1], size[1]])
    else:
        half = np.array([max(size[0], size[1]), size[2], size[3]])
    turn = row[4:13].reshape(3, 3).T
    return np.asarray(np.abs(turn) @ half + row[17], np.float32)


def bodies(instance: Instance) -> Array:
    """Return the instance's bodies, shape (n, 19), scaled to fit 2 by 2 units and centred on y's axis.

    Raises:
        KeyError: the noun is not in `NOUNS`.
    """
    rows = np.stack(_BUILD[instance.noun](instance.vector[:8].astype(np.float64)))
    reach = np.stack([_reach(row) for row in rows])
    low, high = (rows[:, 1:4] - reach).min(0), (rows[:, 1:4] + reach).max(0)
    extent = high - low
    scale = 2.0 / max(extent[1], extent[0] * 0.92)
    rows[:, 1] -= (low[0] + high[0]) / 2
    rows[:, 2] -= low[1]
    rows[:, 1:4] *= scale
    rows[:, 13:18] *= scale
    return rows
