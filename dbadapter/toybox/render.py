"""Draws toybox scenes: sphere tracing of a few simple bodies over a ground that names a context.

Distances to bodies are Inigo Quilez's closed forms (iquilezles.org/articles/distfunctions); the
kernels are compiled by numba, which only drawing needs (extra `pretrain`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

# numba's threads are OpenMP's, and torch's too from then on: who asked for one should get one.
os.environ.setdefault("NUMBA_NUM_THREADS", os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1))

import numba
import numpy as np
import numpy.typing as npt

from dbadapter.toybox import names, world

__all__ = ["render"]

_jit = numba.njit(cache=True, fastmath=True, inline="never")
_GRASS, _BEACH, _SNOW, _WOOD, _CARPET, _BRICKS, _NIGHT, _SKY, _WATER, _CLOTH, _PLAIN = range(11)
_TAN_HALF_FOV = math.tan(math.radians(17))


@_jit
def _hash(x, y):  # type: ignore[no-untyped-def]
    v = math.sin(x * 127.1 + y * 311.7) * 43758.5453
    return v - math.floor(v)


@_jit
def _noise(x, y):  # type: ignore[no-untyped-def]
    ix, iy = math.floor(x), math.floor(y)
    fx, fy = x - ix, y - iy
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    low = _hash(ix, iy) * (1 - fx) + _hash(ix + 1, iy) * fx
    high = _hash(ix, iy + 1) * (1 - fx) + _hash(ix + 1, iy + 1) * fx
    return low * (1 - fy) + high * fy


@_jit
def _distance_to(b, x, y, z):  # type: ignore[no-untyped-def]
    """Return the signed distance from a point to one body, a row of world.bodies."""
    dx, dy, dz = x - b[1], y - b[2], z - b[3]
    px = b[4] * dx + b[5] * dy + b[6] * dz
    py = b[7] * dx + b[8] * dy + b[9] * dz
    pz = b[10] * dx + b[11] * dy + b[12] * dz
    kind = int(b[0])
    if kind == 0:
        k0 = math.sqrt((px / b[13]) ** 2 + (py / b[14]) ** 2 + (pz / b[15]) ** 2)
        k1 = math.sqrt((px / b[13] ** 2) ** 2 + (py / b[14] ** 2) ** 2 + (pz / b[15] ** 2) ** 2)
        return k0 * (k0 - 1.0) / max(k1, 1e-6)
    if kind == 1:
        qx, qy, qz = abs(px) - b[13] + b[17], abs(py) - b[14] + b[17], abs(pz) - b[15] + b[17]
        outside = math.sqrt(max(qx, 0.0) ** 2 + max(qy, 0.0) ** 2 + max(qz, 0.0) ** 2)
        return outside + min(max(qx, max(qy, qz)), 0.0) - b[17]
    if kind == 3:
        q = math.sqrt(px * px + py * py) - b[13]
        return math.sqrt(q * q + pz * pz) - b[14]
    # capped cone (around y) and wedge (a trapezium drawn out along z) share their profile
    q = math.sqrt(px * px + pz * pz) if kind == 2 else abs(px)
    r1, r2, h = b[13], b[14], b[15]
    cap = max(0.0, q - (r1 if py < 0 else r2))
    cy = abs(py) - h
    k2x, k2y = r2 - r1, 2 * h
    t = min(1.0, max(0.0, ((r2 - q) * k2x + (h - py) * k2y) / (k2x * k2x + k2y * k2y)))
    sx, sy = q - r2 + k2x * t, py - h + k2y * t
    sign = -1.0 if (sx < 0 and cy < 0) else 1.0
    flat = sign * math.sqrt(min(cap * cap + cy * cy, sx * sx + sy * sy))
    if kind == 2:
        return flat - b[17]
    depth = abs(pz) - b[16]
    return min(max(flat, depth), 0.0) + math.sqrt(max(flat, 0.0) ** 2 + max(depth, 0.0) ** 2) - b[17]


@_jit
def _nearest(bodies, count, x, y, z):  # type: ignore[no-untyped-def]
    best, which = 1e9, 0
    for i in range(count):
        d = _distance_to(bodies[i], x, y, z)
        if d < best:
            best, which = d, i
    return best, which


@_jit
def _march(bodies, count, ox, oy, oz, dx, dy, dz, cy, radius):  # type: ignore[no-untyped-def]
    """Return (t, body) of the first hit within the bounding sphere around (0, cy, 0), or (-1, 0)."""
    b = ox * dx + (oy - cy) * dy + oz * dz
    c = ox * ox + (oy - cy) ** 2 + oz * oz - radius * radius
    root = b * b - c
    if root <= 0:
        return -1.0, 0
    root = math.sqrt(root)
    t, end = max(-b - root, 0.0), -b + root
    for _ in range(64):
        if t > end:
            break
        d, which = _nearest(bodies, count, ox + t * dx, oy + t * dy, oz + t * dz)
        if d < 0.004:
            return t, which
        t += 0.92 * d
    return -1.0, 0


@_jit
def _mix(a, b, t):  # type: ignore[no-untyped-def]
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t


@_jit
def _ground(context, x, z, s):  # type: ignore[no-untyped-def]
    """Return the colour of the ground at (x, z); `s` varies it from picture to picture."""
    x, z = x + 0.37 * s, z
    if context == 0:
        return _mix((0.24, 0.52, 0.14), (0.38, 0.66, 0.20), _noise(3 * x + 40 * s, 2 * z))
    if context == 1:
        if z < -1.6 + 0.12 * math.sin(2 * x + 6 * s):
            return _mix((0.10, 0.40, 0.66), (0.22, 0.56, 0.80), 0.5 + 0.5 * math.sin(5 * z + math.sin(x)))
        return _mix((0.86, 0.74, 0.50), (0.93, 0.83, 0.60), _noise(2 * x, 2 * z + 9 * s))
    if context == 2:
        return _mix((0.84, 0.88, 0.95), (0.97, 0.98, 1.0), _noise(0.9 * x + 30 * s, 0.9 * z))
    if context == 3:
        plank = math.floor(x / 0.55)
        edge = x / 0.55 - plank
        if edge < 0.09:
            return 0.30, 0.17, 0.08
        return _mix((0.52, 0.32, 0.16), (0.68, 0.44, 0.24), _hash(plank, 3.0))
    if context == 4:
        side = abs(x) - 1.7
        if side > 0.22:
            return 0.56, 0.55, 0.54
        if side > 0.0:
            return 0.90, 0.72, 0.22
        return 0.74, 0.05, 0.09
    if context == 5:
        row = math.floor(z / 0.5)
        shifted = x / 1.05 + 0.5 * (row % 2)
        brick = math.floor(shifted)
        if z / 0.5 - row < 0.15 or shifted - brick < 0.08:
            return 0.78, 0.74, 0.70
        return _mix((0.62, 0.25, 0.18), (0.74, 0.36, 0.26), _hash(brick, row))
    if context == 6:
        return 0.16, 0.18, 0.30
    if context == 8:
        wave = 0.5 + 0.5 * math.sin(4.2 * z + 0.9 * math.sin(1.7 * x + 7 * s) + 11 * s)
        return _mix((0.06, 0.36, 0.60), (0.24, 0.60, 0.78), wave * wave)
    if context == 9:
        a, b = math.floor(x / 0.6) % 2, math.floor(z / 0.6) % 2
        if a == 0 and b == 0:
            return 0.82, 0.12, 0.14
        if a != b:
            return 0.94, 0.58, 0.58
        return 0.97, 0.96, 0.94
    tint = 0.70 + 0.18 * _hash(s, 1.0)
    return tint + 0.1 * _hash(s, 2.0), tint + 0.1 * _hash(s, 3.0), tint + 0.1 * _hash(s, 4.0)


@_jit
def _backdrop(context, dx, dy, s, u, v):  # type: ignore[no-untyped-def]
    """Return the colour behind everything, for a ray that rises by dy; (u, v) is the screen, y up."""
    if context == 2:
        return _mix((0.80, 0.84, 0.90), (0.70, 0.77, 0.87), min(1.0, 3 * max(dy, 0.0)))
    if context == 3:
        return 0.87, 0.80, 0.66
    if context == 4:
        return 0.40, 0.38, 0.42
    if context == 9:
        return 0.80, 0.86, 0.76
    if context == 6:
        mx, my = (0.62 if s < 0.5 else -0.62) + 0.2 * (s - 0.5), 0.74
        if (u - mx) ** 2 + (v - my) ** 2 < 0.0225:
            return 0.97, 0.95, 0.80
        return _mix((0.07, 0.08, 0.20), (0.03, 0.03, 0.10), 0.5 + 0.5 * v)
    if context == 7:
        cloud = _noise(2.0 * u + 50 * s, 3.0 * v + 20 * s) * 0.7 + 0.3 * _noise(5 * u + 9 * s, 6 * v)
        cloud = min(1.0, max(0.0, (cloud - 0.46) * 5))
        blue = _mix((0.52, 0.78, 0.96), (0.26, 0.56, 0.90), 0.5 + 0.5 * v)
        return _mix(blue, (0.97, 0.98, 1.0), cloud)
    if context == 10:
        r, g, b = _ground(10, 0.0, 0.0, s)
        return r * 0.95, g * 0.95, b * 0.95
    return _mix((0.78, 0.89, 0.97), (0.50, 0.74, 0.94), min(1.0, 4 * max(dy, 0.0)))


@_jit
def _surface(row, px, py, pz):  # type: ignore[no-untyped-def]
    """Return a material's colour at a point in the object's own frame."""
    kind, scale = int(row[6]), row[7]
    flat = kind >= 10
    kind = kind % 10
    if kind == 0:
        return row[0], row[1], row[2]
    a = (
        px / scale + 0.5
        if flat
        else (
            math.atan2(px, pz) / (2 * math.pi) * 6 if scale > 0.44 else math.atan2(px, pz) / (2 * math.pi) * 8
        )
    )
    b = py / scale
    fa, fb = a - math.floor(a), b - math.floor(b)
    if kind == 1:
        second = math.floor(b) % 2 == 1
    elif kind == 2:
        second = (fa - 0.5) ** 2 + (fb - 0.5) ** 2 < 0.105
    else:
        second = (math.floor(a) + math.floor(b)) % 2 == 1
    if second:
        return row[3], row[4], row[5]
    return row[0], row[1], row[2]


@_jit
def _trace(bodies, count, mats, cam, ctx, s, cy, radius, u, v):  # type: ignore[no-untyped-def]
    """Return (r, g, b, is_object) of one ray through screen point (u, v) in [-1, 1], y up."""
    f = cam[12]
    dx = cam[9] + f * (u * cam[3] + v * cam[6])
    dy = cam[10] + f * (u * cam[4] + v * cam[7])
    dz = cam[11] + f * (u * cam[5] + v * cam[8])
    n = 1.0 / math.sqrt(dx * dx + dy * dy + dz * dz)
    dx, dy, dz = dx * n, dy * n, dz * n
    ox, oy, oz = cam[0], cam[1], cam[2]
    lx, ly, lz = cam[13], cam[14], cam[15]
    night = ctx == 6
    t, which = _march(bodies, count, ox, oy, oz, dx, dy, dz, cy, radius)
    if t > 0:
        px, py, pz = ox + t * dx, oy + t * dy, oz + t * dz
        e = 0.006
        b = bodies[which]
        nx = _distance_to(b, px + e, py, pz) - _distance_to(b, px - e, py, pz)
        ny = _distance_to(b, px, py + e, pz) - _distance_to(b, px, py - e, pz)
        nz = _distance_to(b, px, py, pz + e) - _distance_to(b, px, py, pz - e)
        n = 1.0 / max(math.sqrt(nx * nx + ny * ny + nz * nz), 1e-9)
        nx, ny, nz = nx * n, ny * n, nz * n
        c, sn = cam[16], cam[17]
        r, g, bl = _surface(mats[int(b[18])], c * px - sn * pz, py, sn * px + c * pz)
        lit = max(nx * lx + ny * ly + nz * lz, 0.0)
        if lit > 0:
            ts, _ = _march(
                bodies, count, px + 0.03 * nx, py + 0.03 * ny, pz + 0.03 * nz, lx, ly, lz, cy, radius
            )
            if ts > 0:
                lit *= 0.25
        shade = 0.52 + 0.12 * ny + 0.46 * lit
        hx, hy, hz = lx - dx, ly - dy, lz - dz
        n = 1.0 / math.sqrt(hx * hx + hy * hy + hz * hz)
        shine = 0.22 * max((nx * hx + ny * hy + nz * hz) * n, 0.0) ** 24 * (1.0 if lit > 0.3 else 0.0)
        r, g, bl = r * shade + shine, g * shade + shine, bl * shade + shine
        if night:
            r, g, bl = 0.55 * r + 0.01, 0.56 * g + 0.01, 0.68 * bl + 0.04
        return r, g, bl, 1.0
    wall = -3.2 if (ctx == 3 or ctx == 4 or ctx == 9) else -40.0
    if dy < -1e-4 and ctx != 7:
        t = -oy / dy
        px, pz = ox + t * dx, oz + t * dz
        if pz > wall:
            r, g, bl = _ground(ctx, px, pz, s)
            far = min(1.0, max(0.0, (t - 7.0) / 25.0))
            sr, sg, sb = _backdrop(ctx, dx, 0.0, s, u, v if ctx == 6 else 0.0)
            if not night:
                r, g, bl = r + (sr - r) * far, g + (sg - g) * far, bl + (sb - bl) * far
            ts, _ = _march(bodies, count, px, 0.01, pz, lx, ly, lz, cy, radius)
            if ts > 0:
                k = 0.62 if ctx != 8 else 0.78
                r, g, bl = r * k, g * k, bl * (k + 0.04)
            return r, g, bl, 0.0
    r, g, bl = _backdrop(ctx, dx, dy, s, u, v)
    return r, g, bl, 0.0


@numba.njit(cache=True, fastmath=True, parallel=True)
def _draw(bodies, counts, mats, cams, contexts, seeds, spheres, size, samples):  # type: ignore[no-untyped-def]
    n = len(counts)
    pictures = np.zeros((n, size, size, 3), np.uint8)
    masks = np.zeros((n, size, size), np.uint8)
    for i in numba.prange(n):
        for y in range(size):
            for x in range(size):
                r, g, b, m = 0.0, 0.0, 0.0, 0.0
                for k in range(samples * samples):
                    u = 2 * (x + (k % samples + 0.5) / samples) / size - 1
                    v = 1 - 2 * (y + (k // samples + 0.5) / samples) / size
                    cr, cg, cb, cm = _trace(
                        bodies[i],
                        counts[i],
                        mats[i],
                        cams[i],
                        contexts[i],
                        seeds[i],
                        spheres[i, 0],
                        spheres[i, 1],
                        u,
                        v,
                    )
                    r, g, b, m = r + min(cr, 1.0), g + min(cg, 1.0), b + min(cb, 1.0), m + cm
                w = 255.0 / (samples * samples)
                pictures[i, y, x, 0], pictures[i, y, x, 1] = int(r * w + 0.5), int(g * w + 0.5)
                pictures[i, y, x, 2], masks[i, y, x] = int(b * w + 0.5), int(m * w + 0.5)
    return pictures, masks


def _camera(scene: world.Scene, height: float) -> npt.NDArray[np.float64]:
    """Return the camera as 18 numbers: origin, right, up, forward, tangent, light, yaw (cos, sin)."""
    view = scene.view
    flying = names.CONTEXTS[view.context] == "in the sky"
    target = np.array([view.shift[0], height / 2 + view.shift[1] + (0.0 if flying else 0.10), 0])
    away = np.array([0, math.sin(view.elevation), math.cos(view.elevation)])
    origin = target + view.distance * away
    right = np.array([1.0, 0, 0])
    up = np.cross(away, right)
    sun = np.array([math.sin(view.light) * 0.8, 0.95, math.cos(view.light) * 0.9])
    sun /= np.linalg.norm(sun)
    turn = [math.cos(view.yaw), math.sin(view.yaw)]
    return np.concatenate([origin, right, up, -away, [_TAN_HALF_FOV], sun, turn])


def render(
    scenes: Sequence[world.Scene], size: int = 64, samples: int = 2
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the pictures of scenes and the masks of their objects.

    Args:
        scenes: any number of scenes; a scene gives the same picture whatever stands beside it.
        size: edge length in pixels.
        samples: rays along a pixel's edge, so samples squared a pixel.
    Returns:
        Pictures, shape (n, size, size, 3), sRGB; masks, shape (n, size, size), 255 inside.
    """
    n = len(scenes)
    built = [world.bodies(scene.instance) for scene in scenes]
    rows = np.zeros((n, max(map(len, built), default=1), world.BODY_WIDTH))
    for i, (scene, one) in enumerate(zip(scenes, built, strict=True)):
        c, s = math.cos(scene.view.yaw), math.sin(scene.view.yaw)
        turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        rows[i, : len(one)] = one
        rows[i, : len(one), 1:4] = one[:, 1:4] @ turn.T
        rows[i, : len(one), 4:13] = (one[:, 4:13].reshape(-1, 3, 3) @ turn.T).reshape(-1, 9)
    spheres = np.zeros((n, 2))
    heights = []
    for i, one in enumerate(built):
        reach = np.stack([world._reach(row) for row in one])
        height = float((one[:, 2] + reach[:, 1]).max())
        corner = np.abs(one[:, [1, 3]]) + reach[:, [0, 2]]
        spheres[i] = (
            height / 2,
            math.hypot(height / 2, float(np.hypot(corner[:, 0], corner[:, 1]).max())) + 0.02,
        )
        heights.append(height)
    cams = np.stack([_camera(scene, height) for scene, height in zip(scenes, heights, strict=True)])
    mats = np.stack([world.materials(scene.instance) for scene in scenes]).astype(np.float64)
    contexts = np.array([scene.view.context for scene in scenes])
    seeds = np.array([scene.view.seed for scene in scenes])
    counts = np.array([len(one) for one in built])
    pictures, masks = _draw(rows, counts, mats, cams, contexts, seeds, spheres, size, samples)
    return pictures, masks
