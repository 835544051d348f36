from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedklpr_jax.data import decoding
from fedklpr_jax.data.folder import MAX_BYTES, cross_camera_queries, read_site, read_sites
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import InputError
from tests.data.site_files import plain, zipped

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SIZE: dict[str, Any] = {"height": 8, "width": 4}

FILES = {
    "bounding_box_train/0002_c1s1_000001_01.jpg": 10,
    "bounding_box_train/0002_c12s1_000002_01.jpg": 20,
    "bounding_box_train/-1_c1s1_000003_01.jpg": 30,
    "bounding_box_train/0000_c1s1_000004_01.jpg": 40,
    "query/0005_c1s1_000001_00.png": 50,
    "query/0006_c3s1_000001_00.png": 60,
    "bounding_box_test/0005_c2s1_000001_00.png": 70,
    "bounding_box_test/0006_c3s2_000009_00.png": 80,
    "bounding_box_test/0000_c3s1_000001_00.png": 90,
    "bounding_box_test/-1_c3s1_000001_00.png": 100,
}


def picture(value: int, suffix: str = ".png", size: tuple[int, int] = (6, 12)) -> bytes:
    blob = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(blob, "JPEG" if suffix == ".jpg" else "PNG")
    return blob.getvalue()


def contents() -> dict[str, bytes]:
    return {path: picture(value, path[-4:]) for path, value in FILES.items()}


