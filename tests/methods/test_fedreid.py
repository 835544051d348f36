"""FedReID's four parts by hand, and a round of each on a small federation."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import aggregation, losses
from fedklpr_jax import round as rounds
from fedklpr_jax.config import validate
from fedklpr_jax.data import augment, public
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientContext, ClientState, ServerContext, ServerState, Uploads
from fedklpr_jax.methods import fedpav, make_method
from fedklpr_jax.tasks import reid
from tests.federations import TINY, tiny_config, tiny_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def method_of(clients=(), **settings):
    options = {"cdw": False, "distill_every": 0} | settings
    config = tiny_config("fedreid", **{f"method__reid__{name}": value for name, value in options.items()})
    validate(config)
    return make_method(config.method, clients)


def tree(kernel, count=0.0):
    return {"params": {"trunk": {"kernel": jnp.asarray(kernel, jnp.float32)}},
            "batch_stats": {"trunk": {"count": jnp.asarray(count, jnp.float32)}}}  # fmt: skip


def kernel_of(model):
    return np.asarray(model["params"]["trunk"]["kernel"])


def uploads_of(kernels, *, images, clients=None, accepted=None, cdw=None, counts=None):
    scalars = {"images": jnp.array(images, jnp.float32)} | ({} if cdw is None else {"cdw": jnp.array(cdw)})
    count = len(images)
    return Uploads(
        tree(kernels, np.zeros(count) if counts is None else counts), None, scalars,
        jnp.arange(count) if clients is None else jnp.array(clients),
        jnp.ones(count, bool) if accepted is None else jnp.array(accepted),
    )  # fmt: skip


def start(method, kernel, clients, count=0.0):
    model = tree(kernel, count)
    return ServerState(model, method.server_memory(model, clients), jnp.int32(0))


def next_model(method, server, client):
    return kernel_of(method.download(server, jnp.int32(client)).model)


# --- cosine distance weight


def finished(probe):
    """What a client sends whose received trunk and classifier were 1 and 2, and are 3 and 4 after training."""
    received = {"params": {"trunk": {"kernel": jnp.float32(1)}}}
    trained = {"params": {"trunk": {"kernel": jnp.float32(3)}}}
    had, has = ({"params": {"classifier": {"kernel": jnp.float32(k)}}} for k in (2, 4))
    context = ClientContext(jnp.int32(0), received, had, jnp.float32(7), lambda model: jnp.float32(0), probe)
    return method_of(cdw=True).finish(trained, ClientState(has, None, ()), context)[0]


@pytest.mark.short
@pytest.mark.parametrize("name", ["logits", "embedding"])
def test_the_distance_is_between_logits_or_embeddings_where_there_are_none(name):
    # Two pictures, one turned by a right angle and one not at all. The last column belongs to no class of this client.
    before = jnp.array([[3.0, 0.0, losses.MASKED_LOGIT], [1.0, 1.0, losses.MASKED_LOGIT]])
    after = jnp.array([[0.0, 2.0, losses.MASKED_LOGIT], [2.0, 2.0, losses.MASKED_LOGIT]])

    def probe(variables):
        params = variables["params"]
        whole = params["trunk"]["kernel"] + params["classifier"]["kernel"]
        found = {name: jnp.where(whole == 7.0, after, jnp.where(whole == 3.0, before, jnp.nan))}
        return found if name == "embedding" else found | {"embedding": jnp.ones((2, 3))}

    upload = finished(probe)
    assert float(upload.scalars["cdw"]) == pytest.approx(0.5, abs=1e-6)
    assert float(upload.scalars["images"]) == 7.0 and upload.mask is None


@pytest.mark.short
def test_clients_weigh_by_distance_or_by_images():
    uploads = uploads_of([1.0, 5.0, 9.0], images=[10, 30, 60], cdw=[0.1, 0.3, 0.4])
    for cdw, expected in ((True, [1 / 8, 3 / 8, 1 / 2]), (False, [0.1, 0.3, 0.6])):
        method = method_of(cdw=cdw)
        assert method.is_local("params/classifier/kernel") and not method.needs_public
        server, logs = method.aggregate(start(method, 2.0, 3), uploads, ServerContext())
        np.testing.assert_allclose(logs["weight"], expected, rtol=1e-6)
        np.testing.assert_allclose(kernel_of(server.model), np.dot(expected, [1, 5, 9]), rtol=1e-6)
        assert int(server.round) == 1 and ("cdw" in logs) == cdw
    refused = uploads_of([1.0, np.nan, 9.0], images=[10, 30, 60], cdw=[0.1, 1e9, 0.3], accepted=[True, False, True])
    method = method_of(cdw=True)
    server, logs = method.aggregate(start(method, 2.0, 3), refused, ServerContext())
    np.testing.assert_allclose(logs["weight"], [0.25, 0, 0.75], rtol=1e-6)
    np.testing.assert_allclose(kernel_of(server.model), 7.0, rtol=1e-6)


# --- knowledge distillation

PICTURES = np.random.default_rng(0).normal(size=(70, 3)).astype(np.float32)


def linear(pictures=PICTURES):
    """A server with vectors for pictures and x W for a feature; the count is of the batches trained on."""

    def represent(model, rows, train):
        count = model["batch_stats"]["trunk"]["count"]
        features = jnp.asarray(pictures)[rows] @ model["params"]["trunk"]["kernel"]
        return features, {"trunk": {"count": count + 1.0 if train else count}}

    return ServerContext(represent=represent, public=len(pictures))


def distilled(kernel, teachers, rate):
    """Two batches of SGD by hand: gradient of the mean square, weight decay 5e-4, Nesterov momentum 0.9."""
    kernel, velocity = kernel.astype(np.float64), 0.0
    for x in (PICTURES[:32].astype(np.float64), PICTURES[32:64].astype(np.float64)):
        features = [x @ teacher for teacher in teachers]
        target = np.mean([f / np.linalg.norm(f, axis=1, keepdims=True) for f in features], axis=0)
        gradient = 2 / target.size * x.T @ (x @ kernel - target) + 5e-4 * kernel
        velocity = 0.9 * velocity + gradient
        kernel = kernel - rate * (gradient + 0.9 * velocity)
    return kernel


@pytest.mark.short
def test_distillation_by_hand_every_second_round():
    method = method_of(distill_every=2, distill_rate=0.25)
    assert method.needs_public
    random = np.random.default_rng(1)
    kernels = random.normal(size=(3, 3, 2)).astype(np.float32)
    kernels[1] = np.nan
    uploads = uploads_of(kernels, images=[10, 5, 30], accepted=[True, False, True], counts=[4.0, np.nan, 8.0])
    server = start(method, np.zeros((3, 2)), 3)
    step = jax.jit(lambda server, uploads: method.aggregate(server, uploads, linear()))
    mean = 0.25 * kernels[0] + 0.75 * kernels[2]
    server, _ = step(server, uploads)
    np.testing.assert_allclose(kernel_of(server.model), mean, rtol=1e-5)
    assert float(server.model["batch_stats"]["trunk"]["count"]) == 7.0
    server, logs = step(server, uploads)
    expected = distilled(mean, [kernels[0], kernels[2]], 0.25)
    np.testing.assert_allclose(kernel_of(server.model), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - mean).max() > 0.05
    # The student's own statistics moved, once a batch; 6 of the 70 pictures fill no batch.
    assert float(server.model["batch_stats"]["trunk"]["count"]) == 9.0
    np.testing.assert_allclose(logs["weight"], [0.25, 0, 0.75], rtol=1e-6)
    server, _ = step(server._replace(round=jnp.int32(3)), uploads._replace(accepted=jnp.zeros(3, bool)))
    np.testing.assert_allclose(kernel_of(server.model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.short
def test_too_few_public_pictures_are_told():
    few = linear(PICTURES[:31])
    for method in (method_of(distill_every=1), method_of(cluster=True)):
        assert method.needs_public
        with pytest.raises(InputError, match="fedreid: 31 public pictures at the server are too few; give 32"):
            method.aggregate(start(method, np.zeros((3, 2)), 1), uploads_of(np.ones((1, 3, 2)), images=[1]), few)


# --- client clustering


@pytest.mark.short
@pytest.mark.parametrize("cdw", [False, True])
def test_clusters_have_their_own_models(cdw):
    method = method_of(cluster=True, cdw=cdw)
    # Models of one direction see the pictures alike, whatever their length; client 3 is absent, client 2's is refused.
    # Features change sign from picture to picture: their mean would tell nothing, one after the other they do.
    kernels = [[1.0, 0.0], [0.1, 1.0], [np.nan, 0.0], [4.0, 0.1], [0.0, 2.0]]
    uploads = uploads_of(
        np.array(kernels)[..., None] * np.ones(3), images=[10, 10, 50, 30, 10], clients=[0, 1, 2, 4, 5],
        accepted=[True, True, False, True, True], cdw=[0.1, 0.2, 0.9, 0.1, 0.6] if cdw else None,
    )  # fmt: skip

    def represent(model, rows, train):
        sign = jnp.where(rows % 2 == 0, 1.0, -1.0)
        return sign[:, None] * model["params"]["trunk"]["kernel"][:, 0], model["batch_stats"]

    context = ServerContext(represent=represent, public=64)
    server = start(method, np.full((2, 3), 7.0), 6)
    server, logs = jax.jit(lambda s, u: method.aggregate(s, u, context))(server, uploads)
    assert logs["cluster"].dtype == jnp.float32 and logs["cluster"].tolist() == [0, 1, -1, 0, 1]
    first, second = ([0.5, 0.5], [0.25, 0.75]) if cdw else ([0.25, 0.75], [0.5, 0.5])
    own = {
        0: np.dot(first, [kernels[0], kernels[3]]), 1: np.dot(second, [kernels[1], kernels[4]]), 2: [7.0, 7.0],
        3: [7.0, 7.0],
    }  # fmt: skip
    for client, model in {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 3}.items():
        np.testing.assert_allclose(next_model(method, server, client)[:, 0], own[model], rtol=1e-6)
    weights = [0.1, 0.2, 0.1, 0.6] if cdw else [1 / 6, 1 / 6, 1 / 2, 1 / 6]
    everyone = np.dot(weights, [kernels[k] for k in (0, 1, 3, 4)])
    np.testing.assert_allclose(kernel_of(server.model)[:, 0], everyone, rtol=1e-6)


# --- device, edge, cloud


@pytest.mark.short
def test_a_cloud_that_averages_every_round_is_fedpav():
    random = np.random.default_rng(0)
    for accepted in ([True] * 5, [True, False, True, True, False]):
        uploads = uploads_of(random.normal(size=(5, 4)), images=[10, 3, 20, 7, 5], accepted=accepted)
        edges, flat = method_of(["a/c1", "b/c1", "a/c2", "b/c2", "c"], cloud_every=1), fedpav.make()
        server, _ = edges.aggregate(start(edges, np.zeros(4), 5), uploads, ServerContext())
        expected, _ = flat.aggregate(start(flat, np.zeros(4), 5), uploads, ServerContext())
        np.testing.assert_allclose(kernel_of(server.model), kernel_of(expected.model), rtol=1e-5, atol=1e-6)
        for client in range(5):
            np.testing.assert_array_equal(next_model(edges, server, client), kernel_of(server.model))


@pytest.mark.short
def test_edges_go_their_own_way_between_two_meetings():
    method = method_of(["a/c1", "b/c1", "a/c2", "b/c2"], cloud_every=2)
    assert not method.needs_public
    step = jax.jit(lambda server, uploads: method.aggregate(server, uploads, ServerContext()))
    server = start(method, 9.0, 4)
    # Edge a: (10 * 1 + 30 * 5) / 40 = 4; edge b hears only its second camera.
    server, logs = step(server, uploads_of([1.0, 5.0, 2.0], images=[10, 30, 20], clients=[0, 2, 3]))
    assert [float(next_model(method, server, k)) for k in range(4)] == [4.0, 2.0, 4.0, 2.0]
    assert float(kernel_of(server.model)) == 9.0
    np.testing.assert_allclose(logs["weight"], [1 / 6, 1 / 2, 1 / 3], rtol=1e-6)
    # Now edge b hears nothing that it takes, and edge a one camera: it becomes 8 and counts with 40 images, b with 20.
    server, _ = step(server, uploads_of([8.0, np.nan], images=[10, 50], clients=[0, 1], accepted=[True, False]))
    assert float(kernel_of(server.model)) == pytest.approx((40 * 8 + 20 * 2) / 60)
    assert [float(next_model(method, server, k)) for k in range(4)] == [float(kernel_of(server.model))] * 4
    # A new count begins: edge a, unheard since, has no say.
    server, _ = step(server, uploads_of([1.0], images=[5], clients=[1]))
    server, _ = step(server, uploads_of([3.0], images=[5], clients=[1]))
    assert float(kernel_of(server.model)) == 3.0


@pytest.mark.short
def test_edges_average_by_distance_and_meet_by_images():
    method = method_of(["a/c1", "a/c2", "b"], cloud_every=1, cdw=True)
    uploads = uploads_of([0.0, 4.0, 10.0], images=[10, 30, 60], cdw=[0.3, 0.1, 5.0])
    server, _ = method.aggregate(start(method, 9.0, 3), uploads, ServerContext())
    assert float(kernel_of(server.model)) == pytest.approx(0.4 * 1.0 + 0.6 * 10.0)


@pytest.mark.short
def test_edges_need_to_know_their_cameras():
    with pytest.raises(ValueError, match="give the edge of each client"):
        method_of(cloud_every=2)


# --- aggregation within groups


@pytest.mark.short
def test_grouped_mean_by_hand():
    params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, jnp.inf]])}
    previous = {"w": jnp.full((4, 2), 9.0)}
    found = aggregation.grouped_mean(
        params, jnp.array([1.0, 3.0, 0.0]), jnp.array([4, 4, 2]), jnp.array([2, 4, 4, -1]), previous
    )
    # Group 2's only member has no weight; nobody is in group -1.
    assert found["w"].tolist() == [[9.0, 9.0], [2.5, 3.5], [2.5, 3.5], [9.0, 9.0]]


# --- settings, and whole rounds


@pytest.mark.short
@pytest.mark.parametrize(
    "settings",
    [
        {"cluster": True, "distill_every": 10},
        {"cloud_every": 2, "distill_every": 3},
        {"cluster": True, "cloud_every": 1},
    ],
)
def test_what_is_not_combined_is_refused(settings):
    with pytest.raises(InputError) as caught:
        method_of(**settings)
    assert str(caught.value).startswith("config.method.reid: distillation, clustering and edges are not combined")


@pytest.mark.parametrize(
    "settings",
    [{"cdw": True, "distill_every": 1, "distill_rate": 0.01}, {"cdw": True, "cluster": True},
     {"cdw": True, "cloud_every": 2}],
    ids=["distillation", "clusters", "edges"],
)  # fmt: skip
def test_a_round_of_each(settings):
    names = ("pier", "gate", "yard")
    task, method = tiny_task(tiny_config("fedreid"), method_of(names, **settings))
    pixels = public.drawn(64, 32, 16)
    task = dataclasses.replace(task, public=reid.public_images(pixels, TINY))
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, seed=0)
    server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(server))
    assert np.isclose(logs["weight"].sum(), 1) and (logs["cdw"] > 0).all()
    models = [engine.download(server, np.int32(k)).model for k in range(3)]
    features = [task.public.represent(pixels, model, jnp.arange(32), False)[0] for model in models]
    apart = [[not np.allclose(a, b) for a in features] for b in features]
    if "cluster" in settings:
        assert apart == [[a != b for a in logs["cluster"]] for b in logs["cluster"]]
    else:
        assert apart == [[bool(settings.get("cloud_every")) and a != b for a in range(3)] for b in range(3)]


def test_public_images_are_embedded_without_dropout():
    spec = dataclasses.replace(TINY, embedding_dim=4, dropout=0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 16, 3), np.uint8)
    found = reid.public_images(pixels, spec)
    start = spec.init(jax.random.key(0), 32, 16)
    model = {kind: {"trunk": start[kind]} for kind in ("params", "batch_stats")}
    rows = np.array([3, 1, 5, 6])
    represent = jax.jit(found.represent, static_argnums=3)
    features, stats = represent(found.arrays, model, rows, False)
    embed = jax.jit(lambda images: spec.apply(start, augment.normalise(images), False)[0]["embedding"])
    np.testing.assert_allclose(features, embed(pixels[rows]), rtol=1e-4, atol=1e-5)
    assert found.images == 8
    jax.tree.map(np.testing.assert_array_equal, stats, model["batch_stats"])
    features, after = represent(found.arrays, model, rows, True)
    assert (np.asarray(features) != 0).all()  # dropout would put half of them to zero
    assert jax.tree.structure(after) == jax.tree.structure(stats)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(stats), strict=True))


@pytest.mark.short
@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("fedreid*.py")), ids=lambda file: file.stem)
def test_every_variant_is_a_valid_configuration_of_its_name(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if config.data.source == "folder":
        config.data.root = "given on the command line"
    validate(config)
    assert (config.name or config.method.name) == file.stem and f"experiments/{file.name}" in module.__doc__
    assert (config.method.name, config.task.name) == ("fedreid", "supervised")
    reid_, parts = config.method.reid, file.stem.removeprefix("fedreid").split("_")
    if "r50" not in parts:
        assert reid_.cdw == (parts == [""] or "cdw" in parts)
        assert bool(reid_.distill_every) == (parts == [""] or "kd" in parts)
        assert reid_.cluster == ("cluster" in parts) and bool(reid_.cloud_every) == ("edges" in parts)
