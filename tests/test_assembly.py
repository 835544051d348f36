"""From settings to a federation: who trains, who is tested on what, and what the server holds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import traverse_util

from fedklpr_jax import assembly, simulation
from fedklpr_jax import round as rounds
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.console import Console
from fedklpr_jax.data.synthetic import DEFAULT_SITES
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import Examined, Public
from fedklpr_jax.metrics import Ledger
from fedklpr_jax.models.foreign_names import torchvision_name

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


def config_of(method="fedpav", **settings):
    config = default_config()
    config.method.name, config.task.name = method, "supervised"
    config.data.height, config.data.width, config.data.pad = 32, 16, 2
    config.data.clients = "office,arena"
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in settings.items()})
    return resolved(config)


def federation_of(method="fedpav", **settings):
    return assembly.make_federation(config_of(method, **settings), Console())


def begin(federation):
    server, clients = rounds.start(federation.task, federation.engine.method, 0)
    return simulation.RunState(server, clients, Ledger(), 0.0)


def test_without_names_all_sites_train_but_the_unseen_ones():
    clients, unseen, _ = assembly.load_sites(config_of(data__clients="", data__unseen="arena,mall"))
    assert [site.name for site in unseen] == ["arena", "mall"]
    assert [site.name for site in clients] == [
        spec.name for spec in DEFAULT_SITES if spec.name not in ("arena", "mall")
    ]


def test_wrong_unseen_sites_are_told():
    for unseen, told in [
        ("office", "'office' is one of config.data.clients"),
        ("nowhere", "config.data.unseen: 'nowhere' is no synthetic site"),
    ]:
        with pytest.raises(InputError, match=told):
            assembly.load_sites(config_of(data__unseen=unseen))
    everything = ",".join(spec.name for spec in DEFAULT_SITES)
    with pytest.raises(InputError, match="leaves no site to train on"):
        assembly.load_sites(config_of(data__clients="", data__unseen=everything))


def test_a_site_nobody_trains_on_is_tested_with_the_servers_model_and_stays_out_of_the_mean():
    federation = federation_of(data__unseen="harbour")
    assert federation.task.client_names == ("office", "arena")
    assert federation.task.examined == (Examined("office", 0), Examined("arena", 1), Examined("harbour", None))
    state = begin(federation)
    found = simulation.examine(federation, state, "before")
    event = simulation.headline(federation, found.results["before"], found.densities)
    assert list(event["clients"]) == ["office", "arena"] and list(event["unseen"]["clients"]) == ["harbour"]
    assert event["mean"]["map"] == pytest.approx(np.mean([row["map"] for row in event["clients"].values()]))
    assert event["unseen"]["mean"]["map"] == event["unseen"]["clients"]["harbour"]["map"] > 0
    # No client downloads anything for it.
    assert len(found.lengths) == 2


def test_the_servers_variables_have_the_mean_of_the_local_leaves_and_are_missing_without_a_model():
    federation = federation_of("fedklpr", method__bn__statistics="local")
    state = begin(federation)
    first = state.clients[0]
    leaf = first.local["batch_stats"]["trunk"]["bn1"]["mean"]
    moved = first._replace(local=jax.tree.map(lambda x: x + 2.0, first.local))
    found = simulation.servers_variables(state._replace(clients=state.clients.after(0, {0: moved})))
    np.testing.assert_allclose(found["batch_stats"]["trunk"]["bn1"]["mean"], leaf + 1.0, rtol=1e-6)
    nothing = federation_of("local", data__unseen="harbour")
    assert list(simulation.examine(nothing, begin(nothing), "before").results["before"]) == ["office", "arena"]


def test_centralised_training_has_all_pictures_and_people_in_one_client_and_a_test_for_each_site():
    alone, together = federation_of(), federation_of("centralised")
    task = together.task
    assert task.client_names == ("all",) and task.examined == (Examined("office", 0), Examined("arena", 0))
    arrays = alone.task.arrays
    assert len(task.arrays.ids) == len(arrays.ids)
    # People of different sites stay different ones, cameras too.
    people = sum(len(np.unique(site.train.ids)) for site in assembly.load_sites(together.config)[0])
    assert len(np.unique(task.arrays.ids)) == people
    assert float(task.clients[0].images) == (np.asarray(task.arrays.labels) >= 0).sum()
    assert not any(rounds.start(task, together.engine.method, 0)[0].model)
    with pytest.raises(InputError, match="centralised needs labels"):
        federation_of("centralised", task__name="unsupervised", model__weights="random")


def test_cameras_as_clients_are_tested_on_their_whole_site_and_belong_to_its_edge():
    federation = federation_of(
        "fedreid", data__scenario="camera", method__reid__cloud_every=2, method__reid__distill_every=0
    )
    names = federation.task.client_names
    assert len(names) > 2 and {name.partition("/")[0] for name in names} == {"office", "arena"}
    sites = {site.name: site for site in assembly.load_sites(config_of())[0]}
    for name, exam in zip(names, federation.exams, strict=True):
        assert len(exam.query) == len(sites[name.partition("/")[0]].query)


def test_the_server_gets_public_pictures_only_where_the_method_asks_for_them():
    assert federation_of().task.public is None
    public = federation_of("fedreid", data__public_images=64).task.public
    assert isinstance(public, Public) and public.images == 64
    assert public.arrays.shape == (64, 32, 16, 3) and public.arrays.dtype == np.uint8


@pytest.mark.parametrize("task", ["supervised", "unsupervised"])
def test_a_trunk_begins_with_the_weights_of_a_file_and_the_notes_say_so(tmp_path, task):
    given = config_of(task__name=task, model__arch="resnet18", model__pretrained=str(tmp_path / "net.npz"))
    like = jax.eval_shape(lambda: assembly.model_spec(given).init(jax.random.key(0), 32, 16))
    names = {torchvision_name(leaf): of for leaf, of in traverse_util.flatten_dict(like, sep="/").items()}
    names.pop(None)
    # Kernels [o, i, h, w]; every tensor with a value of its own, which tells them apart.
    shapes = {name: tuple(of.shape[axis] for axis in (3, 2, 0, 1)) if of.ndim == 4 else of.shape
              for name, of in names.items()}  # fmt: skip
    np.savez(tmp_path / "net.npz", **{name: np.full(shape, 1 + k, np.float32)
                                      for k, (name, shape) in enumerate(shapes.items())})  # fmt: skip
    federation = assembly.make_federation(given, Console())
    assert federation.notes[-2:] == (
        "net.npz: 100 tensors make the trunk of resnet18",
        "net.npz: not used of it: nothing; not in it, and as initialised: bnneck",
    )
    trunk = federation.task.init(jax.random.key(5))["params"]["trunk"]
    for leaf, name in (("conv1", "conv1.weight"), ("bn1", "bn1.weight")):
        (value,) = {float(x) for x in np.unique(jax.tree.leaves(trunk[leaf])[-1])}
        assert value == 1 + list(shapes).index(name)
    assert set(np.unique(trunk["bnneck"]["scale"])) == {1.0}
    with pytest.raises(InputError, match=r"net\.npz: weights of resnet18, not of resnet34; set config\.model\.arch"):
        assembly.make_federation(
            config_of(task__name=task, model__arch="resnet34", model__pretrained=given.model.pretrained), Console()
        )
