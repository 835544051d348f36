"""CA-HFP: both forms of a round, whose channels are chosen when, what travels, and the reconstruction."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import channels, exchange, pruning
from fedklpr_jax import round as rounds
from fedklpr_jax.compilations import programs_made
from fedklpr_jax.config import validate
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ServerContext, Uploads
from fedklpr_jax.methods import make_method
from fedklpr_jax.trees import stack
from tests.methods.submodels import SPECS, begin, config_of, flat, tasks_of

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")



def assert_same_masks(left, right):
    for one, other in zip(left, right, strict=True):
        for a, b in zip(jax.tree.leaves(one.mask), jax.tree.leaves(other.mask), strict=True):
            np.testing.assert_array_equal(a, b)


def assert_same_way(left, right, start, within=0.02):
    """Equal up to a small part of the way from `start`: a pixel at a kink moves a weight by more than rounding does."""
    ends, others, starts = (
        np.concatenate([np.broadcast_to(leaf, like.shape).ravel() for leaf, like in zip(
            jax.tree.leaves(tree), jax.tree.leaves(left), strict=True)])
        for tree in (left, right, start)
    )  # fmt: skip
    way = np.linalg.norm(ends - starts)
    assert 0 < way and np.linalg.norm(ends - others) < within * way


@pytest.fixture
def compiled_as_usual():
    """For what has to be right to the last digits: compiled in a hurry, gradients of narrow networks are off by up to
    17 % (jaxlib 0.10.2, by whichever convolution), compiled as usual by 1e-6."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # Nothing stays at the client.
        ("vgg", {"method__capacity__local": ""}),
        # Local classifiers, whose rows of cut channels only weight decay could move, and local statistics.
        ("resnet", {"task__name": "supervised", "method__hfp__refresh": 1, "method__capacity__local":
                    "classifier,batch_stats"}),
        # No statistics, neither to stay nor to travel.
        ("group norm", {}),
    ],
    ids=["vgg", "resnet", "group norm"],
)  # fmt: skip
def test_small_networks_train_as_masked_ones_do(name, settings, request):
    if name != "resnet":
        request.getfixturevalue("compiled_as_usual")
    config = config_of("cahfp", method__capacity__shares="1.0,0.5", **settings)
    tasks = tasks_of(config, name)
    compact, masked = (begin(config, name, form, tasks) for form in (True, False))
    within = 0.02 if name == "resnet" else 1e-4
    for _ in range(2):
        # Rounding grows with every step (as a start 1e-7 apart shows), so that each round begins anew from one state.
        masked.server, masked.clients = jax.tree.map(jnp.array, compact.server), list(compact.clients)
        server = jax.device_get(compact.server.model)
        local = [c.local for c in compact.clients]
        (up, _, logs), (masked_up, _, masked_logs) = compact.round(), masked.round()
        assert_same_masks([up], [masked_up])
        assert_same_way(up.model, masked_up.model, pruning.apply_mask(
            jax.tree.map(lambda x: np.broadcast_to(x, (len(compact.clients), *x.shape)), server), up.mask), within)
        np.testing.assert_allclose(logs["loss"], masked_logs["loss"], rtol=5e-3)
        assert (logs["train_seconds"] > 0).all()
        assert_same_way(compact.server.model, masked.server.model, server, within)
        if name == "resnet":
            for one, other, before in zip(compact.clients, masked.clients, local, strict=True):
                assert_same_way(one.local, other.local, before)
    assert_same_masks(compact.clients, masked.clients)
    # Client 1 has half of the channels: what its classifier has of the others is as it was.
    if name == "resnet":
        kernel, old = (c["params"]["classifier"]["kernel"] for c in (compact.clients[1].local, local[1]))
        own = kept_of(compact, 1)[-1]
        assert own.sum() == 16 < 24 and (kernel[~own] == old[~own]).all() and (kernel[own] != old[own]).any()
        inputs = compact.inputs(range(3))
        tuned = [run.engine.fine_tune(2, np.ones(1, np.float32), inputs) for run in (compact, masked)]
        keeps = {"params": {"trunk": inputs.client.mask["params"]["trunk"]}}
        trunks = [pruning.apply_mask({"params": {"trunk": t["params"]["trunk"]}}, keeps) for t in tuned]
        before = pruning.apply_mask({"params": {"trunk": inputs.message.model["params"]["trunk"]}}, keeps)
        assert_same_way(*trunks, before)