def bomb_png(width: int, height: int) -> bytes:
    """A tiny file that says it is huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def same(one: Site, two: Site) -> bool:
    return (one.name, one.refused) == (two.name, two.refused) and all(
        a.names == b.names
        and np.array_equal(a.pixels, b.pixels)
        and np.array_equal(a.ids, b.ids)
        and np.array_equal(a.cams, b.cams)
        for a, b in ((one.train, two.train), (one.query, two.query), (one.gallery, two.gallery))
    )


@pytest.mark.parametrize("build", [plain, zipped])
def test_names_give_person_and_camera(tmp_path: Path, build) -> None:
    site = read_site(build(tmp_path / "site", contents()), **SIZE)
    assert site.name == "site" and site.refused == ()
    assert site.train.names == (
        "bounding_box_train/0002_c12s1_000002_01.jpg",
        "bounding_box_train/0002_c1s1_000001_01.jpg",
    )
    assert site.train.ids.tolist() == [2, 2] and site.train.cams.tolist() == [12, 1]
    assert site.query.ids.tolist() == [5, 6] and site.query.cams.tolist() == [1, 3]
    assert site.gallery.ids.tolist() == [0, 5, 6] and site.gallery.cams.tolist() == [3, 2, 3]
    assert site.train.pixels.shape == (2, 8, 4, 3) and site.train.pixels.dtype == np.uint8
    assert site.train.ids.dtype == site.train.cams.dtype == np.int32
    assert site.train.pixels[:, 0, 0, 0].tolist() == [20, 10]
    assert site.gallery.pixels[:, -1, -1, 2].tolist() == [90, 70, 80]
    assert cross_camera_queries(site) == 1


def test_names_without_a_scene_are_read(tmp_path: Path) -> None:
    site = read_site(plain(tmp_path / "duke", contents() | {"query/0007_c8_f0046182.jpg": picture(1, ".jpg")}), **SIZE)
    assert (site.query.ids[-1], site.query.cams[-1]) == (7, 8)


def test_resize_antialiases(tmp_path: Path) -> None:
    files = contents()
    stripes = np.zeros((16, 4, 3), np.uint8)
    stripes[::2] = 200
    blob = io.BytesIO()
    Image.fromarray(stripes).save(blob, "PNG")
    files["query/0005_c1s1_000001_00.png"] = blob.getvalue()
    pixels = read_site(plain(tmp_path / "site", files), height=2, width=4).query.pixels[0]
    # Eight rows of 0 and 200 make one: their mean. Plain point sampling would give 0 or 200.
    assert np.all(np.abs(pixels.astype(int) - 100) <= 15)


def test_gray_palette_and_alpha_pictures_become_rgb(tmp_path: Path) -> None:
    files = contents()
    for number, mode in enumerate(("1", "L", "P", "LA", "RGBA")):
        blob = io.BytesIO()
        Image.new("L", (6, 12), 255).convert(mode).save(blob, "PNG")
        files[f"bounding_box_train/0003_c1s1_00000{number}_01.png"] = blob.getvalue()
    site = read_site(plain(tmp_path / "site", files), **SIZE)
    assert site.refused == () and np.all(site.train.pixels[site.train.ids == 3] == 255)
    assert (site.train.ids == 3).sum() == 5


@pytest.mark.parametrize("build", [plain, zipped])
@pytest.mark.parametrize("cached", [False, True])
def test_bad_files_are_refused_by_name_and_the_rest_is_read(tmp_path: Path, build, cached: bool) -> None:
    whole, sixteen = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 60, 3), np.uint8)).save(whole, "JPEG")
    Image.fromarray(np.full((12, 6), 40000, np.uint16)).save(sixteen, "PNG")
    bad = {
        "query/0005_c1s1_000002_00.jpg": (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated"),
        "query/0005_c1s1_000003_00.jpg": (b"", "0 bytes"),
        "query/0005_c1s1_000004_00.jpg": (b"no picture at all", "not a JPEG or PNG picture"),
        "query/0005_c1s1_000005_00.png": (picture(9)[:50], "does not decode"),
        "query/0005_c1s1_000006_00.png": (bomb_png(60000, 60000), "exceeds limit"),
        "query/0005_c1s1_000007_00.png": (bomb_png(5000, 5000), "5000x5000 pixels"),
        "query/0005_c1s1_000008_00.png": (sixteen.getvalue(), "8 bits a channel"),
        "query/five.jpg": (picture(9, ".jpg"), "not named like"),
        "query/notes.txt": (b"hello", "not named like"),
        "bounding_box_test/0005_cXs1_000001_00.png": (picture(9), "not named like"),
    }
    clutter = {"query/Thumbs.db": b"x", "query/.DS_Store": b"x"}
    files = contents() | {path: blob for path, (blob, _) in bad.items()} | clutter
    where = build(tmp_path / "site", files)
    cache = tmp_path / "cache" if cached else None
    site = read_site(where, **SIZE, cache=cache)
    assert len(site.refused) == len(bad)
    for path, (_, reason) in bad.items():
        (line,) = [line for line in site.refused if line.startswith(f"{path}: ")]
        assert reason in line and "\n" not in line and " at 0x" not in line
    good = read_site(build(tmp_path / "good" / "site", contents()), **SIZE)
    assert np.array_equal(site.query.pixels, good.query.pixels) and site.query.names == good.query.names
    assert np.array_equal(site.gallery.pixels, good.gallery.pixels)
    assert same(site, read_site(where, **SIZE, cache=cache))


def test_control_codes_in_a_name_stay_on_one_line(tmp_path: Path) -> None:
    (line,) = read_site(plain(tmp_path / "s", contents() | {"query/a\nb\x1b[2J.jpg": b"x"}), **SIZE).refused
    assert line.isprintable()


def test_broken_link_is_refused(tmp_path: Path) -> None:
    where = plain(tmp_path / "site", contents())
    (where / "query" / "0005_c1s1_000002_00.jpg").symlink_to(tmp_path / "nowhere")
    assert read_site(where, **SIZE).refused == ("query/0005_c1s1_000002_00.jpg: no regular file (a broken link?)",)


def test_too_big_members_are_not_unpacked(tmp_path: Path) -> None:
    where = zipped(tmp_path / "site", contents())
    with zipfile.ZipFile(where / "images.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("query/0005_c1s1_000002_00.jpg", bytes(MAX_BYTES + 1))
    assert read_site(where, **SIZE).refused == (
        f"query/0005_c1s1_000002_00.jpg: {MAX_BYTES + 1} bytes, more than {MAX_BYTES}",
    )


def test_damaged_zip_member_is_refused(tmp_path: Path) -> None:
    where = zipped(tmp_path / "site", contents() | {"query/0005_c1s1_000002_00.png": b"MARK" * 9})
    blob = (where / "images.zip").read_bytes()
    (where / "images.zip").write_bytes(blob.replace(b"MARKMARK", b"MARKMURK", 1))
    (line,) = read_site(where, **SIZE).refused
    assert line.startswith("query/0005_c1s1_000002_00.png: cannot be unpacked (Bad CRC-32")


def test_zip_members_outside_the_splits_are_not_read(tmp_path: Path) -> None:
    extra = {"../query/0005_c1s1_000002_00.png": b"x", "query/sub/0005_c1s1_000002_00.png": b"x", "readme.txt": b"x"}
    site = read_site(zipped(tmp_path / "site", contents() | extra), **SIZE)
    assert len(site.query) == 2 and site.refused == ()


# --- cache


def refuse_to_decode(*_: object) -> None:
    raise AssertionError("decoded although the cache is whole")


@pytest.mark.parametrize("build", [plain, zipped])
def test_second_read_decodes_nothing_and_maps_the_file(tmp_path: Path, build, monkeypatch) -> None:
    where = build(tmp_path / "site", contents() | {"query/0005_c1s1_000004_00.jpg": b"bad", "query/x.jpg": b"x"})
    plainly = read_site(where, **SIZE)
    first = read_site(where, **SIZE, cache=tmp_path / "cache")
    monkeypatch.setattr(decoding, "pixels_of", refuse_to_decode)
    second = read_site(where, **SIZE, cache=tmp_path / "cache")
    assert same(plainly, first) and same(first, second) and len(second.refused) == 2
    for site in (first, second):
        assert all(isinstance(images.pixels, np.memmap) for images in (site.train, site.query, site.gallery))
        assert not site.train.pixels.flags.writeable
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".json", ".npy"]


def test_cache_follows_every_change(tmp_path: Path) -> None:
    where, cache = plain(tmp_path / "site", contents()), tmp_path / "cache"
    read_site(where, **SIZE, cache=cache)
    changed = where / "query" / "0005_c1s1_000001_00.png"
    blob = picture(200)
    assert len(blob) == changed.stat().st_size
    changed.write_bytes(blob)
    os.utime(changed, ns=(1, 1))
    assert read_site(where, **SIZE, cache=cache).query.pixels[0, 0, 0, 0] == 200
    assert read_site(where, height=4, width=4, cache=cache).query.pixels.shape == (2, 4, 4, 3)
    changed.unlink()
    (where / "query" / "0005_c4s1_000001_00.png").write_bytes(blob)
    assert read_site(where, **SIZE, cache=cache).query.cams.tolist() == [4, 3]
    assert len(list(cache.glob("*.npy"))) == 4


def whole_but_foreign(path: Path) -> None:
    np.save(path, np.zeros((3, 8, 4, 3), np.uint8))


def wrong_dtype(path: Path) -> None:
    np.save(path, np.zeros((7, 8, 4, 3), np.int8))


SPOIL = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:128]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "text": lambda path: path.write_text("not an array"),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)),
    "shape": whole_but_foreign,
    "dtype": wrong_dtype,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", SPOIL)
def test_spoilt_cache_is_rebuilt(tmp_path: Path, spoil: str) -> None:
    where, cache = plain(tmp_path / "site", contents()), tmp_path / "cache"
    good = read_site(where, **SIZE)
    read_site(where, **SIZE, cache=cache)
    (file,) = cache.glob("*.npy")
    whole = file.read_bytes()
    SPOIL[spoil](file)
    assert same(good, read_site(where, **SIZE, cache=cache))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"stem": "other", "refused": {}}', "null"])
def test_spoilt_cache_note_is_rebuilt(tmp_path: Path, note: str) -> None:
    where, cache = plain(tmp_path / "site", contents() | {"query/0005_c1s1_000004_00.jpg": b"bad"}), tmp_path / "cache"
    good = read_site(where, **SIZE, cache=cache)
    (file,) = cache.glob("*.json")
    whole = json.loads(file.read_text())
    file.write_text(note)
    assert same(good, read_site(where, **SIZE, cache=cache))
    assert json.loads(file.read_text()) == whole


def test_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "pixels_of", stop)
    with pytest.raises(MemoryError):
        read_site(plain(tmp_path / "site", contents()), **SIZE, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file: the cache cannot be written"):
        read_site(plain(tmp_path / "site", contents()), **SIZE, cache=tmp_path / "file")


# --- mistakes of the user


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("split", ["bounding_box_train", "query", "bounding_box_test"])
@pytest.mark.parametrize("build", [plain, zipped])
def test_empty_split(tmp_path: Path, build, split: str) -> None:
    files = {path: blob for path, blob in contents().items() if not path.startswith(f"{split}/")}
    with pytest.raises(InputError, match=f"site: {split}/ holds no readable picture") as error:
        read_site(build(tmp_path / "site", files), **SIZE)
    one_line(error)


def test_split_of_bad_pictures_only_says_why(tmp_path: Path) -> None:
    files = {path: b"bad" if path.startswith("query/") else blob for path, blob in contents().items()}
    with pytest.raises(
        InputError, match=r"site: query/ .* \(2 refused, the first is query/0005_c1s1_000001_00.png: not"
    ):
        read_site(plain(tmp_path / "site", files), **SIZE)
    with pytest.raises(InputError, match=r"site: query/"):
        read_site(tmp_path / "site", **SIZE, cache=tmp_path / "cache")


def test_no_query_with_another_camera_names_the_client(tmp_path: Path) -> None:
    files = contents()
    del files["bounding_box_test/0005_c2s1_000001_00.png"]
    with pytest.raises(InputError, match="lonely: none of its 2 queries") as error:
        read_site(plain(tmp_path / "lonely", files), **SIZE)
    one_line(error)


@pytest.mark.parametrize("blob", [b"", b"no zip", None])
def test_unreadable_zip(tmp_path: Path, blob: bytes | None) -> None:
    where = zipped(tmp_path / "root" / "site", contents())
    whole = (where / "images.zip").read_bytes()
    (where / "images.zip").write_bytes(whole[: len(whole) // 2] if blob is None else blob)
    for read in (lambda: read_site(where, **SIZE), lambda: read_sites(tmp_path / "root", **SIZE)):
        with pytest.raises(InputError, match=r"site/images.zip: no readable zip \(.*\); give an intact one") as error:
            read()
        one_line(error)


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_size_must_be_positive(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="image size"):
        read_site(plain(tmp_path / "site", contents()), height=size[0], width=size[1])


def test_folder_that_is_no_site(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        read_site(tmp_path / "gone", **SIZE)
    with pytest.raises(InputError, match="holds neither images.zip nor"):
        read_site(tmp_path, **SIZE)


# --- several sites


def test_all_sites_in_order_of_name_and_the_rest_named(tmp_path: Path) -> None:
    plain(tmp_path / "b", contents())
    zipped(tmp_path / "a", contents())
    zipped(tmp_path / "other_zip", {"stuff/x.txt": b"x"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("ignored")
    sites, skipped = read_sites(tmp_path, **SIZE)
    assert [site.name for site in sites] == ["a", "b"]
    assert [line.partition(":")[0] for line in skipped] == ["empty", "other_zip"]
    assert "holds neither images.zip nor bounding_box_train/" in skipped[0] and "does not hold" in skipped[1]


def test_named_sites_in_the_order_given(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        plain(tmp_path / name, contents())
    (tmp_path / "empty").mkdir()
    sites, skipped = read_sites(tmp_path, ("c", "a"), **SIZE)
    assert [site.name for site in sites] == ["c", "a"] and skipped == []
    for wrong, why in (("d", "is not there"), ("empty", "holds neither"), ("../a", "is not there"), ("c", "twice")):
        with pytest.raises(InputError, match=why) as error:
            read_sites(tmp_path, ("c", wrong), **SIZE)
        assert wrong in one_line(error) and (wrong == "c" or "there is a, b, c" in str(error.value))


def test_roots_without_a_site(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_sites(tmp_path / "gone", **SIZE)
    with pytest.raises(InputError, match="none of its 0 sub-folders"):
        read_sites(tmp_path, **SIZE)
    with pytest.raises(InputError, match="give its parent folder"):
        read_sites(plain(tmp_path / "site", contents()), **SIZE)


def test_cross_camera_queries_by_hand() -> None:
    def images(ids: list[int], cams: list[int]) -> Images:
        blank = np.zeros((len(ids), 1, 1, 3), np.uint8)
        return Images(blank, np.array(ids, np.int32), np.array(cams, np.int32), tuple(map(str, ids)))

    gallery = images([1, 1, 2, 3, 0, 0], [1, 2, 1, 3, 1, 2])
    # 1/c1 and 1/c2 yes, 2/c1 same camera only, 3/c1 yes, 4 absent, 0 never matches.
    assert cross_camera_queries(Site("s", gallery, images([1, 1, 2, 3, 4, 0], [1, 2, 1, 1, 1, 1]), gallery)) == 3


# --- real sets


@pytest.mark.parametrize(
    "name, counts, cams",
    [
        ("ward", (1253, 105, 1138), {1, 2, 3}),
        ("viper", (632, 316, 316), {1, 2}),
        ("prid2011", (200, 100, 649), {1, 2}),
        ("mars_mini", (256, 36, 476), {1, 2, 3, 4, 5, 6}),
        ("market1501_mini", (32, 32, 32), {1, 2, 3, 4, 5, 6}),
    ],
)
def test_real_set(name: str, counts: tuple[int, int, int], cams: set[int], tmp_path: Path) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real set {name} is not here")
    sites, skipped = read_sites(REAL, (name,), height=32, width=16, cache=tmp_path)
    (site,) = sites
    assert (len(site.train), len(site.query), len(site.gallery)) == counts
    assert site.refused == () and skipped == []
    assert set(site.train.cams.tolist()) == cams and site.train.ids.min() > 0
    assert not set(site.train.ids.tolist()) & set(site.query.ids.tolist())
    assert set(site.query.ids.tolist()) <= set(site.gallery.ids.tolist())
    assert site.train.pixels.shape == (counts[0], 32, 16, 3) and site.train.pixels.std() > 10
