from __future__ import annotations

import doctest

import numpy as np
import pytest

from fedklpr_jax import assembly, pictures
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.console import Console
from fedklpr_jax.evaluation.accuracy import classified


@pytest.fixture(scope="module")
def federation() -> assembly.Federation:
    config = default_config()
    config.task.name, config.method.name = "classification", "fedavg"
    config.data.count, config.data.alpha = 9, 5.0
    return assembly.make_federation(resolved(config), Console())


def test_examples_in_the_docs():
    assert doctest.testmod(pictures).failed == 0


def test_pictures_of_the_best_to_the_worst_clients_are_their_own_test_images(federation):
    data, shares = federation.dealt
    results = {}
    for k, (name, share) in enumerate(zip(federation.task.client_names, shares, strict=True)):
        predicted = data.labels[share.test].copy()
        # Client k misses its first 10 k images.
        predicted[: 10 * k] = (predicted[: 10 * k] + 1) % 10
        results[name] = classified(predicted, data.labels[share.test])
    order = sorted(results, key=lambda name: -results[name].metrics["accuracy"])
    strips = pictures.classified_pictures(federation, results)
    assert len(strips) == pictures.SHOWN_CLIENTS
    assert [*strips][0] == order[0] and [*strips][-1] == order[-1]
    assert [order.index(name) for name in strips] == sorted(order.index(name) for name in strips)
    for name, strip in strips.items():
        rows = shares[federation.task.client_names.index(name)].test
        shown = pictures.spread(len(rows), pictures.SHOWN_PICTURES)
        assert strip.pixels.shape == (pictures.SHOWN_PICTURES, 28, 28, 3)
        np.testing.assert_array_equal(strip.pixels[..., 2], data.pixels[rows[shown], ..., 0])
        assert list(strip.actual) == [data.classes[label] for label in data.labels[rows[shown]]]
        k = federation.task.client_names.index(name)
        assert [p == a for p, a in zip(strip.predicted, strip.actual, strict=True)] == [r >= 10 * k for r in shown]


def test_a_re_id_run_has_no_classified_pictures(federation):
    assert pictures.classified_pictures(federation, {}) == {}
    assert pictures.ranked_lists(federation, {}) == {}
