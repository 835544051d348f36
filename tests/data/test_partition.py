from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedklpr_jax.data import partition
from fedklpr_jax.data.labelled import read_folder
from fedklpr_jax.errors import InputError

FASHION = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "fashion_mnist"
TEN = np.repeat(np.arange(10), 7000)


def assert_cover(parts: list[np.ndarray], count: int) -> None:
    assert all(part.dtype == np.int64 for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(count))


def counts(parts: list[np.ndarray], labels: np.ndarray) -> list[list[int]]:
    return [np.bincount(labels[part], minlength=labels.max() + 1).tolist() for part in parts]


def test_dirichlet_gives_the_class_counts_of_the_procedure_step_by_step() -> None:
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 1])
    random = np.random.RandomState(3)
    random.shuffle(np.arange(3))
    first = np.cumsum(random.dirichlet([5.0, 5.0]))[0]
    random.shuffle(np.arange(5))
    second = np.cumsum(random.dirichlet([5.0, 5.0]))[0]
    parts = partition.dirichlet(labels, 2, 5.0, seed=3, least=1)
    assert counts(parts, labels) == [[int(first * 3), int(second * 5)], [3 - int(first * 3), 5 - int(second * 5)]]


# Logged accuracies of FedOBP's Fashion-MNIST runs (100 clients, seed 42, a quarter to test): client, per cent printed.
@pytest.mark.parametrize(
    ("alpha", "sizes", "logged"),
    [
        (0.1, [198, 253, 1829, 1031, 523, 840], {0: 87.76, 81: 98.15, 77: 98.45, 93: 64.41, 48: 73.42, 67: 95.53}),
        (0.5, [967, 545, 615, 624, 499, 1181], {69: 83.67, 99: 91.35, 67: 87.01, 0: 85.48, 76: 76.34, 41: 77.07}),
    ],
)
def test_dirichlet_gives_the_sizes_behind_the_logged_results(
    alpha: float, sizes: list[int], logged: dict[int, float]
) -> None:
    parts = partition.dirichlet(TEN, 100, alpha, seed=42)
    assert_cover(parts, 70000)
    assert [len(part) for part in parts[:6]] == sizes
    for client, percent in logged.items():
        tested = len(parts[client]) // 4
        assert f"{100 * round(percent / 100 * tested) / tested:.2f}" == f"{percent:.2f}"


def test_dirichlet_class_counts_do_not_depend_on_the_order_of_the_pictures() -> None:
    mixed = np.random.default_rng(0).permutation(TEN)
    ordered = partition.dirichlet(TEN, 20, 0.3, seed=5)
    assert counts(ordered, TEN) == counts(partition.dirichlet(mixed, 20, 0.3, seed=5), mixed)


def test_dirichlet_alpha_sets_the_skew() -> None:
    def largest_share(alpha: float) -> float:
        table = np.array(counts(partition.dirichlet(TEN, 20, alpha, seed=0), TEN))
        return float((table.max(1) / table.sum(1)).mean())

    assert largest_share(1000.0) < 0.15 < 0.5 < largest_share(0.1)


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=40, max_size=150),
    clients=st.integers(1, 5),
    alpha=st.floats(0.3, 50),
    seed=st.integers(0, 2**32 - 1),
    least=st.integers(1, 4),
)
def test_dirichlet_is_a_disjoint_cover_with_enough_for_all(
    labels: list[int], clients: int, alpha: float, seed: int, least: int
) -> None:
    array = np.array(labels)
    parts = partition.dirichlet(array, clients, alpha, seed=seed, least=least)
    assert len(parts) == clients
    assert_cover(parts, len(array))
    assert min(map(len, parts)) >= least
    again = partition.dirichlet(array, clients, alpha, seed=seed, least=least)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))
    assert labels == array.tolist()


def test_seeds_differ() -> None:
    labels = np.repeat(np.arange(3), 100)
    one, other = (partition.dirichlet(labels, 4, 1.0, seed=seed) for seed in (0, 1))
    assert counts(one, labels) != counts(other, labels)
    one, other = (partition.shards(labels, 4, 2, seed=seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"clients": 0}, "clients is 0; give a whole number from 1"),
        ({"alpha": 0.0}, "alpha is 0.0; give a number above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"least": 0}, "least is 0"),
        ({"clients": 9}, "80 pictures are too few for 9 clients of at least 10"),
        ({"clients": 8, "alpha": 0.1}, "in 1000 draws with alpha 0.1 some of the 8 clients always had fewer than 10"),
    ],
)
def test_dirichlet_refuses_what_cannot_be(arguments: dict[str, float], said: str) -> None:
    wanted = {"clients": 4, "alpha": 1.0, "seed": 0, **arguments}
    with pytest.raises(InputError) as error:
        partition.dirichlet(np.repeat([0, 1], 40), **wanted)  # type: ignore[arg-type]
    assert said in str(error.value) and "\n" not in str(error.value)


