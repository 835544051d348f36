"""Fakes of the layouts in which re-ID data sets are distributed, read as sites."""

from __future__ import annotations

import io
import re
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedklpr_jax.data.finding import Found, find
from fedklpr_jax.data.folder import cross_camera_queries, read_site, read_sites
from fedklpr_jax.data.layouts import GALLERY, LAYOUTS, QUERY, TRAIN, Picture, draw_people
from fedklpr_jax.data.published import PUBLISHED
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import InputError
from tests.data.site_files import plain, zipped

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SIZE: dict[str, Any] = {"height": 8, "width": 4}


def picture(path: str, value: int) -> bytes:
    blob = io.BytesIO()
    kind = {"bmp": "BMP", "png": "PNG", "jpg": "JPEG"}[path.rpartition(".")[2]]
    Image.new("RGB", (6, 12), (value, value, value)).save(blob, kind)
    return blob.getvalue()


def pictures(*paths: str) -> dict[str, bytes]:
    return {path: picture(path, 10 * place) for place, path in enumerate(paths, start=1)}


def rows(images: Images) -> list[tuple[str, int, int]]:
    return list(zip(images.names, images.ids.tolist(), images.cams.tolist(), strict=True))


def people(images: Images) -> set[int]:
    return set(images.ids.tolist())


MSMT17 = pictures(
    "train/0000/0000_000_01_0303morning_0008_0.jpg",
    "train/0000/0000_001_15_0303noon_0100_1.jpg",
    "train/0001/0001_000_02_0113afternoon_0008_0_ex.jpg",
    "train/0001/0001_001_03_0113afternoon_0009_0.jpg",
    "test/0000/0000_000_11_0303morning_0015_0.jpg",
    "test/0000/0000_001_12_0303morning_0016_0.jpg",
    "test/0002/0002_000_12_0303morning_0017_0.jpg",
    "test/0002/0002_000_12_0303morning_9999_0.jpg",
) | {
    # Windows ends of lines, a blank line, no end at the last line, and a mark of the byte order.
    "list_train.txt": b"\xef\xbb\xbf0000/0000_000_01_0303morning_0008_0.jpg 0\r\n\r\n"
    b"0001/0001_000_02_0113afternoon_0008_0_ex.jpg 1\r\n",
    "list_val.txt": b"0000/0000_001_15_0303noon_0100_1.jpg 0\n0001/0001_001_03_0113afternoon_0009_0.jpg 1",
    "list_query.txt": b"0000/0000_000_11_0303morning_0015_0.jpg 0\n",
    "list_gallery.txt": b"0000/0000_001_12_0303morning_0016_0.jpg 0\n0002/0002_000_12_0303morning_0017_0.jpg 2\n",
}


def version_2(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path.replace("train/", "mask_train_v2/").replace("test/", "mask_test_v2/"): blob
            for path, blob in files.items()}  # fmt: skip


@pytest.mark.parametrize("build", [plain, zipped])
@pytest.mark.parametrize("base", ["", "MSMT17_V1/"])
def test_msmt17(tmp_path: Path, build, base: str) -> None:
    site = read_site(build(tmp_path / "msmt", {base + path: blob for path, blob in MSMT17.items()}), **SIZE)
    assert site.name == "msmt" and site.refused == ()
    # People are counted from 1, those of the test behind the two of the training; cameras keep both digits.
    assert rows(site.train) == [
        ("train/0000/0000_000_01_0303morning_0008_0.jpg", 1, 1),
        ("train/0000/0000_001_15_0303noon_0100_1.jpg", 1, 15),
        ("train/0001/0001_000_02_0113afternoon_0008_0_ex.jpg", 2, 2),
        ("train/0001/0001_001_03_0113afternoon_0009_0.jpg", 2, 3),
    ]
    assert rows(site.query) == [("test/0000/0000_000_11_0303morning_0015_0.jpg", 3, 11)]
    assert rows(site.gallery) == [
        ("test/0000/0000_001_12_0303morning_0016_0.jpg", 3, 12),
        ("test/0002/0002_000_12_0303morning_0017_0.jpg", 5, 12),
    ]
    assert np.all(np.abs(site.train.pixels[:, 0, 0, 0].astype(int) - [10, 20, 30, 40]) <= 2)
    assert site.gallery.pixels.dtype == np.uint8 and site.train.ids.dtype == site.train.cams.dtype == np.int32


