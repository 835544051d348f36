"""Losses, against hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import losses


def test_kl_by_hand():
    # P = (0.5, 0.5), Q = (0.75, 0.25): KL(P||Q) = 0.5 ln(2/3) + 0.5 ln 2.
    p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.75, 0.25]]))
    forward = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    reverse = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert float(losses.kl_feature_loss(p, q)) == pytest.approx(forward, rel=1e-5)
    assert float(losses.kl_feature_loss(p, q, direction="reverse")) == pytest.approx(reverse, rel=1e-5)
    # T = 0.5 doubles the logits: P stays, Q becomes (0.9, 0.1); no T^2 factor.
    sharp = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert float(losses.kl_feature_loss(p, q, temperature=0.5)) == pytest.approx(sharp, rel=1e-5)
    with pytest.raises(ValueError, match="direction"):
        losses.kl_feature_loss(p, q, direction="sideways")


def test_kl_is_the_mean_over_the_batch_and_pulls_towards_the_reference():
    reference = jnp.array([[0.0, 0.0], [1.0, -1.0]])
    local = jnp.array([[1.0, 0.0], [1.0, -1.0]])
    one = losses.kl_feature_loss(reference[:1], local[:1])
    assert float(losses.kl_feature_loss(reference, local)) == pytest.approx(float(one) / 2, rel=1e-6)
    gradient = jax.grad(lambda x: losses.kl_feature_loss(reference, x))(local)
    assert gradient[0, 0] > 0 > gradient[0, 1] and np.allclose(gradient[1], 0, atol=1e-6)


def test_cross_entropy_by_hand_and_padding_changes_nothing():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    plain = losses.identity_cross_entropy(logits, jnp.array([0]), jnp.int32(3), smoothing=0.0)
    assert float(plain) == pytest.approx(-np.log(0.7), rel=1e-5)
    smooth = losses.identity_cross_entropy(logits, jnp.array([0]), jnp.int32(3), smoothing=0.3)
    expected = -(0.7 * np.log(0.7) + 0.1 * (np.log(0.7) + np.log(0.2) + np.log(0.1)))
    assert float(smooth) == pytest.approx(expected, rel=1e-5)
    wide = losses.mask_logits(jnp.concatenate([logits, jnp.full((1, 4), 50.0)], axis=1), jnp.int32(3))
    padded = losses.identity_cross_entropy(wide, jnp.array([0]), jnp.int32(3), smoothing=0.3)
    assert float(padded) == pytest.approx(expected, rel=1e-5)


def test_batch_hard_triplet_by_hand():
    # On a line: a a b at 0, 1, 3. Anchor 0: 1 - 3, anchor 1: 1 - 2, anchor 2 has no positive.
    x, labels = jnp.array([[0.0], [1.0], [3.0]]), jnp.array([0, 0, 1])
    loss = losses.batch_hard_triplet(x, labels, margin=1.5)
    assert float(loss) == pytest.approx((0.0 + 0.5) / 2, abs=1e-5)


def test_triplet_is_finite_where_pictures_repeat_or_nothing_is_comparable():
    same = jnp.ones((4, 3))
    for labels in (jnp.array([0, 0, 1, 1]), jnp.zeros(4, jnp.int32), jnp.arange(4)):
        value, gradient = jax.value_and_grad(lambda x, y=labels: losses.batch_hard_triplet(x, y))(same)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_proximal_by_hand():
    loss = losses.proximal({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([0.0, 4.0])})
    assert float(loss) == pytest.approx(2.5)


def test_cosine_distance_by_hand():
    reference = jnp.array([[3.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    local = jnp.array([[0.0, 2.0], [5.0, 5.0], [-1.0, 0.0]])
    # A right angle, the same direction, the opposite one: lengths do not count.
    assert float(losses.cosine_distance(reference, local)) == pytest.approx((1 + 0 + 2) / 3, abs=1e-6)
    assert float(losses.cosine_distance(local, reference)) == pytest.approx(1.0, abs=1e-6)
    gradient = jax.grad(lambda x: losses.cosine_distance(reference, x))(local)
    # Of the first row -(1, 0) / 2, a third of it: towards the reference and across the row itself.
    np.testing.assert_allclose(gradient[0], [-1 / 6, 0.0], atol=1e-6)
    np.testing.assert_allclose(jnp.sum(gradient * local, axis=1), 0.0, atol=1e-6)


def test_cosine_distance_of_a_row_of_zeros_is_finite_as_is_its_gradient():
    zeros = jnp.zeros((1, 2))
    value, gradient = jax.value_and_grad(lambda x: losses.cosine_distance(jnp.ones((1, 2)), x))(zeros)
    assert np.isfinite(value) and np.isfinite(gradient).all()