def test_shards_by_hand() -> None:
    labels = np.array([2, 0, 1, 0, 2, 1, 0, 0])
    parts = partition.shards(labels, 2, 2, seed=0)
    # Sorted 0 0 | 0 0 | 1 1 | 2 2: a hand is two of these four pieces.
    hands = [sorted(labels[part].tolist()) for part in parts]
    assert sorted(sum(hands, [])) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert all(hand.count(label) % 2 == 0 for hand in hands for label in range(3))


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(1, 6),
    pieces=st.integers(1, 6),
    each=st.integers(1, 5),
    shards=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_shards_give_each_client_at_most_so_many_labels(
    classes: int, pieces: int, each: int, shards: int, seed: int
) -> None:
    assume(classes * pieces % shards == 0)
    clients = classes * pieces // shards
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), pieces * each))
    parts = partition.shards(labels, clients, shards, seed=seed)
    assert_cover(parts, len(labels))
    assert all(len(part) == shards * each for part in parts)
    assert all(len(np.unique(labels[part])) <= shards for part in parts)
    again = partition.shards(labels, clients, shards, seed=seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@settings(deadline=None, max_examples=40)
@given(count=st.integers(12, 60), clients=st.integers(1, 4), shards=st.integers(1, 3))
def test_shards_lose_no_picture_where_they_do_not_divide(count: int, clients: int, shards: int) -> None:
    parts = partition.shards(np.arange(count) % 3, clients, shards, seed=0)
    assert_cover(parts, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= shards


@pytest.mark.parametrize(
    ("clients", "shards", "said"),
    [(0, 2, "clients is 0"), (2, 0, "shards_per_client is 0"), (3, 2, "5 pictures are too few for 3 clients of 2")],
)
def test_shards_refuse_what_cannot_be(clients: int, shards: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        partition.shards(np.zeros(5, int), clients, shards, seed=0)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(st.integers(0, 10**6), min_size=2, max_size=60, unique=True),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**32),
    client=st.integers(0, 1000),
)
def test_a_test_split_is_a_pure_function_with_two_sides(
    rows: list[int], share: float, seed: int, client: int
) -> None:
    array = np.array(rows)
    train, test = partition.split_off(array, share, key=(seed, client))
    assert len(train) >= 1 and len(test) == max(int(share * len(rows)), 1)
    assert sorted([*train, *test]) == sorted(rows)
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    again = partition.split_off(array, share, key=(seed, client))
    assert np.array_equal(train, again[0]) and np.array_equal(test, again[1])
    assert array.tolist() == rows


def test_a_test_split_depends_on_the_key_and_is_not_the_head() -> None:
    rows = np.arange(400)
    tests = [partition.split_off(rows, 0.25, key=key)[1] for key in ((42, 0), (42, 1), 7)]
    assert [len(test) for test in tests] == [100, 100, 100]
    assert len({tuple(test) for test in tests}) == 3
    assert all(130 < test.mean() < 270 for test in tests)


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (0, 0.5), (10, 0.0), (10, 1.0), (10, float("nan"))])
def test_a_test_split_refuses_what_leaves_a_side_empty(count: int, share: float) -> None:
    with pytest.raises(InputError, match="^partition: "):
        partition.split_off(np.arange(count), share, key=0)


def test_fashion_mnist_is_shared_out_whole() -> None:
    if not FASHION.is_dir():
        pytest.skip("../shared/data/fashion_mnist is not there")
    data = read_folder(FASHION)
    assert data.pixels.shape == (70000, 28, 28, 1) and data.pixels.dtype == np.uint8
    assert data.classes == tuple("0123456789") and data.refused == ()
    assert np.bincount(data.labels).tolist() == [7000] * 10
    parts = partition.dirichlet(data.labels, 100, 0.1, seed=42)
    assert_cover(parts, 70000)
    splits = [partition.split_off(part, 0.25, key=(42, client)) for client, part in enumerate(parts)]
    assert sum(len(test) for _, test in splits) == 17463
