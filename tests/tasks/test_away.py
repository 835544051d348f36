"""A client whose task knows only the sizes of the others is what it is beside all their pictures."""

import jax
import numpy as np
import pytest

from fedklpr_jax.data.site import Away
from fedklpr_jax.tasks import bottom_up, supervised, unsupervised
from tests.federations import TINY, tiny_config, tiny_sites

KINDS = {"supervised": supervised, "unsupervised": unsupervised, "bottom_up": bottom_up}


def tasks(kind, *, client, **more):
    """The task over all sites, and the one at the site of `client`."""
    config, sites = tiny_config("fedavg", task__name=kind), tiny_sites()
    sizes = (supervised if kind == "supervised" else unsupervised).sizes
    away = [site if k == client else Away(site.name, sizes(site, config.seed)) for k, site in enumerate(sites)]
    return (KINDS[kind].make_task(given, TINY, config, **more) for given in (sites, away))


def seen(task, rows):
    """The pictures in some rows."""
    rows = np.asarray(rows)
    return task.arrays.pixels[rows if task.name == "supervised" else task.arrays.picture[rows]]


@pytest.mark.parametrize("client", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("supervised", {"union": False}), ("supervised", {"union": True}), ("unsupervised", {}), ("bottom_up", {})],
)
def test_a_client_is_the_same_where_the_others_are_away(kind, more, client):
    whole, own = tasks(kind, client=client, **more)
    here, there = whole.clients[client], own.clients[client]
    assert whole.client_names == own.client_names and whole.tests == own.tests
    assert [data.images for data in whole.clients] == [data.images for data in own.clients]
    same_shapes(jax.eval_shape(whole.init, jax.random.key(0)), jax.eval_shape(own.init, jax.random.key(0)))
    assert np.array_equal(seen(whole, here.probe), seen(own, there.probe))
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for name, mine, theirs in zip(here.task._fields, here.task, there.task, strict=True):
        assert np.shape(mine) == np.shape(theirs), name
        if name == "validation" and kind == "supervised":
            count = int(here.task.validations)
            assert np.array_equal(seen(whole, mine[:count]), seen(own, theirs[:count]))
        elif name != "first":
            assert np.array_equal(mine, theirs), name
    plans = [task.plan(0, 3, client, 2) for task in (whole, own)]
    assert plans[0].shape == plans[1].shape
    if kind == "supervised":
        assert np.array_equal(seen(whole, plans[0]), seen(own, plans[1]))
        assert np.array_equal(whole.arrays.labels[plans[0]], own.arrays.labels[plans[1]])
    else:
        same_shapes(whole.labelling.unlabelled, own.labelling.unlabelled)
        same_shapes(whole.labelling.blank, own.labelling.blank)


def same_shapes(left, right):
    """Both trees have leaves of the same shapes and dtypes."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for mine, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_server_has_the_shapes_and_not_a_picture(kind):
    config, sites = tiny_config("fedavg", task__name=kind), tiny_sites()
    sizes = (supervised if kind == "supervised" else unsupervised).sizes
    more = {"union": True} if kind == "supervised" else {}
    whole = KINDS[kind].make_task(sites, TINY, config, **more)
    bare = KINDS[kind].make_task([Away(s.name, sizes(s, config.seed)) for s in sites], TINY, config, **more)
    assert len(bare.arrays.pixels) == 0
    same_shapes(jax.eval_shape(whole.init, jax.random.key(0)), jax.eval_shape(bare.init, jax.random.key(0)))
    assert [data.images for data in whole.clients] == [data.images for data in bare.clients]
    with pytest.raises(AssertionError, match="is tested where its pictures are"):
        bare.evaluate(bare.init(jax.random.key(0)), 0)


def test_sizes_are_counts_of_a_site():
    site = tiny_sites()[0]
    config = tiny_config("fedavg")
    told = supervised.sizes(site, config.seed)
    assert told["images"] + told["held"] == len(site.train)
    assert told["classes"] < len(np.unique(site.train.ids))
    told = unsupervised.sizes(site, config.seed)
    assert told["pictures"] == len(site.train) and told["cameras"] == len(np.unique(site.train.cams))
    assert told["held"] < told["validation"] <= told["pictures"]
