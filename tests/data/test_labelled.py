from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedklpr_jax.data import labelled
from fedklpr_jax.data.labelled import read_folder, read_tfds
from fedklpr_jax.errors import InputError


def save(path: Path, value: int | tuple[int, int, int], size: tuple[int, int] = (4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(path)
    return path


def class_folders(root: Path) -> Path:
    for name, value in {"cat/b.png": 20, "cat/a.bmp": 10, "dog/x.png": 30, "dog/y.PNG": 40}.items():
        save(root / name, value)
    return root


def npz(root: Path, **arrays: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / "set.npz", **arrays)
    return root


def said(root: Path) -> str:
    with pytest.raises(InputError) as error:
        read_folder(root)
    assert "\n" not in str(error.value)
    return str(error.value)


IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_npz_of_grey_images(tmp_path: Path, dtype: type) -> None:
    data = read_folder(npz(tmp_path, images=IMAGES, labels=np.array([2, 0, 2, 1], dtype)))
    assert np.array_equal(data.pixels, IMAGES[..., None]) and data.pixels.dtype == np.uint8
    assert data.labels.tolist() == [2, 0, 2, 1] and data.labels.dtype == np.int32
    assert data.classes == ("0", "1", "2") and data.refused == () and len(data) == 4


def test_npz_of_colour_images(tmp_path: Path) -> None:
    images = np.arange(4 * 3 * 2 * 3, dtype=np.uint8).reshape(4, 3, 2, 3)
    assert np.array_equal(read_folder(npz(tmp_path, images=images, labels=np.arange(4))).pixels, images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.arange(4)}, "has no array `images`"),
        ({"images": IMAGES}, "has no array `labels`"),
        ({"images": IMAGES.astype(float), "labels": np.arange(4)}, "`images` is float64 [4, 3, 2]; give uint8"),
        ({"images": IMAGES[0], "labels": np.arange(3)}, "`images` is uint8 [3, 2]"),
        ({"images": IMAGES[:0], "labels": np.arange(0)}, "`images` is uint8 [0, 3, 2]"),
        ({"images": IMAGES, "labels": np.arange(3)}, "`labels` is int64 [3]; give one whole number for each of the 4"),
        ({"images": IMAGES, "labels": np.arange(4.0)}, "`labels` is float64 [4]"),
        ({"images": IMAGES, "labels": np.arange(4) - 1}, "`labels` runs from -1 to 2; number the classes from 0"),
        ({"images": IMAGES, "labels": np.arange(4) + 1}, "`labels` runs from 1 to 4"),
        ({"images": np.array([{}]), "labels": np.arange(1)}, "no readable .npz"),
    ],
)
def test_a_malformed_npz_is_told(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    line = said(npz(tmp_path, **arrays))
    assert message in line and "set.npz" in line


def test_a_name_with_a_line_break_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "two\nlines.npz").write_bytes(b"none")
    assert "two\\nlines.npz" in said(tmp_path)