def test_msmt17_second_version_is_the_same(tmp_path: Path) -> None:
    one = read_site(plain(tmp_path / "1", MSMT17), **SIZE)
    two = read_site(plain(tmp_path / "2", version_2(MSMT17)), **SIZE)
    assert [row[1:] for row in rows(one.train)] == [row[1:] for row in rows(two.train)]
    assert two.query.names == ("mask_test_v2/0000/0000_000_11_0303morning_0015_0.jpg",)
    assert np.array_equal(one.gallery.pixels, two.gallery.pixels)


@pytest.mark.parametrize("name", ["list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt"])
@pytest.mark.parametrize("build", [plain, zipped])
def test_msmt17_without_a_list(tmp_path: Path, build, name: str) -> None:
    where = build(tmp_path / "msmt", {path: blob for path, blob in MSMT17.items() if path != name})
    with pytest.raises(InputError, match=rf"msmt: {name} of MSMT17 missing; put it there") as error:
        read_site(where, **SIZE)
    assert "\n" not in str(error.value)


def test_folders_train_and_test_alone_are_no_msmt17(tmp_path: Path) -> None:
    files = {path: blob for path, blob in MSMT17.items() if not path.startswith("list")}
    assert find(plain(tmp_path / "classes", files)) == (
        "holds neither images.zip nor bounding_box_train/, query/ and bounding_box_test/"
    )


def test_wrong_lines_of_a_list_are_refused_one_by_one(tmp_path: Path) -> None:
    more = MSMT17["list_train.txt"] + (
        b"0001/gone_000_02_x.jpg 1\n0009/0009_000_02_0113noon_0008_0.jpg 9\nno number\n"
        b"../../../etc/0001_000_01_x.jpg 3\n0001/0001_000_02_0113afternoon_0008_0_ex.jpg 1\n"
    )
    site = read_site(plain(tmp_path / "msmt", MSMT17 | {"list_train.txt": more}), **SIZE)
    assert len(site.train) == 4
    assert site.refused == (
        "list_train.txt: 2 lines not like 0000/0000_000_01_0303morning_0008_0.jpg 0, the first is line 4",
        "train/../../../etc/0001_000_01_x.jpg: list_train.txt names it, but it is not there",
        "train/0001/0001_000_02_0113afternoon_0008_0_ex.jpg: list_train.txt names it for the second time",
        "train/0009/0009_000_02_0113noon_0008_0.jpg: list_train.txt names it, but it is not there",
    )


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=80), st.sampled_from(["list_train.txt", "list_query.txt"]))
def test_any_bytes_are_a_list(content: bytes, name: str) -> None:
    (layout,) = [layout for layout in LAYOUTS if "train/" in layout.listed]
    members = [(path, len(blob), (0,)) for path, blob in MSMT17.items()]
    more = MSMT17[name] + b"\n" + content
    found, refused = layout.sort(members, lambda path: more if path == name else MSMT17[path])
    assert len(found) >= 7 and len({picture.path for picture in found}) == len(found)
    assert all(text.isprintable() for text in refused)