def test_devices_share_the_small_networks():
    # Three of four clients: two calls of one class, or padding where two devices share them.
    config = config_of("cahfp", method__hfp__score="magnitude", method__capacity__shares="1.0,0.5")
    tasks = tasks_of(config, "cnn")
    runs = [begin(config, "cnn", True, tasks), begin(config, "cnn", True, tasks, clients=3, devices=2)]
    start = jax.device_get(runs[0].server.model)
    (up, states, _), (other, other_states, _) = (run.round([0, 1, 3]) for run in runs)
    assert_same_masks([states], [other_states])
    assert_same_way(up.model, other.model, start)
    assert_same_way(runs[0].server.model, runs[1].server.model, start)


def test_a_class_is_compiled_once_whoever_of_it_takes_part():
    # Of clients 0 to 3 the first and the third are of the whole network, the others of half of it.
    config = config_of("cahfp", method__hfp__score="magnitude", method__capacity__shares="1.0,0.5")
    run = begin(config, "cnn", True, clients=2)
    made = []
    for chosen in ([0, 1], [2, 3], [0, 2], [1, 3], [1, 2]):
        before = programs_made()
        run.round(chosen)
        made.append(programs_made() - before)
    # Two of one class take two calls, whose results are joined by new small programs the first time.
    assert made[0] > 0 and made[1] == 0 and made[3:] == [0, 0]


def test_labels_made_on_the_way():
    settings = {"task__name": "unsupervised", "cluster__k1": 6, "cluster__k2": 2, "cluster__min_samples": 2,
                "cluster__eps": 0.585, "data__copies": "1", "cluster__where": "host",
                "method__capacity__shares": "0.5"}  # fmt: skip
    config = config_of("cahfp", **settings)
    run = begin(config, "re-ID", True, client_map="loop")
    upload, _, logs = run.round()
    assert logs["labels"].shape[:2] == (3, 1) and (logs["steps"] > 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(upload.model))
    config.method.hfp.score = "curvature"
    with pytest.raises(InputError, match=r"^config\.method\.hfp\.score: 'curvature' needs labels"):
        validate(config)


@pytest.fixture(scope="module")
def vgg():
    config = config_of("cahfp")
    return config, tasks_of(config, "vgg")


def kept_of(run, client):
    mask = run.clients[client].mask
    return [np.asarray(kept) for kept in channels.kept_channels(mask, channels.channel_groups(mask))]


def test_a_client_chooses_once_by_its_own_data(vgg):
    config, tasks = vgg
    run = begin(config, "vgg", True, tasks)
    first = [kept_of(run, k) for k in range(4)]
    assert [kept[0].tolist() for kept in first] == [[True] * n + [False] * (32 - n) for n in (32, 16, 8, 32)]
    # Client 1 is absent in the first round: it keeps what it had, and what comes next is the whole model.
    run.round([0, 2, 3])
    assert [int(c.memory) for c in run.clients] == [1, 0, 1, 1]
    assert run.server.memory.rounds.tolist() == [1, 0, 1, 1]
    chosen = [kept_of(run, k) for k in range(4)]
    assert [[int(kept.sum()) for kept in rows] for rows in chosen] == [[32, 32], [16, 16], [8, 8], [32, 32]]
    assert all((a == b).all() for a, b in zip(chosen[1], first[1], strict=True))
    assert any((a != b).any() for a, b in zip(chosen[2], first[2], strict=True))
    # By the scores of the whole model on its own batches.
    shares = [float(pruning.density(run.engine.download(run.server, np.int32(k)).mask)) for k in range(4)]
    assert shares[0] == shares[1] == shares[3] == 1.0 and shares[2] < 0.2
    run.round()
    assert all((a == b).all() for a, b in zip(kept_of(run, 2), chosen[2], strict=True))
    assert run.server.memory.rounds.tolist() == [2, 1, 2, 2]
    for rows, k in ((run.server.memory.kept, 1), (run.server.memory.kept, 2)):
        assert all((np.asarray(row[k]) == kept).all() for row, kept in zip(rows, kept_of(run, k), strict=True))


def test_the_choice_is_that_of_the_scores(vgg):
    config, (task, narrow) = vgg
    run = begin(config, "vgg", True, (task, narrow))
    model = jax.device_get(run.server.model)
    # Eight channels of the first layer get norm parameters far above the others'.
    wanted = [3, 7, 8, 12, 17, 20, 21, 31]
    scale = np.full(32, 1e-3, np.float32)
    scale[wanted] = 1.0
    model["params"]["trunk"]["bn1_1"]["scale"] = scale
    run.server = run.server._replace(model=jax.tree.map(jnp.array, model))
    run.round([2])
    assert np.flatnonzero(kept_of(run, 2)[0]).tolist() == wanted


