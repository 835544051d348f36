"""Draws people as a camera would see them: vectorised shapes with soft edges, then the camera's own faults.

Every argument is a table with one row per picture, so a few thousand pictures take seconds. Nothing here is random but
the sensor noise; who wears what, and which camera stands where, is chosen in `synthetic.py`.

Body coordinates: y runs from 0 (top of the head) to 1 (soles), x is 0 on the body's axis, both in body heights. A body
point has a lateral place l and a forward place f; seen under yaw it lands at x = l cos(yaw) + f sin(yaw): yaw 0 is the
front, pi the back.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

HAIR = ("short", "long", "bald", "bun")
HATS = ("none", "cap", "beanie", "helmet")
CUTS = ("tee", "jacket", "coat")
PATTERNS = ("plain", "hoops", "stripes", "checks", "two-tone", "dots", "sash", "open", "yoke", "raglan")
LOGOS = ("none", "disc", "square", "bar")
LEGS = ("trousers", "shorts", "skirt")
CARRIED = ("none", "backpack", "shoulder bag", "handbag", "suitcase")
WALLS = ("windows", "bricks", "columns", "foliage", "containers", "crowd")
OCCLUDERS = ("none", "pillar", "barrier")

# Small enough that one plane of a batch stays in the processor's cache.
_BATCH = 48


@dataclasses.dataclass(frozen=True)
class Table:
    """Equal-length columns; `take` picks rows of all of them."""

    def take(self, rows: np.ndarray) -> Self:
        """The rows `rows` (int [m]) of every column, in that order."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True)
class People(Table):
    """What stays with a person.

    Colours are float32 [n, 3] in 0..1, codes int [n] (index into the tuples above), sizes float32 [n].
    """

    stature: np.ndarray
    build: np.ndarray
    skin: np.ndarray
    hair: np.ndarray
    hair_style: np.ndarray
    hat: np.ndarray
    hat_colour: np.ndarray
    cut: np.ndarray
    upper: np.ndarray
    upper_second: np.ndarray
    pattern: np.ndarray
    pattern_scale: np.ndarray
    logo: np.ndarray
    back_print: np.ndarray
    logo_colour: np.ndarray
    legs: np.ndarray
    lower: np.ndarray
    lower_stripe: np.ndarray
    shoes: np.ndarray
    carried: np.ndarray
    carried_colour: np.ndarray
    scarf: np.ndarray
    scarf_colour: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cameras(Table):
    """What stays with a camera.

    `gain` float32 [n, 3] is its colour cast; `yaw` in radians; `blur` 0..1; `noise` in 0..1 grey.
    """

    yaw: np.ndarray
    pitch: np.ndarray
    gain: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    gamma: np.ndarray
    haze: np.ndarray
    light: np.ndarray
    blur: np.ndarray
    noise: np.ndarray
    horizon: np.ndarray
    wall_kind: np.ndarray
    wall: np.ndarray
    wall_second: np.ndarray
    ground: np.ndarray
    ground_second: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shots(Table):
    """What changes from picture to picture. Places and sizes in picture heights, angles in radians."""

    yaw: np.ndarray
    stride: np.ndarray
    arms: np.ndarray
    tilt: np.ndarray
    centre: np.ndarray
    top: np.ndarray
    size: np.ndarray
    exposure: np.ndarray
    scroll: np.ndarray
    occluder: np.ndarray
    occluder_place: np.ndarray
    occluder_colour: np.ndarray


def _col(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None]


def _rgb(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).T[:, :, None, None]


def _wave(t: np.ndarray, sharpness: float) -> np.ndarray:
    return np.clip(0.5 + sharpness * np.sin(np.float32(2 * np.pi) * t), 0, 1)


