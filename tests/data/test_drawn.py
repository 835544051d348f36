"""Drawn sites on disk: the same pictures, read instead of drawn, and drawn anew where a file is no good."""

import numpy as np
import pytest

from fedklpr_jax.data import drawn, synthetic
from fedklpr_jax.errors import InputError

SIZE = {"height": 32, "width": 16}
SPECS = tuple(synthetic.SiteSpec(name, "summer", 2, 3, 2, 1) for name in ("pier", "quay"))


def kept(cache, seed=0, specs=SPECS):
    return drawn.kept_sites(seed, specs=specs, cache=cache, **SIZE)


def assert_same(sites, others):
    assert [site.name for site in sites] == [site.name for site in others]
    for site, other in zip(sites, others, strict=True):
        for part in ("train", "query", "gallery"):
            one, two = getattr(site, part), getattr(other, part)
            assert one.names == two.names
            for field in ("pixels", "ids", "cams"):
                left, right = getattr(one, field), getattr(two, field)
                np.testing.assert_array_equal(left, right)
                assert left.dtype == right.dtype


def test_what_is_kept_is_what_is_drawn(tmp_path):
    direct = synthetic.make_sites(0, specs=SPECS, **SIZE)
    assert_same(kept(tmp_path), direct)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(kept(tmp_path), direct)
    assert_same(kept(tmp_path, specs=SPECS[::-1]), direct[::-1])
    assert len(list(tmp_path.iterdir())) == 2


def test_it_is_read_and_not_drawn(tmp_path):
    kept(tmp_path)
    names = set(tmp_path.iterdir())
    other = kept(tmp_path, seed=1)
    (mine,) = [path for path in names if drawn._read(path, "pier").train.names[0].startswith("pier")]
    (theirs,) = [
        path for path in set(tmp_path.iterdir()) - names
        if drawn._read(path, "pier").train.names[0].startswith("pier")
    ]  # fmt: skip
    theirs.replace(mine)
    np.testing.assert_array_equal(kept(tmp_path)[0].train.pixels, other[0].train.pixels)


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_file_is_drawn_anew(tmp_path, spoil):
    direct = kept(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(spoil(path.read_bytes()))
    assert_same(kept(tmp_path), direct)
    assert_same(kept(tmp_path), direct)


def test_a_flipped_bit_is_found(tmp_path):
    direct = kept(tmp_path)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    assert_same(kept(tmp_path), direct)


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    assert_same(kept(file), synthetic.make_sites(0, specs=SPECS, **SIZE))


def test_what_cannot_be_drawn_is_told(tmp_path):
    with pytest.raises(InputError, match="data.seed: -1"):
        kept(tmp_path, seed=-1)