def test_bytes_fall_with_the_square_of_the_capacity(vgg):
    config, tasks = vgg
    run = begin(config, "vgg", True, tasks)
    run.round()
    held = [c.mask for c in run.clients]
    upload, states, _ = run.round()
    sizes = []
    for k, (one, message) in enumerate(
        zip(rounds.unstack(upload, 4), [run.engine.download(run.server, np.int32(k)) for k in range(4)], strict=True)
    ):
        up = exchange.pack(one.model, one.mask, one.scalars, held[k])
        down = exchange.pack(jax.device_get(message.model), jax.device_get(message.mask), {}, run.clients[k].mask)
        values = sum(int(leaf.sum()) for leaf in jax.tree.leaves(one.mask))
        # Float32, a little compressed, and nothing but header and checksum beside.
        assert all(3.2 * values < len(payload) < 4 * values + 1500 for payload in (up, down))
        sizes.append(values)
    # The second convolution falls with the square; first, classifier and norms with the share, three biases stay. The
    # statistics do not travel.
    assert sizes == [9 * n * n + (9 + 3 + 2 * 2) * n + 3 for n in (32, 16, 8, 32)]


@functools.cache
def aggregation_of(fill):
    """The compiled server step, its server of nines, and who of two clients holds what: channels 0 and 1, and 0."""
    method = make_method(config_of("cahfp", method__hfp__fill=fill).method)
    trunk = jax.eval_shape(lambda: SPECS["vgg"].init(jax.random.key(0), 16, 16))
    shapes = {"params": {"trunk": trunk["params"]}, "batch_stats": {"trunk": trunk["batch_stats"]}}

    @jax.jit
    def given():
        model = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 9.0), shapes)
        groups = channels.channel_groups(model)
        masks = [
            channels.structured_mask(model, groups, [jnp.arange(group.width) < count for group in groups])
            for count in (2, 1)
        ]
        return rounds.ServerState(model, method.server_memory(model, 3), jnp.int32(0)), masks

    return (jax.jit(lambda server, uploads: method.aggregate(server, uploads, ServerContext())), *given())


def aggregated(fill, accepted=(True, True)):
    """Clients 2 and 0, of 10 and 30 images, send ones and fives; those of the second are NaN where it is refused."""
    step, server, masks = aggregation_of(fill)
    values = (1.0, 5.0 if accepted[1] else np.nan)
    models = [jax.tree.map(lambda m, x=x: np.where(m, np.float32(x), np.float32(0)), mask)
              for mask, x in zip(masks, values, strict=True)]  # fmt: skip
    uploads = Uploads(
        stack(models), stack(masks), {"images": np.float32([10, 30])}, np.array([2, 0]), np.array(accepted)
    )
    after, logs = step(server, uploads)
    leaves = flat(after.model)
    first = leaves["params/trunk/bn1_1/scale"][:3].tolist()
    assert leaves["batch_stats/trunk/bn1_1/mean"][:3].tolist() == first, "statistics are filled like weights"
    return first, after, logs, server


def test_reconstruction_by_hand():
    # Channel 0: 0.25 * 1 + 0.75 * 5 = 4. Channel 1: client 2's alone, or 0.25 * 1 + 0.75 * 9, or 0.25 * 1.
    assert aggregated("coverage")[0] == [4.0, 1.0, 9.0]
    assert aggregated("global")[0] == [4.0, 7.0, 9.0]
    assert aggregated("zeros")[0] == [4.0, 0.25, 0.0]


@pytest.mark.parametrize("fill", ["coverage", "global", "zeros"])
def test_a_refused_upload_leaves_no_trace(fill):
    values, after, logs, server = aggregated(fill, accepted=(True, False))
    assert values == {"coverage": [1.0, 1.0, 9.0], "global": [1.0, 1.0, 9.0], "zeros": [1.0, 1.0, 0.0]}[fill]
    assert logs["weight"].tolist() == [1.0, 0.0]
    assert after.memory.rounds.tolist() == [0, 0, 1]
    for new, old in zip(after.memory.kept, server.memory.kept, strict=True):
        assert (new[:2] == old[:2]).all() and np.flatnonzero(new[2]).tolist() == [0, 1]
    _, all_refused, _, server = aggregated(fill, accepted=(False, False))
    assert flat(all_refused.model)["params/trunk/bn1_1/scale"].tolist() == [9.0] * 32


def test_a_narrow_task_of_other_widths_is_refused():
    config = config_of("cahfp")
    task, narrow = tasks_of(config, "vgg")
    with pytest.raises(InputError, match=r"network for 0\.5 of the channels: .* is not \("):
        rounds.make_engine(task, make_method(config.method), epochs=1, narrow=[task] * 3)
    with pytest.raises(InputError, match="2 narrow tasks; give one for each class"):
        rounds.make_engine(task, make_method(config.method), epochs=1, narrow=narrow[:2])