def _clothes_pattern(kind: str, x: np.ndarray, y: np.ndarray, scale: np.ndarray, front: np.ndarray) -> np.ndarray:
    """Share of the second colour, 0..1."""
    match kind:
        case "hoops":
            return _wave(y / (0.085 * scale), 3)
        case "stripes":
            return _wave(x / (0.075 * scale) + 0.25, 3)
        case "checks":
            return (_wave(y / (0.10 * scale), 4) + _wave(x / (0.085 * scale), 4)) / 2
        case "two-tone":
            return np.clip((y - 0.34) * 80, 0, 1)
        case "dots":
            return np.clip(3 * np.sin(x * 75 / scale) * np.sin(y * 65 / scale) - 0.9, 0, 1)
        case "sash":
            return np.clip((0.038 * scale - np.abs(x * np.sign(front) + 0.75 * (y - 0.34))) * 80, 0, 1)
        case "open":
            return np.clip((0.034 * scale - np.abs(x)) * 90, 0, 1) * (front > 0.2)
        case "yoke":
            return np.clip((0.275 - y) * 80, 0, 1)
        case _:
            return np.zeros_like(x)


def _wall_pattern(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of the wall's second colour, 0..1."""
    match kind:
        case "windows":
            return _wave(u * 2.6, 4) * _wave(v * 3.1 + 0.1, 4)
        case "bricks":
            courses = v * 10
            along = u * 5 + 0.5 * (np.floor(courses) % 2)
            return 0.7 * np.clip(
                np.maximum(np.abs(courses % 1 - 0.5) - 0.38, np.abs(along % 1 - 0.5) - 0.42) * 15, 0, 1
            )
        case "columns":
            return _wave(u * 1.5, 4)
        case "foliage":
            return np.clip(0.5 + 0.5 * (np.sin(13 * u + 3 * np.sin(9 * v)) + np.sin(21 * v + 4 * np.sin(11 * u))), 0, 1)
        case "containers":
            return 0.75 * _wave(u * 0.9 + 0.37 * np.floor(v * 3.3), 9) + 0.25 * _wave(u * 11, 1)
        case _:
            cells = np.sin(np.floor(u * 13) * 12.99 + np.floor(v * 15) * 78.23) * 437.5
            return cells - np.floor(cells)


def _by_kind(kinds: np.ndarray, names: tuple[str, ...], shape: tuple[int, ...], draw) -> np.ndarray:  # type: ignore[no-untyped-def]
    out = np.zeros(shape, np.float32)
    for code in np.unique(kinds):
        rows = np.flatnonzero(kinds == code)
        out[rows] = draw(names[code], rows)
    return out


class _Painter:
    """One batch of pictures in the making: `canvas` [3, n, h, w], `cover` the part of each that the figure takes."""

    def __init__(self, canvas: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: np.ndarray):
        self.canvas, self.x, self.y, self.pixel = canvas, x, y, pixel
        self.cover = np.zeros(canvas.shape[1:], np.float32)

    def fill(self, distance: np.ndarray, colour: np.ndarray, opacity: np.ndarray | float = 1.0) -> None:
        """Paints where the signed distance is negative; one pixel of soft edge stands in for supersampling."""
        mask = np.clip(0.5 - distance / self.pixel, 0, 1) * opacity
        self.canvas += mask * (colour - self.canvas)
        np.maximum(self.cover, mask, out=self.cover)

    def ellipse(self, cx: np.ndarray, cy: np.ndarray, rx: np.ndarray, ry: np.ndarray) -> np.ndarray:
        return (np.sqrt(((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2) - 1) * np.minimum(rx, ry)

    def box(self, cx: np.ndarray, cy: np.ndarray, hx: np.ndarray, hy: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(self.x - cx) - hx, np.abs(self.y - cy) - hy)

    def limb(self, a: tuple, b: tuple, radius_a: np.ndarray, radius_b: np.ndarray) -> np.ndarray:
        """A tapered capsule from point a to point b."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        t = np.clip(((self.x - a[0]) * dx + (self.y - a[1]) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
        return np.hypot(self.x - a[0] - t * dx, self.y - a[1] - t * dy) - (radius_a + t * (radius_b - radius_a))


def _scenery(cameras: Cameras, shots: Shots, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The empty place behind the person, float32 [3, n, h, w]."""
    shape = (len(shots.scroll), down.shape[1], across.shape[2])
    u, v = np.broadcast_to(across + _col(shots.scroll), shape), np.broadcast_to(down, shape)
    horizon = _col(cameras.horizon)
    share = _by_kind(cameras.wall_kind, WALLS, shape, lambda kind, rows: _wall_pattern(kind, u[rows], v[rows]))
    picture = _rgb(cameras.wall) + share * _rgb(cameras.wall_second - cameras.wall)
    depth = 0.25 / (np.maximum(v - horizon, 0) + 0.12)
    tiles = (
        np.maximum(_wave(depth * 2, 6) - 0.85, _wave((across - 0.25) * depth * 5 + _col(shots.scroll) * 3, 6) - 0.85)
        * 6
    )
    floor = _rgb(cameras.ground) + np.clip(tiles, 0, 1) * _rgb(cameras.ground_second - cameras.ground)
    below = np.clip((v - horizon) * 60, 0, 1)
    return picture + below * (floor * (0.8 + 0.25 * v) - picture)


def _figure(p: _Painter, who: People, shots: Shots) -> None:
    """Paints the person from the far side to the near side."""
    one = _col(np.ones(len(who.build)))
    c, s = _col(np.cos(shots.yaw)), _col(np.sin(shots.yaw))
    wide = _col(who.build)
    far = np.where(s > 0, one, -one)  # the lateral side turned away from the camera
    back, front = np.clip(0.5 - 4 * c, 0, 1), np.clip(0.5 + 4 * c, 0, 1)
    skin, upper, second, lower = _rgb(who.skin), _rgb(who.upper), _rgb(who.upper_second), _rgb(who.lower)
    carried, hair = _rgb(who.carried_colour), _rgb(who.hair)
    has = {name: _col(who.carried == code) for code, name in enumerate(CARRIED)}
    tee, coat = _col(who.cut == CUTS.index("tee")), _col(who.cut == CUTS.index("coat"))
    shorts, skirt = _col(who.legs == LEGS.index("shorts")), _col(who.legs == LEGS.index("skirt"))

    def at(lateral: np.ndarray | float, forward: np.ndarray | float) -> np.ndarray:
        return lateral * c + forward * s

    p.fill(p.ellipse(0 * one, 0.985 * one, 0.17 * wide, 0.022 * one), 0.06 * one[None], 0.5)
    p.cover[:] = 0  # the shadow lies on the ground, so the body's shading leaves it alone

    bag_x = at(0, -0.105)
    backpack = p.box(bag_x, 0.315 * one, (0.082 * np.abs(c) + 0.05 * np.abs(s)) * wide, 0.115 * one) - 0.012
    p.fill(backpack, carried * 0.85, has["backpack"])
    case_x = at(0.19, -0.1)
    p.fill(p.box(case_x, 0.83 * one, 0.07 * one, 0.125 * one) - 0.01, carried, has["suitcase"])
    p.fill(p.box(case_x, 0.83 * one, 0.052 * one, 0.012 * one), carried * 0.55, has["suitcase"])
    p.fill(p.box(case_x, 0.64 * one, 0.012 * one, 0.09 * one), 0.3 * one[None], has["suitcase"])
    long_hair = _col(who.hair_style == HAIR.index("long"))
    p.fill(p.box(at(0, -0.02), 0.16 * one, 0.062 * one, 0.08 * one) - 0.01, hair * 0.85, long_hair)

    swing = _col(np.sin(shots.stride)) * 0.115
    sway = _col(shots.arms)

    def arm(side: np.ndarray, tone: float) -> None:
        lateral, forward = side * 0.118 * wide, swing * side * 0.9
        shoulder = (at(lateral, 0), 0.205 * one)
        elbow = (at(lateral * 1.16 + side * 0.3 * sway, forward * 0.3), 0.34 * one)
        hand = (at(lateral * 1.14 + side * 0.5 * sway, forward + 0.03), 0.475 * one - 0.25 * np.abs(sway))
        raglan = _col(who.pattern == PATTERNS.index("raglan"))
        sleeve = (upper + raglan * (second - upper)) * tone
        lower_arm = p.limb(elbow, hand, 0.031 * one, 0.024 * one)
        p.fill(lower_arm - 0.008, sleeve * 0.55, 0.5)
        p.fill(lower_arm, sleeve + tee * (skin * tone - sleeve))
        p.fill(p.ellipse(hand[0], hand[1] + 0.015, 0.024 * one, 0.028 * one), skin * tone)
        p.fill(p.limb(shoulder, elbow, 0.038 * wide, 0.033 * one), sleeve)

    def leg(side: np.ndarray, tone: float) -> None:
        lateral, forward = side * 0.05 * wide, -swing * side
        hip = (at(lateral, 0), 0.52 * one)
        knee = (at(lateral * 1.05, forward * 0.55 + 0.02), 0.725 * one)
        foot = (at(lateral * 1.15, forward), 0.945 * one + 0.1 * forward * c)
        bare = np.maximum(shorts, skirt)
        p.fill(p.limb(knee, foot, 0.043 * one, 0.031 * one), (lower + bare * (skin - lower)) * tone)
        p.fill(p.limb(hip, knee, 0.06 * wide, 0.049 * one), (lower + skirt * (skin - lower)) * tone)
        stripe = (at(lateral + side * 0.035, 0), foot[1] * (1 - shorts) + shorts * 0.72)
        p.fill(
            p.limb(
                (at(lateral + side * 0.045, 0), hip[1]),
                (foot[0] + stripe[0] - hip[0], stripe[1]),
                0.012 * one,
                0.012 * one,
            ),
            _rgb(who.logo_colour) * tone,
            _col(who.lower_stripe) * (1 - skirt),
        )
        p.fill(
            p.ellipse(foot[0] + 0.022 * s, foot[1] + 0.028, 0.034 + 0.022 * np.abs(s), 0.024 * one),
            _rgb(who.shoes) * tone,
        )

    arm(far, 0.8)
    leg(far, 0.8)
    leg(-far, 1.0)
    flare = (0.08 + 0.16 * np.clip(p.y - 0.46, 0, 1)) * wide
    p.fill(np.maximum(np.abs(p.x) - flare, np.abs(p.y - 0.58) - 0.12), lower, skirt)

    # The torso narrows from shoulder to waist and again at the neck; a coat goes on to the knee and opens a little.
    hem = 0.525 + 0.22 * coat + 0.02 * (1 - tee)
    reach = (0.122 * np.abs(c) + 0.078 * np.abs(s)) * wide
    width = reach * (1 - 0.7 * np.clip(p.y - 0.2, 0, 0.25) + 0.9 * coat * np.clip(p.y - 0.5, 0, 1))
    width = width * np.sqrt(np.clip((p.y - 0.145) / 0.055, 0.02, 1))
    shape = _by_kind(
        who.pattern, PATTERNS, p.x.shape,
        lambda kind, rows: _clothes_pattern(kind, p.x[rows], p.y[rows], _col(who.pattern_scale[rows]), c[rows]),
    )  # fmt: skip
    p.fill(p.limb((0 * one, 0.12 * one), (0 * one, 0.18 * one), 0.034 * one, 0.036 * one), skin * 0.85)
    torso = np.maximum(np.abs(p.x) - width, np.abs(p.y - (hem + 0.15) / 2) - (hem - 0.15) / 2)
    p.fill(torso, upper + shape * (second - upper))

    logo_colour, chest = _rgb(who.logo_colour), at(0, 0.06)
    seen = np.clip(3 * c - 0.6, 0, 1)
    for code, name in enumerate(LOGOS):
        shown = _col(who.logo == code) * seen
        if name == "disc":
            p.fill(p.ellipse(chest, 0.29 * one, 0.045 * np.abs(c) + 0.01, 0.042 * one), logo_colour, shown)
        elif name == "square":
            p.fill(p.box(chest, 0.29 * one, 0.042 * np.abs(c), 0.04 * one), logo_colour, shown)
        elif name == "bar":
            p.fill(p.box(chest, 0.27 * one, 0.085 * np.abs(c) * wide, 0.02 * one), logo_colour, shown)
    number = np.minimum(
        p.box(0 * one, 0.27 * one, 0.05 * np.abs(c), 0.016 * one),
        p.box(0.02 * c, 0.33 * one, 0.018 * np.abs(c), 0.075 * one),
    )
    p.fill(number, logo_colour, _col(who.back_print) * np.clip(-3 * c - 0.6, 0, 1))
    straps = p.box(0 * one, 0.27 * one, 0.075 * np.abs(c) * wide, 0.1 * one)
    p.fill(np.maximum(straps, 0.045 * np.abs(c) * wide - np.abs(p.x)), carried * 0.8, has["backpack"] * front)
    shoulder_bag = at(-0.13, 0.02)
    strap = p.limb((at(0.07, 0), 0.18 * one), (shoulder_bag, 0.47 * one), 0.012 * one, 0.012 * one)
    p.fill(strap, carried * 0.7, has["shoulder bag"])
    p.fill(backpack, carried, has["backpack"] * back)
    p.fill(p.box(bag_x, 0.37 * one, 0.055 * np.abs(c) + 0.02, 0.03 * one), carried * 0.65, has["backpack"] * back)

    arm(-far, 0.94)
    bag_side = np.clip(0.75 + 2.5 * 0.5 * s, 0, 1)  # z of the person's bag side: hidden when that side is turned away
    p.fill(
        p.box(shoulder_bag, 0.52 * one, 0.05 + 0.022 * np.abs(s), 0.055 * one) - 0.008,
        carried,
        has["shoulder bag"] * bag_side,
    )
    hand_x = at(-0.15 * wide, 0.04)
    p.fill(p.box(hand_x, 0.53 * one, 0.02 * one, 0.035 * one), carried * 0.6, has["handbag"] * bag_side)
    p.fill(p.box(hand_x, 0.60 * one, 0.052 + 0.02 * np.abs(s), 0.045 * one) - 0.008, carried, has["handbag"] * bag_side)

    nod = 0.012 * s
    p.fill(p.ellipse(nod, 0.075 * one, 0.056 * one, 0.072 * one), skin)
    bald = _col(who.hair_style == HAIR.index("bald"))
    crown = np.maximum(p.ellipse(nod - 0.006 * s, 0.07 * one, 0.061 * one, 0.073 * one), p.y - 0.105)
    p.fill(crown, hair, 1 - bald)
    p.fill(p.box(at(0, -0.03), 0.14 * one, 0.055 * one, 0.075 * one) - 0.01, hair, long_hair * back)
    p.fill(
        p.ellipse(at(0, -0.055), 0.045 * one, 0.032 * one, 0.032 * one), hair, _col(who.hair_style == HAIR.index("bun"))
    )
    p.fill(
        p.ellipse(nod + 0.022 * s, 0.09 * one, 0.022 + 0.026 * np.clip(c, 0, 1), 0.05 * one),
        skin,
        np.clip(2.2 * c + 0.9, 0, 1),
    )
    eyes = p.ellipse(nod + 0.022 * s - 0.019 * c, 0.083 * one, 0.0085 * one, 0.009 * one)
    eyes = np.minimum(eyes, p.ellipse(nod + 0.022 * s + 0.019 * c, 0.083 * one, 0.0085 * one, 0.009 * one))
    p.fill(eyes, 0.12 * one[None], np.clip(3 * c - 0.5, 0, 1))
    hat, cap = _rgb(who.hat_colour), _col(who.hat == HATS.index("cap"))
    helmet, beanie = _col(who.hat == HATS.index("helmet")), _col(who.hat == HATS.index("beanie"))
    p.fill(np.maximum(p.ellipse(nod, 0.062 * one, 0.066 * one, 0.07 * one), p.y - 0.06), hat, np.maximum(cap, beanie))
    p.fill(p.box(nod, 0.062 * one, 0.066 * one, 0.012 * one), hat * 0.75, beanie)
    p.fill(
        p.ellipse(at(0, 0.07), 0.062 * one, 0.03 + 0.025 * np.abs(s), 0.013 * one),
        hat * 0.7,
        cap * np.clip(c + 0.9, 0, 1),
    )
    p.fill(np.maximum(p.ellipse(nod, 0.058 * one, 0.074 * one, 0.078 * one), p.y - 0.05), hat, helmet)
    p.fill(p.box(nod, 0.052 * one, 0.086 * one, 0.009 * one), hat * 0.85, helmet)
    scarf = p.box(0.01 * s, 0.163 * one, 0.062 * one, 0.022 * one) - 0.006
    p.fill(
        np.minimum(scarf, p.box(at(0.03, 0.06), 0.25 * one, 0.018 * one, 0.075 * one) + 0.1 * (c < 0)),
        _rgb(who.scarf_colour),
        _col(who.scarf),
    )


def _blur(picture: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Two passes of a three-tap filter along each side; `weight` 0 leaves the picture alone."""
    for axis in (2, 3, 2, 3):
        pad = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        wide = np.pad(picture, pad, mode="edge")
        size = picture.shape[axis]
        sides = np.take(wide, np.arange(size), axis) + np.take(wide, np.arange(2, size + 2), axis)
        picture = picture + weight * (sides / 2 - picture)
    return picture


def _sensor(
    picture: np.ndarray, cameras: Cameras, shots: Shots, across: np.ndarray, noise: np.random.Generator
) -> np.ndarray:
    """Light, cast, contrast, blur and noise of the camera; in and out float32 [3, n, h, w]."""
    light = 1 + _col(cameras.light) * (across / across.max() - 0.5)
    picture = picture * (light * _col(shots.exposure)) * _rgb(cameras.gain)
    grey = picture.mean(0)
    picture = grey + _col(cameras.saturation) * (picture - grey)
    picture = 0.45 + _col(cameras.contrast) * (picture - 0.45)
    picture = np.clip(picture, 0, 1.2) ** _col(cameras.gamma)
    picture = _blur(picture * (1 - _col(cameras.haze)) + 0.75 * _col(cameras.haze), _col(cameras.blur))
    return picture + noise.standard_normal(picture.shape, np.float32) * _col(cameras.noise)


def _batch(
    who: People, cameras: Cameras, shots: Shots, height: int, width: int, noise: np.random.Generator
) -> np.ndarray:
    down = ((np.arange(height, dtype=np.float32) + 0.5) / height)[None, :, None]
    # The picture is stretched to a 1:2 crop whatever its shape, as a detector's box would be.
    across = ((np.arange(width, dtype=np.float32) + 0.5) / width * 0.5)[None, None, :]
    canvas = _scenery(cameras, shots, across, down).astype(np.float32)
    size = _col(shots.size * who.stature)
    y = (down - _col(shots.top)) / size
    x = (across - _col(shots.centre)) / size + _col(shots.tilt) * (y - 0.5)
    # A camera high on the wall sees the legs shortened, a low one sees them long.
    y = np.where(y > 0, np.abs(y) ** _col(cameras.pitch), y)
    p = _Painter(canvas, x.astype(np.float32), y.astype(np.float32), (1 / (size * height)).astype(np.float32))
    _figure(p, who, shots)
    volume = 1.04 - 6 * p.x**2 + _col(cameras.light) * np.clip(p.x * 4, -1, 1) - 0.12 * p.y
    p.canvas *= 1 + p.cover * (volume - 1)
    place, colour = _col(shots.occluder_place), _rgb(shots.occluder_colour)
    pillar = np.broadcast_to(np.abs(across - 0.25 - 0.2 * place) - 0.055, p.x.shape)
    barrier = np.broadcast_to(0.8 + 0.1 * place - down, p.x.shape)
    p.pixel = _col(np.full(len(who.build), 1 / height))
    p.fill(pillar, colour, _col(shots.occluder == OCCLUDERS.index("pillar")))
    p.fill(barrier, colour, _col(shots.occluder == OCCLUDERS.index("barrier")))
    p.fill(np.abs(barrier + 0.05) - 0.012, colour * 0.6, _col(shots.occluder == OCCLUDERS.index("barrier")))
    picture = _sensor(p.canvas, cameras, shots, across, noise)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 3, 0)


def render(
    who: People, cameras: Cameras, shots: Shots, height: int, width: int, noise: np.random.Generator
) -> np.ndarray:
    """Pictures of `who` taken by `cameras`, row by row: uint8 [n, height, width, 3], RGB.

    Args:
      who, cameras, shots: tables of n rows each; row i of all three makes picture i.
      height, width: pixels; the scene always spans a 1:2 crop.
      noise: the sensor noise is drawn from here, in batches, so equal generators give equal pictures.
    """
    rows = np.arange(len(shots.yaw))
    out = np.empty((len(rows), height, width, 3), np.uint8)
    for start in range(0, len(rows), _BATCH):
        b = rows[start : start + _BATCH]
        out[b] = _batch(who.take(b), cameras.take(b), shots.take(b), height, width, noise)
    return out
