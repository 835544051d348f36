"""The contrasts against their formulas written out in loops."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import contrast, proxies
from fedklpr_jax.losses import MASKED_LOGIT

TAU = 0.5
# Eight points of five proxies: cluster 0 under the cameras 0 and 1, cluster 1 under 0 and 2, cluster 2 under 1; the
# last one sits out.
CLUSTERS = np.int32([0, 0, 0, 1, 1, 2, 2, -1])
CAMERAS = np.int32([0, 0, 1, 0, 2, 1, 1, 0])
OWN = [0, 0, 1, 2, 3, 4, 4]
OF_CLUSTER, OF_CAMERA = [0, 0, 1, 1, 2], [0, 1, 0, 2, 1]
BATCH = np.int32([0, 2, 3, 6])


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def bank():
    found = proxies.build(unit(np.random.default_rng(0).normal(size=(8, 4))), CLUSTERS, CAMERAS)
    assert found.of_point.tolist() == [*OWN, -1] and found.clusters[:5].tolist() == OF_CLUSTER
    return found


@pytest.fixture(scope="module")
def features():
    return unit(np.random.default_rng(1).normal(size=(len(BATCH), 4)))


@pytest.fixture(scope="module")
def logits(features, bank):
    return contrast.proxy_logits(features, bank, temperature=TAU)


def plain_logits(features, bank):
    table = np.asarray(bank.features, np.float64)[:5]
    return [[float(f @ c) / TAU for c in table] for f in features.astype(np.float64)]


def against(row, positive, negative):
    """-(1/|P|) sum_p log(exp l_p / sum_{P + N} exp l_q)."""
    bottom = sum(math.exp(row[q]) for q in (*positive, *negative))
    return -sum(math.log(math.exp(row[p]) / bottom) for p in positive) / len(positive)


def test_logits_and_empty_places(features, bank, logits):
    np.testing.assert_allclose(logits[:, :5], plain_logits(features, bank), rtol=1e-5, atol=1e-6)
    assert (logits[:, 5:] == MASKED_LOGIT).all()


@pytest.mark.short
def test_the_sum_over_cameras_of_means():
    cameras = jnp.array([4, 0, 4, 4, 1, 0])
    values = jnp.array([3.0, 10.0, 6.0, 9.0, 0.5, 20.0])
    assert float(contrast.camera_weights(cameras) @ values) == pytest.approx((3 + 6 + 9) / 3 + (10 + 20) / 2 + 0.5)


@pytest.mark.short
def test_within_the_own_camera(features, bank, logits):
    expected = []
    for row, point in zip(plain_logits(features, bank), BATCH, strict=True):
        alike = [q for q in range(5) if OF_CAMERA[q] == CAMERAS[point]]
        expected.append(-math.log(math.exp(row[OWN[point]]) / sum(math.exp(row[q]) for q in alike)))
    np.testing.assert_allclose(contrast.intra_camera(logits, bank, BATCH), expected, rtol=1e-5)
    # Alone under its camera there is nothing to be told from.
    alone = contrast.intra_camera(logits[:1], bank, np.int32([4]))
    np.testing.assert_allclose(alone, 0.0, atol=1e-6)


@pytest.mark.short
@pytest.mark.parametrize("negatives", [1, 2, 3, 50])
def test_across_cameras(features, bank, logits, negatives):
    expected = []
    for row, point in zip(plain_logits(features, bank), BATCH, strict=True):
        positive = [q for q in range(5) if OF_CLUSTER[q] == CLUSTERS[point]]
        others = sorted(set(range(5)) - set(positive), key=lambda q: -row[q])
        # Clusters of two proxies have three others, that of one has four: 50 are never there.
        expected.append(against(row, positive, others[:negatives]))
    found = jax.jit(partial(contrast.inter_camera, negatives=negatives))(logits, bank, BATCH)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_single_cluster_leaves_only_the_positives():
    whole = proxies.build(unit(np.random.default_rng(2).normal(size=(3, 4))), np.zeros(3, np.int32), np.arange(3))
    feature = unit(np.ones((1, 4)))
    row = (feature @ np.asarray(whole.features).T)[0] / TAU
    logits = contrast.proxy_logits(feature, whole, temperature=TAU)
    found = contrast.inter_camera(logits, whole, np.int32([1]), negatives=50)
    np.testing.assert_allclose(found, [against(row, [0, 1, 2], [])], rtol=1e-5)


@pytest.mark.short
@pytest.mark.parametrize(("negatives", "positives"), [(1, 3), (2, 2), (50, 3), (2, 7)])
@pytest.mark.parametrize("cameras", [3, 5])
def test_the_online_association(features, bank, logits, negatives, positives, cameras):
    table = np.asarray(bank.features, np.float64)[:5]
    expected = []
    for row, feature, point in zip(plain_logits(features, bank), features, BATCH, strict=True):
        similar = (0.15 * feature + 0.85 * table[OWN[point]]) @ table.T
        best = [max((q for q in range(5) if OF_CAMERA[q] == c), key=lambda q: similar[q]) for c in range(3)]
        positive = sorted(best, key=lambda q: -similar[q])[:positives]
        # The hard ones, too, are ranked by what the positives are ranked by.
        others = sorted(set(range(5)) - set(positive), key=lambda q: -similar[q])
        expected.append(against(row, positive, others[:negatives]))
    found = contrast.online_association(
        features, logits, bank, BATCH, cameras=cameras, negatives=negatives, positives=positives
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_balance_of_the_online_association(features, bank, logits):
    # By the sample alone its positives are the best of each camera for itself, whatever its own proxy is like.
    table = np.asarray(bank.features, np.float64)[:5]
    expected = []
    for row, feature in zip(plain_logits(features, bank), features, strict=True):
        similar = feature @ table.T
        best = [max((q for q in range(5) if OF_CAMERA[q] == c), key=lambda q: similar[q]) for c in range(3)]
        top = max(best, key=lambda q: similar[q])
        others = sorted(set(range(5)) - {top}, key=lambda q: -similar[q])
        expected.append(against(row, [top], others[:2]))
    found = contrast.online_association(
        features, logits, bank, BATCH, cameras=3, negatives=2, positives=1, balance=1.0
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradients_reach_the_samples_and_never_the_bank(features, bank):
    def loss(features, table):
        moved = bank._replace(features=table)
        logits = contrast.proxy_logits(features, moved, temperature=TAU)
        each = contrast.intra_camera(logits, moved, BATCH)
        each += contrast.inter_camera(logits, moved, BATCH, negatives=2)
        each += contrast.online_association(features, logits, moved, BATCH, cameras=3, negatives=2)
        return jnp.sum(each)

    of_features, of_table = jax.jit(jax.grad(loss, argnums=(0, 1)))(features, bank.features)
    assert (of_table == 0).all()
    assert (jnp.abs(of_features).max(axis=1) > 1e-3).all()
    # Among fixed choices the gradient is that of the formula: a small step changes the loss by as much.
    step = 1e-3 * of_features
    change = float(loss(features + step, bank.features)) - float(loss(features - step, bank.features))
    assert change == pytest.approx(2e-3 * float(jnp.sum(of_features**2)), rel=2e-2)
