"""`python -m fedklpr_jax.data check DIR`, on fakes and on the real small sets."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedklpr_jax.data.__main__ import main
from fedklpr_jax.data.check import data_sets, report
from fedklpr_jax.data.published import set_named

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def site(where: Path, *paths: str) -> Path:
    # Names are all that counts here: no picture is opened.
    for path in paths:
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        (where / path).write_bytes(b"x")
    return where


def viper(where: Path, count: int) -> Path:
    return site(where, *(f"cam_{cam}/{n:03d}_0.bmp" for n in range(count) for cam in "ab"))


def market(where: Path) -> Path:
    return site(where, "bounding_box_train/0002_c1s1_000001_01.jpg", "bounding_box_train/-1_c6s1_000001_01.jpg",
                "query/0003_c1s1_000001_01.jpg", "query/0004_c1s1_000001_01.jpg", "query/four.jpg",
                "bounding_box_test/0003_c2s1_000001_01.jpg", "bounding_box_test/0000_c3s1_000001_01.jpg",
                "bounding_box_test/0004_c1s1_000002_01.jpg")  # fmt: skip


def words(text: str, start: str) -> list[str]:
    (row,) = [row.split() for row in text.splitlines() if row.split()[:1] == [start]]
    return row[1:]


def test_a_set_is_shown_beside_what_is_published(tmp_path: Path, capsys) -> None:
    assert main(["check", str(market(tmp_path / "Market-1501-v15.09.15"))]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Market-1501-v15.09.15: Market-1501 ") and err == ""
    # Junk is an image, but nobody; distractor 0 is no person.
    assert words(out, "training") == ["1", "751", "2", "12,936", "2"]
    assert words(out, "query") == ["2", "2", "3,368", "1"]
    assert words(out, "gallery") == ["2", "3", "19,732", "3"]
    assert words(out, "all") == ["3", "7", "4", "6"]
    for note in (
        "training: 750 persons missing, 12,934 images missing",
        "query: 3,366 images missing",
        "gallery: 19,729 images missing",
        "all: 2 cameras missing",
        "1 of these images show nobody (junk) and are not read",
        "1 of 2 queries have no second camera; not counted in tests",
        "1 files are not read, the first of them: query/four.jpg: not named like 0002_c1s1_000451_03.jpg (or .png)",
    ):
        assert f"  {note}\n" in out
    assert max(len(row) for row in out.splitlines() if "not read" not in row) <= 80


def test_more_than_published_is_told_as_well(tmp_path: Path, capsys) -> None:
    assert main(["check", str(viper(tmp_path / "set", 640))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("set: VIPeR ")
    assert "  training: 4 persons more than published, 8 images more than published\n" in out
    assert "no split of this set is published: the people to train on are drawn (seed 2508)" in out
    assert main(["check", str(viper(tmp_path / "whole", 632))]) == 0
    assert "  as many as published\n" in capsys.readouterr().out


def test_several_sets_and_what_is_none(tmp_path: Path, capsys) -> None:
    viper(tmp_path / "b" / "VIPeR", 4)
    market(tmp_path / "a")
    site(tmp_path / "c", "mask_train_v2/0000/0000_000_01_a.jpg")
    site(tmp_path / "d", "notes.txt")
    assert main(["check", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    heads = [row.strip() for row in out.splitlines() if row[:1].strip() and ":" in row]
    assert heads == [
        "a: a set in the layout of Market-1501",
        "b: VIPeR (VIPeR/)",
        "passed over: d: holds neither images.zip nor bounding_box_train/, query/ and bounding_box_test/",
    ]
    assert "no published counts are known under this name" in out
    assert err == "error: " + (
        f"{tmp_path / 'c'}: mask_test_v2/, list_train.txt, list_val.txt, list_query.txt, list_gallery.txt of MSMT17 "
        "missing; put it there as it is distributed\n"
    )


def test_a_folder_without_which_a_set_can_be_read_is_named(tmp_path: Path, capsys) -> None:
    site(tmp_path / "prid", *(f"single_shot/cam_{cam}/person_{n:04d}.png" for cam in "ab" for n in range(1, 5)))
    assert main(["check", str(tmp_path / "prid")]) == 0
    assert "  not there: multi_shot/\n" in capsys.readouterr().out


def test_both_kinds_of_cuhk03_are_told_apart(tmp_path: Path, capsys) -> None:
    for kind in ("detected", "labeled"):
        site(tmp_path / "np" / kind, "bounding_box_train/0001_c1_1.png", "query/0003_c1_22.png",
             "bounding_box_test/0003_c2_27.png")  # fmt: skip
    assert main(["check", str(tmp_path / "np")]) == 0
    out = capsys.readouterr().out
    assert "detected: CUHK03-NP (detected) in the layout of Market-1501" in out
    assert "labeled: CUHK03-NP (labelled) in the layout of Market-1501" in out
    assert "7,365" in out and "7,368" in out


@pytest.mark.parametrize("part", ["nowhere", "empty", "unsplit", "."])
def test_bad_input_is_one_line(tmp_path: Path, capsys, part: str) -> None:
    (tmp_path / "empty").mkdir()
    site(tmp_path / "unsplit", "query/0003_c1_22.png")
    assert main(["check", str(tmp_path / part / "")]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err
    assert {"nowhere": "no such folder", "empty": "no other layout of docs/data.md fits",
            "unsplit": "unsplit: bounding_box_train/ holds no readable picture",
            ".": "unsplit: bounding_box_train/ holds no readable picture"}[part] in err  # fmt: skip
    assert out == "" or part == "."


def test_duke_is_said_to_be_withdrawn(tmp_path: Path) -> None:
    where = site(tmp_path / "x" / "DukeMTMC-reID", "bounding_box_train/0001_c2_f0046182.jpg",
                 "query/0005_c8_f0081000.jpg", "bounding_box_test/0005_c1_f0081001.jpg")  # fmt: skip
    ((found,), others) = data_sets(where.parent)
    assert others == [] and found.base == "DukeMTMC-reID/"
    assert "withdrawn by its authors; read for those who hold it" in report(found).notes


@pytest.mark.parametrize(
    ("name", "known"),
    [("market1501_mini", "Market-1501"), ("cuhk03-np-labelled", "CUHK03-NP (labelled)"),
     ("CUHK03", "CUHK03-NP (detected)"), ("prid_2011", "PRID2011"), ("3DPeS", "3DPeS"), ("mars_mini", None)],
)  # fmt: skip
def test_names_of_sets(name: str, known: str | None) -> None:
    assert set_named(name) == known


# --- real


def test_market_1501_by_its_real_people_and_cameras(tmp_path: Path) -> None:
    if not (REAL / "market1501_labels").is_dir():
        pytest.skip("the labels of Market-1501 are not here (shared/data/market1501_labels)")
    labels = np.load(REAL / "market1501_labels" / "labels.npz")
    (tmp_path / "market1501").mkdir()
    with zipfile.ZipFile(tmp_path / "market1501" / "images.zip", "w") as archive:
        for split, part in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "test")):
            for row, (person, cam) in enumerate(zip(labels[f"{part}_pid"], labels[f"{part}_cam"], strict=True)):
                name = "-1" if person == -1 else f"{person:04d}"
                archive.writestr(f"{split}/{name}_c{cam}s1_{row:06d}_00.jpg", b"x")
    ((found,), _) = data_sets(tmp_path / "market1501")
    result = report(found)
    assert result.notes == ("as many as published", "3,819 of these images show nobody (junk) and are not read")
    assert [(part.people, part.images, part.cameras) for part in result.parts] == [
        (751, 12936, 6), (750, 3368, 6), (750, 19732, 6), (1501, 36036, 6)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "head", "notes"),
    [
        ("viper", "viper: VIPeR in the layout of Market-1501 (images.zip)", ["as many as published"]),
        ("prid2011", "prid2011: PRID2011 in the layout of Market-1501 (images.zip)",
         ["training: 185 persons missing, 3,544 images missing"]),
        ("ward", "ward: a set in the layout of Market-1501 (images.zip)",
         ["no published counts are known under this name"]),
        ("mars_mini", "mars_mini: a set in the layout of Market-1501 (images.zip)",
         ["no published counts are known under this name"]),
        ("market1501_mini", "market1501_mini: Market-1501",
         ["training: 735 persons missing, 12,904 images missing", "query: 3,336 images missing",
          "gallery: 19,700 images missing", "2 of 32 queries have no second camera; not counted in tests"]),
    ],
)  # fmt: skip
def test_real_sets(name: str, head: str, notes: list[str], capsys) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real set {name} is not here (shared/data/{name})")
    assert main(["check", str(REAL / name)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].rstrip() == head and err == ""
    assert [row.strip() for row in out.splitlines() if row.startswith("  ") and row.strip()][5:] == notes