def test_a_damaged_npz_is_told(tmp_path: Path) -> None:
    blob = (npz(tmp_path, images=IMAGES, labels=np.arange(4)) / "set.npz").read_bytes()
    for bad in (b"", b"no zip", blob[: len(blob) // 2], blob[:60] + bytes(20) + blob[80:]):
        (tmp_path / "set.npz").write_bytes(bad)
        assert "set.npz: no readable .npz" in said(tmp_path)


def test_folders_that_are_no_set(tmp_path: Path) -> None:
    assert "cannot be listed" in said(tmp_path / "absent")
    assert "holds neither an .npz file nor a sub-folder" in said(tmp_path)
    npz(tmp_path, images=IMAGES, labels=np.arange(4))
    (tmp_path / "other.npz").write_bytes(b"")
    assert "holds 2 .npz files; leave exactly one" in said(tmp_path)


def test_class_folders(tmp_path: Path) -> None:
    data = read_folder(class_folders(tmp_path))
    assert data.pixels.shape == (4, 3, 4, 1)
    assert data.pixels[:, 0, 0, 0].tolist() == [10, 20, 30, 40]
    assert data.labels.tolist() == [0, 0, 1, 1] and data.labels.dtype == np.int32
    assert data.classes == ("cat", "dog") and data.refused == ()


def test_one_colour_picture_makes_all_rgb(tmp_path: Path) -> None:
    save(class_folders(tmp_path) / "dog/z.png", (1, 2, 3))
    data = read_folder(tmp_path)
    assert data.pixels.shape == (5, 3, 4, 3)
    assert data.pixels[:, 2, 3].tolist() == [[10] * 3, [20] * 3, [30] * 3, [40] * 3, [1, 2, 3]]


def test_broken_pictures_are_left_out_and_told(tmp_path: Path) -> None:
    class_folders(tmp_path)
    whole = save(tmp_path / "spare.jpg", 9, (40, 40)).read_bytes()
    (tmp_path / "cat/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat/empty.png").write_bytes(b"")
    (tmp_path / "cat/notes.txt").write_text("hello")
    (tmp_path / "cat/.DS_Store").write_text("clutter")
    (tmp_path / "dog/inner.png").mkdir()
    (tmp_path / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.fromarray(np.full((3, 4), 60000, np.uint16)).save(tmp_path / "dog/deep.png")
    data = read_folder(tmp_path)
    assert data.labels.tolist() == [0, 0, 1, 1]
    reasons = dict(line.split(": ", 1) for line in data.refused)
    assert list(reasons) == [
        "cat/cut.jpg",
        "cat/empty.png",
        "cat/notes.txt",
        "dog/deep.png",
        "dog/gone.png",
        "dog/inner.png",
    ]
    assert reasons["cat/cut.jpg"].startswith("does not decode")
    assert reasons["cat/empty.png"] == "not a PNG, JPEG or BMP picture"
    assert reasons["cat/notes.txt"].startswith("not named .png")
    assert reasons["dog/deep.png"].startswith("pixels of mode I")
    assert reasons["dog/gone.png"] == reasons["dog/inner.png"] == "no regular file"


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    save(class_folders(tmp_path) / "dog/wide.png", 1, (5, 3))
    assert "dog/wide.png is 3x5 pixels, but cat/a.bmp 3x4 pixels; give all one size" in said(tmp_path)


def test_a_class_without_a_picture_is_named(tmp_path: Path) -> None:
    (class_folders(tmp_path) / "eel").mkdir()
    (tmp_path / "eel/broken.png").write_bytes(b"")
    assert "class folder eel holds no readable picture" in said(tmp_path)


def test_odd_names_stay_on_one_line(tmp_path: Path) -> None:
    (class_folders(tmp_path) / "cat/two\nlines.png").write_bytes(b"")
    assert read_folder(tmp_path).refused == ("'cat/two\\nlines.png': not a PNG, JPEG or BMP picture",)


def same(one: labelled.Labelled, other: labelled.Labelled) -> bool:
    arrays = np.array_equal(one.pixels, other.pixels) and np.array_equal(one.labels, other.labels)
    return arrays and (one.classes, one.refused) == (other.classes, other.refused)


def test_the_cache_saves_the_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = class_folders(tmp_path / "set"), tmp_path / "deep/cache"
    (root / "cat/bad.png").write_bytes(b"")
    plain = read_folder(root)
    first = read_folder(root, cache=cache)
    assert same(plain, first) and [path.suffix for path in cache.iterdir()] == [".npz"]
    with monkeypatch.context() as patch:
        patch.setattr(labelled, "_pixels_of", None)
        assert same(plain, read_folder(root, cache=cache))
    save(root / "dog/new.png", 50)
    assert read_folder(root, cache=cache).labels.tolist() == [0, 0, 1, 1, 1]


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    root, cache = class_folders(tmp_path / "set"), tmp_path / "cache"
    plain = read_folder(root, cache=cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert same(plain, read_folder(root, cache=cache)) and same(plain, read_folder(root, cache=cache))
    assert list(cache.iterdir()) == [kept]


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the cache cannot be written"):
        read_folder(class_folders(tmp_path / "set"), cache=tmp_path / "file")


# TensorFlow Datasets: sets written for real, and read back, without TensorFlow.


def png(pixels: np.ndarray) -> io.BytesIO:
    blob = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(blob, "PNG")
    blob.seek(0)
    return blob


def prepare(data_dir: Path, name: str, splits: dict[str, list[dict[str, Any]]], **changes: Any) -> str:
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "label": tfds.features.ClassLabel(names=["no", "yes"]),
    }
    features.update({key: value(tfds.features) for key, value in changes.items() if key not in ("version", "keys")})
    version = changes.get("version", "1.0.0")
    where = data_dir / name / version
    where.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version(version), data_dir=str(where), module_name=""
        ),
        features=tfds.features.FeaturesDict(features),
        supervised_keys=changes.get("keys"),
    )
    writer = tfds.core.SequentialWriter(info, 100, overwrite=True, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return str(data_dir)


def example(value: int, label: int, size: tuple[int, ...] = (3, 2, 1), **others: Any) -> dict[str, Any]:
    return {"image": png(np.full(size, value, np.uint8)), "label": label, **others}


def refusal(name: str, data_dir: str) -> str:
    with pytest.raises(InputError) as error:
        read_tfds(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tfds_merges_train_before_test(tmp_path: Path) -> None:
    train = [example(value, value % 2) for value in (1, 2, 3)]
    splits = {"extra": [example(9, 0)], "test": [example(7, 1)], "train": train}
    data = read_tfds("tiny_set", prepare(tmp_path, "tiny_set", splits))
    assert data.pixels.shape == (4, 3, 2, 1) and data.pixels.dtype == np.uint8
    assert data.pixels[:, 2, 1, 0].tolist() == [1, 2, 3, 7]
    assert data.labels.tolist() == [1, 0, 1, 1] and data.labels.dtype == np.int32
    assert data.classes == ("no", "yes")
    assert data.refused == ("tiny_set: split extra left out (1 pictures); train, validation, test are read",)


def test_tfds_reads_a_set_it_has_code_for(tmp_path: Path) -> None:
    def ten(features: Any) -> Any:
        return features.ClassLabel(num_classes=10)

    def image(features: Any) -> Any:
        return features.Image(shape=(28, 28, 1))

    pictures = [example(value, value, (28, 28, 1)) for value in range(10)]
    folder = prepare(tmp_path, "mnist", {"train": pictures}, version="3.0.1", label=ten, image=image)
    data = read_tfds("mnist", folder)
    assert data.pixels[:, 5, 5, 0].tolist() == data.labels.tolist() == list(range(10))
    assert data.classes == tuple("0123456789")


def test_tfds_takes_the_label_that_the_set_names(tmp_path: Path) -> None:
    def coarse(features: Any) -> Any:
        return features.ClassLabel(names=["a", "b", "c"])

    def colour(features: Any) -> Any:
        return features.Image(shape=(3, 2, 3))

    splits = {"test": [example(5, 1, (3, 2, 3), coarse=2)]}
    folder = prepare(tmp_path, "two_labels", splits, keys=("image", "coarse"), coarse=coarse, image=colour)
    data = read_tfds("two_labels", folder)
    assert data.labels.tolist() == [2] and data.classes == ("a", "b", "c") and data.pixels.shape == (1, 3, 2, 3)


def test_tfds_pictures_of_two_sizes_are_told(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "tiny_set", {"train": [example(1, 0), example(2, 1, (4, 2, 1))]})
    line = refusal("tiny_set", folder)
    assert line == "tiny_set: picture 1 is 4x2 pixels, the first 3x2 pixels; give a set of one size"


def test_tfds_pictures_without_a_label_are_told(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "tiny_set", {"train": [example(1, 0), example(2, -1)]})
    assert "1 of 2 pictures have no label" in refusal("tiny_set", folder)


def test_tfds_needs_a_known_split(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "tiny_set", {"night": [example(1, 0)]})
    assert "none of its splits night is one of train, validation, test" in refusal("tiny_set", folder)


def test_tfds_needs_an_image_and_a_class(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "words", {"train": []}, image=lambda features: features.Text())
    assert "words: no image classification set (features image, label)" in refusal("words", folder)


def test_tfds_needs_8_bits(tmp_path: Path) -> None:
    folder = prepare(
        tmp_path, "deep", {"train": []}, image=lambda features: features.Image(shape=(3, 2, 1), dtype=np.uint16)
    )
    assert "deep: its images are uint16" in refusal("deep", folder)


def test_tfds_tells_how_to_prepare_a_set(tmp_path: Path) -> None:
    line = refusal("fashion_mnist", str(tmp_path))
    assert "fashion_mnist: not prepared as array_record" in line
    assert line.endswith(f"tfds build fashion_mnist --file_format=array_record --data_dir={tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnits", "fashion_mnits: TFDS knows no such data set; did you mean fashion_mnist?"),
        ("qqqqqq", "TFDS knows no such data set; see the list"),
        ("mnist:9.9.9", "TFDS cannot open it"),
        ("../mnist", "TFDS cannot open it"),
        ("", "TFDS cannot open it"),
    ],
)
def test_tfds_names_that_do_not_exist(tmp_path: Path, name: str, message: str) -> None:
    assert message in refusal(name, str(tmp_path))


def test_tensorflow_datasets_is_imported_only_where_needed() -> None:
    code = "import sys, fedklpr_jax.data.labelled; sys.exit('tensorflow_datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
