"""What leaves a site: every payload of whole rounds, taken apart: model values, masks, known scalars, nothing else."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from fedklpr_jax import exchange, privacy, simulation, wire
from fedklpr_jax import round as rounds
from fedklpr_jax.assembly import Federation
from fedklpr_jax.metrics import Ledger
from fedklpr_jax.trees import split
from tests.federations import tiny_config, tiny_sites, tiny_task, tiny_unsupervised_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

# Of each method the scalars that travel beside the model, and whether masks do.
CASES = {
    "fedavg": ({"images"}, False),
    "fedpav": ({"images"}, False),
    "fedklpr": ({"images", "klaw"}, True),
    "fedcapr": ({"images", "cdw"}, False),
    "private": (set(), False),
}
LABELS_OF = {"fedcapr": "unsupervised"}


@pytest.fixture(scope="module")
def sites():
    return tiny_sites()


def payloads_of_a_round(name, sites, monkeypatch):
    """Task, method, state after, and of each message (payload, names of its scalars, mask the receiver holds)."""
    monkeypatch.setattr("tests.federations.tiny_sites", lambda: sites)
    config = tiny_config("fedpav" if name == "private" else name, epochs=1,
                         task__name=LABELS_OF.get(name, "supervised"))  # fmt: skip
    task, method = (tiny_unsupervised_task if name in LABELS_OF else tiny_task)(config)
    if name == "private":
        method = privacy.private(method, clip=1.0, noise=1.0, participants=3, key=privacy.seeded(0))
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, 0)
    state = simulation.RunState(server, clients, Ledger(), 0.0)
    sent, pack = [], exchange.pack

    def recorded(model, mask, scalars, held, dtype="float32"):
        payload = pack(model, mask, scalars, held, dtype)
        sent.append((payload, set(scalars), held))
        return payload

    monkeypatch.setattr(exchange, "pack", recorded)
    state, event = simulation.run_round(Federation(config, [], engine, ()), state)
    assert not event["refused"]
    return task, method, state, sent


def holds(content, secret):
    return any(secret in part for part in content)


@pytest.mark.parametrize("name", CASES)
def test_payloads_hold_model_leaves_and_known_scalars_alone(name, sites, monkeypatch):
    scalars, masked = CASES[name]
    task, method, state, sent = payloads_of_a_round(name, sites, monkeypatch)
    assert set(method.tells) == scalars
    model, _ = split(task.init(jax.random.key(0)), method.is_local)
    assert ("classifier" in model["params"]) == (name == "fedavg")
    uploads = sent[-len(task.clients) :]
    downloads = sent[: -len(task.clients)]
    assert downloads and all(names == set() for _, names, _ in downloads)
    assert all(names == scalars for _, names, _ in uploads)
    labels = [np.ravel(label) for client in state.clients for label in jax.tree.leaves(client.labels)]
    assert bool(labels) == (name in LABELS_OF)
    for payload, names, held in sent:
        # Decoding compares all paths, shapes and dtypes with those of the model and the scalars; no byte may be left.
        values, mask, told = exchange.unpack(payload, model, dict.fromkeys(names, np.float32(0)), held)
        assert (mask is not None) == masked
        arrays = [np.asarray(leaf) for leaf in jax.tree.leaves((values, told))]
        assert wire.peek(payload)["leaves"] == len(arrays)
        content = [payload, *(array.tobytes() for array in arrays)]
        for site in sites:
            train = site.train
            assert not any(holds(content, text.encode()) for text in (site.name, *train.names))
            assert not any(holds(content, image.tobytes()) for image in train.pixels[:, 0])
            for secret in (train.ids, train.cams, *labels):
                # Sixteen equal numbers would say nothing, and zeros occur anywhere.
                if len(np.unique(secret[:16])) > 1:
                    for dtype in (np.int32, np.int64, np.float32):
                        assert not holds(content, secret[:16].astype(dtype).tobytes())


def test_the_search_would_find_what_it_looks_for(sites):
    image = sites[0].train.pixels[3, 0]
    payload = exchange.pack({"params": {"w": np.float32([1, 2])}, "stolen": image}, None, {}, None)
    values, _, _ = exchange.unpack(payload, {"params": {"w": np.zeros(2, np.float32)}, "stolen": image}, {}, None)
    assert holds([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(values)], image.tobytes())
    with pytest.raises(wire.WireError, match="leaves"):
        exchange.unpack(payload, {"params": {"w": np.zeros(2, np.float32)}}, {}, None)


def test_other_names_of_people_files_and_sites_change_no_byte(sites, monkeypatch):
    """Identities are numbers that a data set gives, and only their order says anything to a classifier."""
    first = [payload for payload, *_ in payloads_of_a_round("fedpav", sites, monkeypatch)[3]]
    renamed = [
        dataclasses.replace(site, name=f"another {k}", train=dataclasses.replace(
            site.train, ids=site.train.ids * 7 + 1000, names=tuple(f"secret-{n}" for n in range(len(site.train)))))
        for k, site in enumerate(sites)
    ]  # fmt: skip
    second = [payload for payload, *_ in payloads_of_a_round("fedpav", renamed, monkeypatch)[3]]
    assert first == second
