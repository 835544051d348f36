"""A federation of made-up people: six unequal sites of drawn person crops, the same for the same seed.

Each site has its own people, clothes, light and cameras, as real sites do; each camera has its own view, colour cast,
sharpness and background, so that a match across cameras cannot be read off the raw pixels but can be learned.

    python -m fedklpr_jax.data.synthetic --show sites.png --seed 0
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fedklpr_jax.data import render
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import InputError, status_of

_SKINS = "#f6d7c3 #eac0a2 #d8a47f #b97f58 #8d5a3a #5f3b28"
_HAIRS = "#17130f #2e2018 #5a3a22 #8c5e34 #c9a15a #8a8a8a #a5451f"
_BACKWARDS = 0.2  # share of people who walk against the camera's usual direction
_SEEN = 0.8  # chance that a camera sees a person at all


@dataclasses.dataclass(frozen=True)
class Style:
    """What a site looks like.

    Colours are '#rrggbb' words in one string; `*_odds` are relative weights in the order of `render`.

    Attributes:
      brightness: mean exposure; `cast`: spread of the cameras' colour casts; `quality`: 0 (poor cameras) to 1 (good).
    """

    upper: str
    lower: str
    accent: str
    wall: str
    ground: str
    wall_kinds: tuple[str, ...]
    pattern_odds: tuple[float, ...]
    cut_odds: tuple[float, float, float]
    leg_odds: tuple[float, float, float]
    carried_odds: tuple[float, ...]
    hat_odds: tuple[float, float, float, float]
    logo: float
    back_print: float
    scarf: float
    brightness: float
    cast: float
    quality: float


#                 plain hoops stripes checks two-tone dots sash open yoke raglan
_CASUAL_PATTERNS = (5.0, 2.0, 1.0, 1.5, 1.5, 1.0, 0.5, 1.0, 1.0, 1.0)

STYLES: dict[str, Style] = {
    "summer": Style(
        upper="#f4f1e8 #ff8a5c #ffd23f #3bceac #f45b69 #4d9de0 #b8e0d2 #7768ae #f7b2bd #2d3047",
        lower="#e8dcc4 #6d9dc5 #2b4162 #c9ada7 #f2f2f2 #1f2a44 #8d6b48",
        accent="#ffffff #d62839 #1d3557 #ffb703 #2a9d8f #3a2e39",
        wall="#e9e4da #c9d6df #f3d9b1 #9fb8ad #d5c6e0",
        ground="#d8cfc4 #b9aea1 #efe9e1",
        wall_kinds=("windows", "columns"),
        pattern_odds=_CASUAL_PATTERNS,
        cut_odds=(8, 2, 0), leg_odds=(4, 4, 3), carried_odds=(4, 2, 3, 4, 0), hat_odds=(8, 2, 0, 0),
        logo=0.4, back_print=0.1, scarf=0.0, brightness=1.05, cast=0.14, quality=0.8,
    ),
    "campus": Style(
        upper="#7b2d26 #1d3557 #588157 #e9c46a #9d8189 #457b9d #bc6c25 #8d99ae #f1faee #5e548e",
        lower="#264653 #3a506b #1b263b #6b705c #a98467 #4a4e69 #3d405b",
        accent="#f1faee #e63946 #ffb703 #06d6a0 #222222 #e07a5f",
        wall="#6a994e #386641 #a7c957 #84a98c #52796f",
        ground="#a7a58a #8a8f76 #c2b89a",
        wall_kinds=("foliage", "bricks"),
        pattern_odds=_CASUAL_PATTERNS,
        cut_odds=(4, 6, 0), leg_odds=(7, 2, 1.5), carried_odds=(2, 7, 2, 1, 0), hat_odds=(7, 2, 1, 0),
        logo=0.5, back_print=0.15, scarf=0.1, brightness=1.0, cast=0.14, quality=0.6,
    ),
    "winter": Style(
        upper="#1d2233 #2b2b2e #3d3a36 #4a2f2a #26352f #59616b #6b1f2a #34495e #7a6f5d #8a7358",
        lower="#16181d #232a36 #30343b #3b2f2f #4a4f57",
        accent="#d62828 #f4a261 #2a9d8f #e9d8a6 #8ecae6 #9b5de5 #f1f1f1",
        wall="#6c757d #8d99ae #495057 #7f8c8d",
        ground="#6b6f73 #54585c #8b8d8f #c9a227",
        wall_kinds=("columns", "bricks", "windows"),
        pattern_odds=(6, 1, 0.5, 1.5, 1.5, 0, 0, 1.5, 1.5, 0.5),
        cut_odds=(0, 5, 5), leg_odds=(9, 0, 1), carried_odds=(3, 2, 2, 2, 4), hat_odds=(5, 1, 4, 0),
        logo=0.1, back_print=0.0, scarf=0.55, brightness=0.95, cast=0.13, quality=0.5,
    ),
    "office": Style(
        upper="#22262e #3c4657 #6c7a89 #dfe6ee #b7c9e2 #8a6f5a #f3efe6 #5b3a4a #2f4858",
        lower="#1f2328 #3a3f47 #5b5f66 #7a6a58 #2a3550",
        accent="#b5172f #2274a5 #f2b134 #1b998b #6a4c93 #2b2118",
        wall="#cfd8dc #b0bec5 #e0d7c6 #a1b5c1",
        ground="#9a8c7c #b8b2a7 #7d7f83",
        wall_kinds=("windows", "columns"),
        pattern_odds=(5, 0, 2, 1.5, 0, 0.3, 0, 5, 0.3, 0),
        cut_odds=(1, 8, 1), leg_odds=(8, 0, 3), carried_odds=(4, 1, 3, 4, 1), hat_odds=(1, 0, 0, 0),
        logo=0.15, back_print=0.0, scarf=0.15, brightness=0.98, cast=0.12, quality=0.9,
    ),
    "night": Style(
        upper="#e63946 #1d4ed8 #ffffff #ffb703 #2a9d8f #111827 #7c3aed #f77f00",
        lower="#1b263b #3a506b #222222 #f1f1f1 #5c677d",
        accent="#ffffff #ffd60a #111827 #e63946 #48cae4",
        wall="#1b1f3b #3c1642 #0b3954 #e07a5f #5f0f40",
        ground="#2f3e46 #354f52 #1f2421",
        wall_kinds=("crowd", "columns"),
        pattern_odds=(3, 3, 2, 0.5, 2, 0, 2, 0, 2, 2),
        cut_odds=(8, 2, 0), leg_odds=(6, 4, 0), carried_odds=(6, 2, 2, 0, 0), hat_odds=(5, 4, 1, 0),
        logo=0.4, back_print=0.6, scarf=0.35, brightness=0.78, cast=0.16, quality=0.4,
    ),
    "workwear": Style(
        upper="#ff7a00 #d7f205 #1f4e79 #3b5d38 #b22222 #6b6f73 #c2b280",
        lower="#1f2a44 #2f3e46 #4b4b4b #ff7a00 #6b705c",
        accent="#f4f4f4 #d7f205 #ff7a00 #111111 #1f77b4",
        wall="#b5651d #2e6f95 #7a9e7e #8b2f2f #d9d9d9",
        ground="#7d7461 #8f8a7c #66635b",
        wall_kinds=("containers",),
        pattern_odds=(3, 4, 2, 0, 2, 0, 1, 1, 3, 1),
        cut_odds=(3, 7, 0.5), leg_odds=(9, 1, 0), carried_odds=(6, 2, 1, 1, 0), hat_odds=(2, 1, 1, 7),
        logo=0.2, back_print=0.4, scarf=0.0, brightness=1.05, cast=0.12, quality=0.5,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SiteSpec:
    """The size and look of one site. The name seeds it, so a site stays the same whatever others stand beside it.

    Attributes:
      name: any word; two sites of one style but different names share no people.
      style: a key of `STYLES`.
      cameras: at least 2.
      train_ids, test_ids: people of each split, at least 2.
      images_per_camera: mean training pictures of one person under one camera, at least 1.
    """

    name: str
    style: str
    cameras: int
    train_ids: int
    test_ids: int
    images_per_camera: int


DEFAULT_SITES: tuple[SiteSpec, ...] = (
    SiteSpec("mall", "summer", 4, 76, 36, 3),
    SiteSpec("campus", "campus", 3, 60, 36, 3),
    SiteSpec("station", "winter", 4, 40, 30, 3),
    SiteSpec("office", "office", 3, 32, 28, 2),
    SiteSpec("arena", "night", 3, 14, 24, 3),
    SiteSpec("harbour", "workwear", 2, 11, 30, 3),
)


def _palette(words: str) -> np.ndarray:
    return np.array([[int(w[i : i + 2], 16) / 255 for i in (1, 3, 5)] for w in words.split()], np.float32)


def _colours(rng: np.random.Generator, words: str, n: int, spread: float = 0.035) -> np.ndarray:
    table = _palette(words)
    picked = table[rng.integers(len(table), size=n)] + spread * rng.standard_normal((n, 3))
    return np.clip(picked, 0.02, 0.98).astype(np.float32)


def _codes(rng: np.random.Generator, odds: Sequence[float], n: int) -> np.ndarray:
    weights = np.asarray(odds, float)
    return rng.choice(len(weights), size=n, p=weights / weights.sum())


def _people(rng: np.random.Generator, style: Style, n: int) -> render.People:
    def flag(chance: float) -> np.ndarray:
        return (rng.random(n) < chance).astype(np.float32)

    return render.People(
        stature=rng.uniform(0.9, 1.04, n),
        build=rng.uniform(0.84, 1.26, n),
        skin=_colours(rng, _SKINS, n, 0.015),
        hair=_colours(rng, _HAIRS, n, 0.015),
        hair_style=_codes(rng, (5, 4, 0.7, 1.5), n),
        hat=_codes(rng, style.hat_odds, n),
        hat_colour=_colours(rng, style.accent + " " + style.upper, n),
        cut=_codes(rng, style.cut_odds, n),
        upper=_colours(rng, style.upper, n),
        upper_second=_colours(rng, style.accent + " " + style.upper, n),
        pattern=_codes(rng, style.pattern_odds, n),
        pattern_scale=rng.uniform(0.8, 1.5, n),
        logo=_codes(rng, (1 - style.logo, *[style.logo / 3] * 3), n),
        back_print=flag(style.back_print),
        logo_colour=_colours(rng, style.accent, n),
        legs=_codes(rng, style.leg_odds, n),
        lower=_colours(rng, style.lower, n),
        lower_stripe=flag(0.2),
        shoes=_colours(rng, "#1a1a1a #f4f4f4 #6b4226 #b03a2e #2c3e50 #e0d6c3", n),
        carried=_codes(rng, style.carried_odds, n),
        carried_colour=_colours(rng, style.accent + " #3a2e26 #1c1c1e #7a5230", n),
        scarf=flag(style.scarf),
        scarf_colour=_colours(rng, style.accent, n),
    )


def _cameras(rng: np.random.Generator, style: Style, n: int) -> render.Cameras:
    # Views go round the circle from a random start, so that two cameras of a site rarely see the same side.
    turns = rng.permutation(n) * 2 * np.pi / n + rng.uniform(0, 2 * np.pi)
    warm = rng.standard_normal(n) * style.cast
    green = rng.standard_normal(n) * style.cast * 0.5
    gain = (
        np.exp(np.stack([warm, green, -warm], 1)) * (style.brightness * np.exp(0.11 * rng.standard_normal(n)))[:, None]
    )
    poor = 1 - style.quality
    return render.Cameras(
        yaw=turns + rng.uniform(-0.3, 0.3, n),
        pitch=rng.uniform(0.86, 1.12, n),
        gain=gain.astype(np.float32),
        contrast=rng.uniform(0.7, 1.2, n),
        saturation=rng.uniform(0.65, 1.2, n),
        gamma=rng.uniform(0.8, 1.25, n),
        haze=rng.uniform(0, 0.16, n) * poor,
        light=rng.uniform(-0.3, 0.3, n),
        blur=rng.uniform(0.05, 0.25 + 0.6 * poor, n),
        noise=rng.uniform(0.008, 0.012 + 0.04 * poor, n),
        horizon=rng.uniform(0.35, 0.72, n),
        wall_kind=np.array([render.WALLS.index(str(w)) for w in rng.choice(style.wall_kinds, n)]),
        wall=_colours(rng, style.wall, n),
        wall_second=_colours(rng, style.wall, n),
        ground=_colours(rng, style.ground, n),
        ground_second=_colours(rng, style.ground, n),
    )


def _shots(rng: np.random.Generator, style: Style, camera_yaw: np.ndarray) -> render.Shots:
    n = len(camera_yaw)
    turned = np.pi * (rng.random(n) < _BACKWARDS)
    return render.Shots(
        yaw=camera_yaw + turned + rng.normal(0, 0.3, n),
        stride=rng.uniform(0, 2 * np.pi, n),
        arms=rng.uniform(-0.02, 0.14, n) ** 2 * 4,
        tilt=rng.normal(0, 0.03, n),
        centre=0.25 + rng.normal(0, 0.018, n),
        top=rng.uniform(0.01, 0.07, n),
        size=rng.uniform(0.86, 1.0, n),
        exposure=np.exp(rng.normal(0, 0.09, n)),
        scroll=rng.uniform(0, 3, n),
        occluder=_codes(rng, (0.88, 0.05, 0.07), n),
        occluder_place=rng.uniform(-1, 1, n),
        occluder_colour=_colours(rng, style.wall + " " + style.ground, n),
    )


def _sightings(rng: np.random.Generator, people: int, cameras: int) -> np.ndarray:
    """Who is seen by which camera, bool [people, cameras], at least two cameras each."""
    seen = rng.random((people, cameras)) < _SEEN
    order = np.argsort(rng.random((people, cameras)), 1)
    np.put_along_axis(seen, order[:, :2], True, 1)
    return seen


def _check(spec: SiteSpec) -> None:
    if spec.style not in STYLES:
        raise InputError(f"site {spec.name!r}: style {spec.style!r} is unknown; give one of {', '.join(STYLES)}")
    for field, least in (("cameras", 2), ("train_ids", 2), ("test_ids", 2), ("images_per_camera", 1)):
        if getattr(spec, field) < least:
            raise InputError(f"site {spec.name!r}: {field} is {getattr(spec, field)}; give a whole number from {least}")


def _make_site(seed: int, spec: SiteSpec, height: int, width: int) -> Site:
    style = STYLES[spec.style]

    def stream(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(f"{spec.name}/{spec.style}".encode()), number])

    strangers = max(1, spec.test_ids // 8)
    people = _people(stream(0), style, spec.train_ids + spec.test_ids + strangers)
    cameras = _cameras(stream(1), style, spec.cameras)
    rng = stream(2)

    def pictures(who: np.ndarray, ids: np.ndarray, cams: np.ndarray) -> Images:
        shots = _shots(rng, style, cameras.yaw[cams])
        pixels = render.render(people.take(who), cameras.take(cams), shots, height, width, rng)
        names = tuple(f"{spec.name}/{i:04d}_c{c + 1}_{k:05d}" for k, (i, c) in enumerate(zip(ids, cams, strict=True)))
        return Images(pixels, ids.astype(np.int32), (cams + 1).astype(np.int32), names)

    who, cams = np.nonzero(_sightings(rng, spec.train_ids, spec.cameras))
    each = rng.integers(max(1, spec.images_per_camera - 1), spec.images_per_camera + 2, len(who))
    who, cams = np.repeat(who, each), np.repeat(cams, each)
    train = pictures(who, who + 1, cams)

    who, cams = np.nonzero(_sightings(rng, spec.test_ids, spec.cameras))
    who += spec.train_ids
    query = pictures(who, who + 1, cams)
    who, cams = np.repeat(who, 2), np.repeat(cams, 2)
    other, other_cams = np.nonzero(_sightings(rng, strangers, spec.cameras))
    ids = np.concatenate([who + 1, np.zeros_like(other)])
    gallery = pictures(
        np.concatenate([who, other + spec.train_ids + spec.test_ids]), ids, np.concatenate([cams, other_cams])
    )
    return Site(spec.name, train, query, gallery)


def make_sites(
    seed: int, *, height: int = 64, width: int = 32, specs: Sequence[SiteSpec] = DEFAULT_SITES
) -> list[Site]:
    """Draws the sites of a federation; equal arguments give equal pictures.

    Within a site the training people are 1..train_ids and the test people follow; no person stands in two sites. The
    query holds one picture of each test person under each camera that saw them (at least two), the gallery two more of
    each and a few strangers under id 0. For a site that no client uses, ask for another `SiteSpec` name.

    Args:
      seed: any whole number from 0.
      height, width: pixels of a crop, at least 16 x 8. The drawing is made for crops twice as high as wide.
      specs: the sites, in the order wanted; names must differ.

    Returns:
      One `Site` per spec, pixels uint8 [n, height, width, 3].

    Raises:
      InputError: a spec, a size or the seed that cannot be drawn.

    >>> site, = make_sites(0, height=32, width=16, specs=[SiteSpec("pier", "summer", 2, 3, 2, 1)])
    >>> site.name, site.train.pixels.shape[1:]
    ('pier', (32, 16, 3))
    >>> sorted({int(i) for i in site.train.ids}), sorted({int(i) for i in site.query.ids})
    ([1, 2, 3], [4, 5])
    """
    if seed < 0:
        raise InputError(f"data.seed: {seed} is not allowed; give a whole number from 0")
    if height < 16 or width < 8:
        raise InputError(
            f"data.height x data.width: {height} x {width} is too small to draw a person; give at least 16 x 8"
        )
    names = [spec.name for spec in specs]
    for spec in specs:
        _check(spec)
        if names.count(spec.name) > 1:
            raise InputError(f"site {spec.name!r}: the name is used twice; give every site its own name")
    return [_make_site(seed, spec, height, width) for spec in specs]


def contact_sheet(sites: Sequence[Site], *, people: int = 4, shots: int = 9, zoom: int = 2) -> Image.Image:
    """Test pictures of a few people per site on one page: a row is a person, its pictures are sorted by camera."""
    height, width = (side * zoom for side in sites[0].query.pixels.shape[1:3])
    gap, head = 3, 26
    block = (shots * (width + gap) + 12, people * (height + gap) + head + 10)
    columns = min(2, len(sites))
    page = Image.new("RGB", (columns * block[0] + 12, -(-len(sites) // columns) * block[1] + 12), "#f7f7f5")
    draw = ImageDraw.Draw(page)
    for number, site in enumerate(sites):
        left, top = 12 + (number % columns) * block[0], 8 + (number // columns) * block[1]
        ids = np.unique(site.query.ids)
        trained = f"{len(np.unique(site.train.ids))} people, {len(site.train)} pictures to train"
        caption = f"{site.name}: {trained}; {len(ids)} people to test"
        draw.text((left, top), caption, fill="#222222", font_size=15)
        for row, person in enumerate(ids[:people]):
            pixels, cams = (
                np.concatenate([getattr(part, field)[part.ids == person] for part in (site.query, site.gallery)])
                for field in ("pixels", "cams")
            )
            for column, shot in enumerate(np.argsort(cams, kind="stable")[:shots]):
                tile = Image.fromarray(pixels[shot]).resize((width, height), Image.Resampling.BICUBIC)
                place = (left + column * (width + gap), top + head + row * (height + gap))
                page.paste(tile, place)
                draw.text(
                    (place[0] + 3, place[1] + 1),
                    f"c{cams[shot]}",
                    fill="#ffffff",
                    stroke_width=1,
                    stroke_fill="#222222",
                )
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the contact sheet; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fedklpr_jax.data.synthetic", description="Look at the made-up people."
    )
    parser.add_argument("--show", required=True, type=Path, metavar="FILE.png", help="where to write the contact sheet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args(arguments)
    return status_of(lambda: _show(options.show, options.seed, options.height, options.width))


def _show(path: Path, seed: int, height: int, width: int) -> None:
    if not path.parent.is_dir():
        raise InputError(f"--show: the folder {path.parent} does not exist; give a path in an existing folder")
    contact_sheet(make_sites(seed, height=height, width=width)).save(path, format="PNG")


if __name__ == "__main__":
    sys.exit(main())