def test_a_list_too_large_or_damaged_stops_the_reading(tmp_path: Path) -> None:
    where = zipped(tmp_path / "big", MSMT17)
    with zipfile.ZipFile(where / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, blob in (MSMT17 | {"list_val.txt": bytes(33 << 20)}).items():
            archive.writestr(path, blob)
    with pytest.raises(InputError, match="list_val.txt: 34603008 bytes, more than 33554432"):
        read_site(where, **SIZE)
    spoilt = zipped(tmp_path / "bad", MSMT17 | {"list_val.txt": b"MARK" * 9})
    blob = (spoilt / "images.zip").read_bytes()
    (spoilt / "images.zip").write_bytes(blob.replace(b"MARKMARK", b"MARKMURK", 1))
    with pytest.raises(InputError, match="list_val.txt: cannot be read .Bad CRC-32"):
        read_site(spoilt, **SIZE)


CUHK03 = pictures(
    "bounding_box_train/0001_c1_1.png", "bounding_box_train/0001_c2_6.png", "query/0003_c1_22.png",
    "bounding_box_test/0003_c2_27.png", "bounding_box_test/0003_c1_21.png",
)  # fmt: skip


def test_cuhk03_np_is_two_sets_of_the_same_people(tmp_path: Path) -> None:
    both = {f"{kind}/{path}": blob for kind in ("detected", "labeled") for path, blob in CUHK03.items()}
    where = plain(tmp_path / "root" / "CUHK03-NP", both)
    sites, _ = read_sites(where, **SIZE)
    assert [site.name for site in sites] == ["detected", "labeled"]
    assert rows(sites[1].query) == [("query/0003_c1_22.png", 3, 1)]
    assert sites[0].gallery.cams.tolist() == [1, 2] and sites[0].train.cams.tolist() == [1, 2]
    with pytest.raises(InputError, match=r"holds several data sets \(detected/ and labeled/\); give one of them"):
        read_site(where, **SIZE)
    one = plain(tmp_path / "root" / "one", {f"labeled/{path}": blob for path, blob in CUHK03.items()})
    assert rows(read_site(one, **SIZE).train) == [
        ("bounding_box_train/0001_c1_1.png", 1, 1), ("bounding_box_train/0001_c2_6.png", 1, 2)
    ]  # fmt: skip


def viper(count: int) -> tuple[str, ...]:
    return tuple(f"cam_{cam}/{n:03d}_{angle}.bmp" for n in range(count) for cam, angle in (("a", 45), ("b", 90)))


@pytest.mark.parametrize("build", [plain, zipped])
def test_viper(tmp_path: Path, build) -> None:
    site = read_site(build(tmp_path / "v", pictures(*viper(6))), **SIZE, cache=tmp_path / "cache")
    # Files 000 to 005 are people 1 to 6; 1, 2 and 6 are drawn (a doctest of `draw_people` says the same).
    assert [row[1:] for row in rows(site.train)] == [(1, 1), (2, 1), (6, 1), (1, 2), (2, 2), (6, 2)]
    assert rows(site.query) == [(f"cam_a/{n:03d}_45.bmp", n + 1, 1) for n in (2, 3, 4)]
    assert rows(site.gallery) == [(f"cam_b/{n:03d}_90.bmp", n + 1, 2) for n in (2, 3, 4)]
    assert site.query.pixels[:, 3, 3, 1].tolist() == [50, 70, 90] and site.refused == ()
    again = read_site(tmp_path / "v", **SIZE, cache=tmp_path / "cache")
    assert rows(again.gallery) == rows(site.gallery) and np.array_equal(again.train.pixels, site.train.pixels)


def test_broken_pictures_of_other_layouts_are_refused_and_move_nobody(tmp_path: Path) -> None:
    files = pictures(*viper(6))
    spoilt = files | {
        "cam_a/000_45.bmp": b"", "cam_b/001_90.bmp": b"no picture", "cam_a/004_45.bmp": files["cam_a/004_45.bmp"][:60],
        "cam_a/eleven.bmp": b"x", "cam_b/Thumbs.db": b"x", "readme.txt": b"x",
    }  # fmt: skip
    site = read_site(plain(tmp_path / "v", spoilt), **SIZE)
    assert [text for text in site.refused if not text.startswith("cam_a/004")] == [
        "cam_a/000_45.bmp: 0 bytes", "cam_a/eleven.bmp: not named like cam_a/000_45.bmp",
        "cam_b/001_90.bmp: not a BMP picture",
    ]  # fmt: skip
    assert len(site.refused) == 4
    assert people(site.train) == {1, 2, 6} and people(site.query) == {3, 4} and people(site.gallery) == {3, 4, 5}


def test_a_split_without_pictures_is_told_in_one_line(tmp_path: Path) -> None:
    files = {path: b"" if path.startswith("cam_a") else blob for path, blob in pictures(*viper(4)).items()}
    why = "v: the query split of VIPeR holds no readable picture .*4 refused, the first is cam_a/000_45.bmp: 0 bytes"
    with pytest.raises(InputError, match=why):
        read_site(plain(tmp_path / "v", files), **SIZE)
    far = pictures(*(f"cam_a/00{n}_45.bmp" for n in range(4)), *(f"cam_b/05{n}_90.bmp" for n in range(4)))
    with pytest.raises(InputError, match="none of its . queries has its person in the gallery under another camera"):
        read_site(plain(tmp_path / "far", far), **SIZE)


def test_cuhk01(tmp_path: Path) -> None:
    names = [f"campus/{person:04d}{image:03d}.png" for person in (1, 2, 3) for image in (1, 2, 3, 4)]
    wrong = {"campus/0004005.png": b"x", "campus/0000001.png": b"x", "campus/1.png": b"x"}
    site = read_site(plain(tmp_path / "cuhk01", pictures(*names) | wrong), **SIZE)
    # round(3 x 485 / 971) = 1 of three people is drawn.
    (trained,) = people(site.train)
    tested = sorted({1, 2, 3} - {trained})
    assert [row[2] for row in rows(site.train)] == [1, 1, 2, 2] and len(site.train) == 4
    assert rows(site.query) == [(f"campus/{p:04d}{i:03d}.png", p, 1) for p in tested for i in (1, 2)]
    assert rows(site.gallery) == [(f"campus/{p:04d}{i:03d}.png", p, 2) for p in tested for i in (3, 4)]
    assert [text.partition(":")[0] for text in site.refused] == sorted(wrong)
    assert all(text.endswith("not named like campus/0001001.png (pictures 001 to 004)") for text in site.refused)


def test_prid2011(tmp_path: Path) -> None:
    seen = [("a", (1, 2, 3, 4, 201)), ("b", (1, 2, 3, 4, 201, 749))]
    single = [f"single_shot/cam_{cam}/person_{n:04d}.png" for cam, numbers in seen for n in numbers]
    shots = [f"multi_shot/cam_{cam}/person_{n:04d}/{shot:04d}.png"
             for cam in "ab" for n in (1, 2, 3, 4, 201) for shot in range(1, 13 if cam == "a" else 4)]  # fmt: skip
    site = read_site(plain(tmp_path / "prid", pictures(*single, *shots)), **SIZE)
    trained = people(site.train) - {1201}
    tested = sorted({1, 2, 3, 4} - trained)
    assert len(trained) == 2 and people(site.train) >= {1201}
    # Ten of twelve shots by camera A, all three by B; 201 is another person in each camera.
    assert Counter(row[1:] for row in rows(site.train)) == (
        {(n, 1): 10 for n in trained} | {(n, 2): 3 for n in trained} | {(1201, 1): 10}
    )
    first = min(trained)
    assert [row[0][-8:-4] for row in rows(site.train) if row[1:] == (first, 1)] == [
        "0001", "0002", "0003", "0004", "0005", "0007", "0008", "0009", "0010", "0012",
    ]  # fmt: skip
    assert rows(site.query) == [(f"single_shot/cam_a/person_{n:04d}.png", n, 1) for n in tested]
    assert rows(site.gallery) == [(f"single_shot/cam_b/person_{n:04d}.png", n, 2) for n in (*tested, 201, 749)]


def test_prid2011_without_one_of_its_folders(tmp_path: Path) -> None:
    single = [f"single_shot/cam_{cam}/person_{n:04d}.png" for cam in "ab" for n in range(1, 5)]
    site = read_site(plain(tmp_path / "single", pictures(*single)), **SIZE)
    assert (len(site.train), len(site.query), len(site.gallery)) == (4, 2, 2)
    with pytest.raises(InputError, match="shots: single_shot/ of PRID2011 missing"):
        read_site(plain(tmp_path / "shots", pictures("multi_shot/cam_a/person_0001/0001.png")), **SIZE)


def test_3dpes_deals_the_sequences_of_a_person_to_two_cameras(tmp_path: Path) -> None:
    numbers = [(person, view, frame) for person in (1, 2, 100) for view in (3, 9, 20) for frame in (7, 8)]
    names = [f"RGB/{person}_{view}_FRAME_{frame}_RGB.bmp" for person, view, frame in numbers]
    site = read_site(plain(tmp_path / "3dpes", pictures(*names) | {"RGB/100.bmp": b"x", "MASK/1.bmp": b"x"}), **SIZE)
    assert len(people(site.train)) == 1 and not people(site.train) & people(site.query)
    # Sequence 3 is the first half of three, rounded down.
    for part, camera, views in ((site.query, 1, {"3"}), (site.gallery, 2, {"9", "20"})):
        assert {row[0].split("_")[1] for row in rows(part)} == views and set(part.cams.tolist()) == {camera}
    assert (len(site.train), len(site.query), len(site.gallery)) == (6, 4, 8)
    assert people(site.train) | people(site.query) == {2, 3, 101}
    assert site.refused == ("RGB/100.bmp: not named like RGB/100_3_FRAME_26_RGB.bmp",)


def test_ilids_deals_the_pictures_of_a_person_to_two_cameras(tmp_path: Path) -> None:
    names = [f"Persons/{person:04d}{image:03d}.jpg" for person in (1, 2, 3, 4) for image in (1, 2, 3)]
    site = read_site(plain(tmp_path / "x", {f"i-LIDS_Pedestrian/{p}": b for p, b in pictures(*names).items()}), **SIZE)
    tested = sorted({1, 2, 3, 4} - people(site.train))
    assert len(tested) == 2 and site.train.cams.tolist() == [1, 2, 2, 1, 2, 2]
    assert rows(site.query) == [(f"Persons/{n:04d}001.jpg", n, 1) for n in tested]
    assert rows(site.gallery) == [(f"Persons/{n:04d}{i:03d}.jpg", n, 2) for n in tested for i in (2, 3)]


def test_dukemtmc(tmp_path: Path) -> None:
    files = pictures("bounding_box_train/0001_c2_f0046182.jpg", "query/0005_c8_f0081000.jpg",
                     "bounding_box_test/0005_c1_f0081001.jpg", "bounding_box_test/-1_c1_f0081002.jpg")  # fmt: skip
    site = read_site(plain(tmp_path / "duke", {f"DukeMTMC-reID/{path}": blob for path, blob in files.items()}), **SIZE)
    assert rows(site.query) == [("query/0005_c8_f0081000.jpg", 5, 8)] and site.gallery.ids.tolist() == [5]


def test_sites_of_several_layouts_side_by_side(tmp_path: Path) -> None:
    plain(tmp_path / "a", MSMT17)
    zipped(tmp_path / "b", pictures(*viper(4)))
    plain(tmp_path / "c", CUHK03)
    sites, skipped = read_sites(tmp_path, **SIZE)
    assert [site.name for site in sites] == ["a", "b", "c"] and skipped == []
    assert all(isinstance(site, Site) and not people(site.train) & people(site.query) for site in sites)


# --- counts of complete sets, from names alone


def sort(name: str, paths: list[str]) -> list[Picture]:
    (layout,) = [layout for layout in LAYOUTS if layout.name == name]
    found, refused = layout.sort([(path, 9, ()) for path in paths], lambda path: b"")
    assert refused == []
    return found


def sized(rng: np.random.Generator, count: int, total: int, least: int, most: int) -> list[int]:
    """Numbers from `least` to `most` whose sum is `total`."""
    sizes = [least] * count
    while sum(sizes) < total:
        place = int(rng.integers(count))
        sizes[place] += sizes[place] < most
    return sizes


def complete(name: str) -> list[str]:
    rng = np.random.default_rng(1)
    if name == "VIPeR":
        return list(viper(632))
    if name == "CUHK01":
        return [f"campus/{person:04d}{image:03d}.png" for person in range(1, 972) for image in (1, 2, 3, 4)]
    if name == "i-LIDS":
        sizes = sized(rng, 119, 476, 2, 8)
        return [f"Persons/{n:04d}{i:03d}.jpg" for n, size in enumerate(sizes, 1) for i in range(1, size + 1)]
    if name == "3DPeS":
        sizes = sized(rng, 193, 1012, 2, 26)
        return [f"RGB/{n}_{i // 2}_FRAME_{i}_RGB.bmp" for n, size in enumerate(sizes, 1) for i in range(size)]
    seen = [(cam, n) for cam, end in (("a", 386), ("b", 750)) for n in range(1, end)]
    # By camera A two shots fewer of 30 people whom B did not see and of 46 shared ones, about half of them drawn: where
    # it is 23, there are 3850 - 2 * 53 pictures.
    short = {*range(201, 231), *range(1, 47)}
    return [f"single_shot/cam_{cam}/person_{n:04d}.png" for cam, n in seen] + [
        f"multi_shot/cam_{cam}/person_{n:04d}/{shot:04d}.png"
        for cam, n in seen for shot in range(8 if n in short and cam == "a" else 30)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["VIPeR", "CUHK01", "PRID2011", "3DPeS", "i-LIDS"])
def test_complete_sets_are_split_into_the_published_counts(name: str) -> None:
    paths, wanted = complete(name), PUBLISHED[name]
    start = time.process_time()
    found = sort(name, paths)
    assert time.process_time() - start < 3
    assert Counter(picture.split for picture in found) == {
        TRAIN: wanted.train, QUERY: wanted.query, GALLERY: wanted.gallery
    }  # fmt: skip
    trained = {picture.id for picture in found if picture.split == TRAIN}
    assert len(trained) == wanted.people and min(trained) > 0
    assert not trained & {picture.id for picture in found if picture.split != TRAIN}
    assert {picture.cam for picture in found} == {1, 2}
    assert len({picture.path for picture in found}) == len(found)
    assert sort(name, paths) == found


def test_people_are_drawn_by_the_published_share_whatever_the_counts() -> None:
    even = {person: (4, 2, 2) for person in range(1, 120)}
    assert len(draw_people(even, "i-LIDS")) == 59
    # The published 248 training pictures are out of reach; 59 of the 60 people with four come nearest.
    uneven = {person: (4 if person > 59 else 1, 2, 2) for person in range(1, 120)}
    assert len(draw_people(uneven, "i-LIDS")) == 59 and min(draw_people(uneven, "i-LIDS")) > 59
    few = {person: (4, 2, 2) for person in range(1, 12)}
    assert len(draw_people(few, "i-LIDS")) == 5 and draw_people(few, "i-LIDS") == draw_people(few, "i-LIDS")


def test_every_layout_is_recognised_by_its_folders(tmp_path: Path) -> None:
    names = set()
    for place, layout in enumerate(LAYOUTS):
        for path in layout.listed:
            plain(tmp_path / str(place), {f"{path}file" if path.endswith("/") else path: b"x"})
        found = find(tmp_path / str(place))
        assert isinstance(found, Found) and found.layout is layout and found.absent == ()
        names.add(layout.name)
    assert names | {"DukeMTMC-reID", "CUHK03-NP (detected)", "CUHK03-NP (labelled)"} == PUBLISHED.keys()


# --- real pictures, laid out as they are distributed


@pytest.mark.parametrize(
    ("name", "path", "counts"),
    [
        ("viper", lambda person, cam: f"VIPeR/cam_{cam}/{person - 1:03d}_45.bmp", (632, 316, 316)),
        ("prid2011", lambda person, cam: f"single_shot/cam_{cam}/person_{person:04d}.png", (200, 100, 649)),
    ],
)
def test_real_pictures(tmp_path: Path, name: str, path, counts: tuple[int, int, int]) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real set {name} is not here (shared/data/{name})")
    with zipfile.ZipFile(REAL / name / "images.zip") as archive:
        for member in archive.namelist():
            match = re.fullmatch(r".*/(\d+)_c(\d)s.*\.jpg", member)
            if match:
                there = tmp_path / name / path(int(match[1]), "ab"[int(match[2]) - 1])
                there.parent.mkdir(parents=True, exist_ok=True)
                Image.open(io.BytesIO(archive.read(member))).save(there, compress_level=1)
    own, given = (read_site(root / name, height=32, width=16) for root in (tmp_path, REAL))
    assert (len(own.train), len(own.query), len(own.gallery)) == counts and own.refused == ()
    assert cross_camera_queries(own) == counts[1] and not people(own.train) & people(own.query)
    # The same picture of the same person, whatever the layout.
    first = {(person, cam): row for row, (_, person, cam) in enumerate(rows(given.gallery))}
    seen = [(row, (person, cam)) for row, (_, person, cam) in enumerate(rows(own.gallery))]
    both = [(row, first[whom]) for row, whom in seen if whom in first]
    assert len(both) > 100
    assert all(np.array_equal(own.gallery.pixels[one], given.gallery.pixels[two]) for one, two in both)
