"""Sites written as TFDS sets by `python -m fedklpr_jax.data prepare`, and read back by the trainer and by TFDS."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fedklpr_jax import assembly, config
from fedklpr_jax.data import decoding, preparing
from fedklpr_jax.data.__main__ import main
from fedklpr_jax.data.finding import find
from fedklpr_jax.data.folder import read_site, read_sites
from fedklpr_jax.data.prepared import read_prepared
from fedklpr_jax.data.preparing import ReidFolder, SiteConfig, prepare
from fedklpr_jax.data.site import Site
from fedklpr_jax.errors import InputError
from tests.data.site_files import plain, zipped

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SIZE: dict[str, Any] = {"height": 8, "width": 4}
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


def picture(seed: int, mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (6, 12)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    blob = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(blob, kind)
    return blob.getvalue()


def contents() -> dict[str, bytes]:
    return {
        f"{TRAIN}/0002_c1s1_000001_01.jpg": picture(1, kind="JPEG"),
        f"{TRAIN}/0002_c12s1_000002_01.jpg": picture(2, "L", "JPEG"),
        f"{TRAIN}/0003_c1s1_000001_01.jpg": picture(3, "CMYK", "JPEG"),
        f"{TRAIN}/0003_c2s1_000001_01.png": picture(4, "P", size=(5, 7)),
        f"{TRAIN}/0004_c2s1_000001_01.png": b"broken",
        f"{TRAIN}/-1_c2s1_000001_01.png": picture(5),
        f"{QUERY}/0005_c1s1_000001_00.png": picture(6, "RGBA"),
        f"{QUERY}/0006_c3s1_000001_00.png": picture(7, "1"),
        f"{QUERY}/six.png": picture(7),
        f"{GALLERY}/0005_c2s1_000001_00.png": picture(8, "L"),
        f"{GALLERY}/0000_c3s1_000001_00.png": picture(9, "LA"),
    }


def same(one: Site, two: Site) -> bool:
    return (one.name, one.refused) == (two.name, two.refused) and all(
        a.names == b.names
        and all(
            np.array_equal(x, y) and x.dtype == y.dtype
            for x, y in ((a.pixels, b.pixels), (a.ids, b.ids), (a.cams, b.cams))
        )
        for a, b in ((one.train, two.train), (one.query, two.query), (one.gallery, two.gallery))
    )


def made(folder: Path, out: Path, **options: Any) -> preparing.Prepared:
    found = find(folder)
    assert not isinstance(found, str)
    return prepare(found, out, **options)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read_prepared(*arguments, **SIZE, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("build", [plain, zipped])
def test_a_site_is_the_same_as_from_its_folder(tmp_path: Path, build) -> None:
    folder = build(tmp_path / "gate", contents())
    done = made(folder, tmp_path / "sets")
    assert done.counts == {"train": 4, "query": 2, "gallery": 2} and len(done.refused) == 2 and not done.before
    wanted = read_site(folder, **SIZE)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        (site,), skipped = read_prepared(str(tmp_path / "sets"), **SIZE, cache=cache)
        assert same(site, wanted) and skipped == [] and site.refused == done.refused
    assert isinstance(site.train.pixels, np.memmap)


def test_a_second_read_decodes_nothing_until_the_set_changes(tmp_path: Path, monkeypatch) -> None:
    made(plain(tmp_path / "gate", contents()), tmp_path / "sets")
    read_prepared(str(tmp_path / "sets"), **SIZE, cache=tmp_path / "cache")
    decoded: list[int] = []
    monkeypatch.setattr(decoding, "pixels_of", lambda blob, *_: decoded.append(len(blob)) or np.zeros((8, 4, 3), "u1"))
    read_prepared(str(tmp_path / "sets"), **SIZE, cache=tmp_path / "cache")
    assert decoded == []
    (tmp_path / "sets/reid_folder/gate/1.0.0/metadata.json").touch()
    read_prepared(str(tmp_path / "sets"), **SIZE, cache=tmp_path / "cache")
    assert len(decoded) == 8


def test_bitmaps_of_another_layout_are_kept_without_loss(tmp_path: Path) -> None:
    files = {f"cam_{cam}/{n:03d}_0.bmp": picture(n + 50 * (cam == "b"), kind="BMP") for n in range(6) for cam in "ab"}
    folder = plain(tmp_path / "v", files | {"cam_a/099_0.bmp": picture(1)})
    made(folder, tmp_path / "sets")
    (site,), _ = read_prepared(str(tmp_path / "sets"), **SIZE)
    assert same(site, read_site(folder, **SIZE)) and len(site.refused) == 1
    source = tfds.data_source("reid_folder/v", data_dir=tmp_path / "sets", split="train")
    for example in source:
        with Image.open(folder / example["file"].decode()) as image:
            assert np.array_equal(example["image"], np.asarray(image))


def test_tfds_reads_it_without_this_library_and_without_tensorflow(tmp_path: Path) -> None:
    folder = plain(tmp_path / "gate", contents())
    made(folder, tmp_path / "sets")
    program = (
        "import sys, io, numpy as np, tensorflow_datasets as tfds; from pathlib import Path; from PIL import Image\n"
        "sets, folder = map(Path, sys.argv[1:])\n"
        "by_name = tfds.data_source('reid_folder/gate', data_dir=sets)\n"
        "by_place = tfds.builder_from_directory(sets / 'reid_folder/gate/1.0.0').as_data_source()\n"
        "for sources in (by_name, by_place):\n"
        "    print(sorted((split, len(source)) for split, source in sources.items()))\n"
        "    for example in (one for source in sources.values() for one in source):\n"
        "        pixels = np.asarray(Image.open(folder / example['file'].decode()).convert('RGB'))\n"
        "        assert np.array_equal(example['image'], pixels), example['file']\n"
        "first = by_name['train'][1]\n"
        "print(first['person'], first['camera'], [n for n in sys.modules if n in ('tensorflow', 'fedklpr_jax')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "sets", folder], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*["[('gallery', 2), ('query', 2), ('train', 4)]"] * 2, "2 1 []"]


def test_jpeg_and_png_of_plain_modes_keep_their_bytes(tmp_path: Path) -> None:
    files = contents()
    done = made(plain(tmp_path / "gate", files), tmp_path / "sets")
    builder = tfds.builder_from_directory(done.place)
    sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    stored = {one["file"].decode(): one["image"] for source in sources.values() for one in source}
    kept = {path for path, blob in stored.items() if blob == files[path]}
    assert kept == {f"{TRAIN}/0002_c1s1_000001_01.jpg", f"{TRAIN}/0002_c12s1_000002_01.jpg",
                    f"{GALLERY}/0005_c2s1_000001_00.png"}  # fmt: skip


def test_the_builder_works_as_any_of_tfds(tmp_path: Path) -> None:
    folder = plain(tmp_path / "gate", contents())
    builder = ReidFolder(config=SiteConfig(name="gate", folder=str(folder)), data_dir=tmp_path / "sets",
                         file_format="array_record")  # fmt: skip
    builder.download_and_prepare()
    assert [one["person"] for one in builder.as_data_source(split="gallery")] == [0, 5]


def test_many_shards_keep_the_order_and_may_be_empty(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preparing, "SHARD", 2)
    files = {f"{TRAIN}/{n:04d}_c1s1_000001_01.png": picture(n) if n not in (3, 4) else b"x" for n in range(1, 8)}
    folder = plain(tmp_path / "gate", contents() | files)
    done = made(folder, tmp_path / "sets")
    assert len(list(done.place.glob("*train*"))) == 6
    (site,), _ = read_prepared(str(tmp_path / "sets"), **SIZE)
    assert same(site, read_site(folder, **SIZE)) and len(site.train) == 9


def test_what_is_interrupted_is_no_set(tmp_path: Path) -> None:
    folder = plain(tmp_path / "gate", contents())
    seen = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(folder, tmp_path / "sets", advance=stop)
    assert list((tmp_path / "sets/reid_folder/gate").iterdir()) == []
    assert "holds no whole set" in refusal(str(tmp_path / "sets"))
    made(folder, tmp_path / "sets")
    # What a kill leaves behind is passed over.
    half = tmp_path / "sets/reid_folder/half"
    shutil.copytree(tmp_path / "sets/reid_folder/gate/1.0.0", half / "incomplete.ABCDEF_1.0.0")
    (site,), skipped = read_prepared(str(tmp_path / "sets"), **SIZE)
    assert site.name == "gate" and skipped == ["half: holds no whole set of version 1.0.0"]
    assert refusal(str(tmp_path / "sets"), ["half"]).endswith(
        "half holds no whole set of version 1.0.0; there is gate"
    )


@pytest.mark.parametrize("broken", [TRAIN, QUERY, GALLERY])
def test_a_split_of_broken_pictures_only_leaves_nothing(tmp_path: Path, broken: str) -> None:
    files = {path: b"x" if path.startswith(f"{broken}/") else blob for path, blob in contents().items()}
    with pytest.raises(InputError, match=f"gate: {broken}/ holds no readable picture of a person .. refused"):
        made(plain(tmp_path / "gate", files), tmp_path / "sets")
    assert list((tmp_path / "sets/reid_folder/gate").iterdir()) == []


def test_the_command_prepares_all_or_some(tmp_path: Path, capsys) -> None:
    for name in ("gate", "yard"):
        plain(tmp_path / "sites" / name, contents())
    (tmp_path / "sites" / "notes").mkdir()
    out = tmp_path / "sets"
    assert main(["prepare", str(tmp_path / "sites"), "--out", str(out), "--clients", "yard"]) == 0
    said = capsys.readouterr()
    place = out / "reid_folder/yard/1.0.0"
    assert said.out.splitlines() == [
        f"yard: 4 train, 2 query, 2 gallery, in {place}",
        f"  2 files left out, the first of them: {TRAIN}/0004_c2s1_000001_01.png: not a JPEG or PNG picture",
    ]
    assert main(["prepare", str(tmp_path / "sites"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"yard: 4 train, 2 query, 2 gallery (there already), in {place}\n" in said.out
    assert "gate: 4 train, 2 query, 2 gallery, in" in said.out and "passed over: notes: " in said.out

    (tmp_path / "sites/yard" / QUERY / "0005_c7s1_000001_00.png").write_bytes(picture(1))
    assert main(["prepare", str(tmp_path / "sites"), "--out", str(out)]) == 2
    said = capsys.readouterr()
    told = f"{place}: is there already and was made of other files; delete it, or give another --out"
    assert said.err == f"error: {told}\n"
    assert "gate: 4 train" in said.out

    for name, message in (("pond", "pond is not there; there is gate, yard"), ("yard,yard", "yard is named twice")):
        assert main(["prepare", str(tmp_path / "sites"), "--out", str(out), "--clients", name]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_written_is_told_in_one_line(tmp_path: Path, capsys) -> None:
    folder = plain(tmp_path / "my site", contents())
    assert main(["prepare", str(folder), "--out", str(tmp_path / "sets")]) == 2
    assert "my site: TFDS takes names of letters, digits, _, +, - and . only; rename" in capsys.readouterr().err
    folder.rename(tmp_path / "gate")
    (tmp_path / "file").write_text("in the way")
    assert main(["prepare", str(tmp_path / "gate"), "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "file/reid_folder/gate/1.0.0: cannot be written (" in said
    (tmp_path / "sets/reid_folder/gate/1.0.0").mkdir(parents=True)
    assert main(["prepare", str(tmp_path / "gate"), "--out", str(tmp_path / "sets")]) == 2
    assert "1.0.0: is there already, but is no whole set; delete it" in capsys.readouterr().err


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    told = "prepare DIR --out"
    assert told in refusal(str(tmp_path / "sets"))
    made(plain(tmp_path / "gate", contents()), tmp_path / "sets")
    assert refusal(str(tmp_path / "sets"), ["gate", "pond"]).endswith("reid_folder: pond is not there; there is gate")
    assert "gate is named twice" in refusal(str(tmp_path / "sets"), ["gate", "gate"])


@pytest.mark.parametrize("content", [b"", b"{", None])
@pytest.mark.parametrize(
    "file", ["dataset_info.json", "features.json", "reid_folder-query.array_record-00000-of-00001"]
)
def test_a_damaged_set_is_told_in_one_line(tmp_path: Path, file: str, content: bytes | None) -> None:
    place = made(plain(tmp_path / "gate", contents()), tmp_path / "sets").place
    if content is None:
        blob = bytearray((place / file).read_bytes())
        blob[len(blob) // 2] ^= 0xFF
        content = bytes(blob)
    (place / file).write_bytes(content)
    told = refusal(str(tmp_path / "sets"))
    assert f"{place}: " in told and "delete it and prepare it anew" in told


def test_a_set_of_other_features_is_told(tmp_path: Path) -> None:
    place = made(plain(tmp_path / "gate", contents()), tmp_path / "sets").place
    text = (place / "features.json").read_text()
    (place / "features.json").write_text(text.replace('"camera"', '"kamera"'))
    assert "has no camera; delete it and prepare it anew" in refusal(str(tmp_path / "sets"))


@pytest.mark.parametrize("task", ["unsupervised", "supervised", "bottom_up"])
def test_the_trainer_reads_it(tmp_path: Path, task: str) -> None:
    for name in ("gate", "yard", "pond"):
        made(plain(tmp_path / "sites" / name, contents()), tmp_path / "sets")
    settings = config.default_config()
    settings.task.name, settings.data.source, settings.data.root = task, "tfds:reid_folder", str(tmp_path / "sets")
    settings.data.height, settings.data.width, settings.data.cache = 32, 16, str(tmp_path / "cache")
    settings.data.clients, settings.data.unseen = "yard,gate", "pond"
    config.validate(settings)
    clients, unseen, notes = assembly.load_sites(settings)
    settings.data.source, settings.data.root = "folder", str(tmp_path / "sites")
    wanted, nobody, told = assembly.load_sites(settings)
    assert [site.name for site in clients] == ["yard", "gate"] and notes == told and len(notes) == 9
    assert all(same(one, two) for one, two in zip([*clients, *unseen], [*wanted, *nobody], strict=True))


def test_other_sets_are_for_classification() -> None:
    settings = config.default_config()
    settings.data.source = "tfds:mnist"
    with pytest.raises(InputError, match="'tfds:mnist' is for classification; give synthetic, folder or tfds:reid_f"):
        config.validate(settings)
    settings.task.name, settings.data.source = "classification", "tfds:reid_folder"
    config.validate(settings)


def test_tensorflow_datasets_is_imported_only_where_needed() -> None:
    code = "import sys, fedklpr_jax.assembly, fedklpr_jax.data.__main__; sys.exit('tensorflow_datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not REAL.is_dir(), reason="no data folder beside the clone")
def test_real_sites_are_the_same_as_from_their_folders(tmp_path: Path) -> None:
    names = ["prid2011", "viper"]
    for name in names:
        made(REAL / name, tmp_path)
    sites, _ = read_prepared(str(tmp_path), names, height=32, width=16)
    wanted, _ = read_sites(REAL, names, height=32, width=16)
    assert all(same(one, two) for one, two in zip(sites, wanted, strict=True))
