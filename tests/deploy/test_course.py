"""A deployment against the simulation, and what a server does about sites that fail; no network here."""

import json
import shutil

import jax
import numpy as np
import pytest
import zstandard

from fedklpr_jax import checkpoint, exchange, train, trained
from fedklpr_jax import config as settings
from fedklpr_jax.deploy import server
from fedklpr_jax.deploy.messages import Letter, Silence
from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import read_metrics
from fedklpr_jax.trees import split
from tests.deploy.fleets import InProcess, quiet
from tests.federations import write_shapes


def small(method, out, **more):
    """A run of three clients on few pictures: what is looked at is what goes between the machines."""
    config = settings.default_config()
    config.data.source, config.data.root = "folder", write_shapes(out.with_name("pictures"))
    config.method.name, config.task.name, config.model.arch = method, "classification", "cnn"
    config.data.count, config.data.least, config.out = 3, 20, str(out)
    config.rounds, config.epochs, config.eval.every, config.participation = 2, 1, 100, 1.0
    config.deploy.wait, config.deploy.deadline = 1, 5
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in more.items()})
    return config


def deployed(config, root, **options):
    """`(summary, fleet)` of a run whose sites are in folders of `root`."""
    fleets = []

    def fleet_of(enrol, names, sizes):
        fleets.append(InProcess(enrol, names, root, local={"data.root": config.data.root}, **options))
        return fleets[0]

    return server.run(config, quiet(), "again", fleet_of), fleets[0]


def leaves(directory):
    """Every leaf of the newest checkpoint of a run, by its path."""
    folder = directory / "checkpoints"
    return checkpoint.leaves(folder, checkpoint.latest(folder))


def rounds_of(directory):
    """What the log of a run says of its clients, a list a round."""
    return [event["clients"] for event in read_metrics(directory / "metrics.jsonl") if event["event"] == "round"]


def same(left, right):
    return left.keys() == right.keys() and all(left[key].tobytes() == right[key].tobytes() for key in left)


@pytest.mark.parametrize(
    ("method", "more"),
    [("fedklpr", {"method__prune__step": 0.2}), ("fedavg", {"participation": 0.67, "wire__dtype": "bfloat16"})],
)
def test_a_deployment_ends_with_the_bits_of_the_simulation(tmp_path, method, more):
    there, fleet = deployed(small(method, tmp_path / "there", **more), tmp_path / "sites")
    here = train.run(small(method, tmp_path / "here", client_map="loop", **more), quiet())
    for key in ("clients", "mean", "after", "validation", "saving", "refused"):
        assert there[key] == here[key], key
    at_server = [
        {path: value for path, value in leaves(tmp_path / run).items() if path.startswith("server")}
        for run in ("there", "here")
    ]
    assert len(at_server[0]) >= 9 and same(*at_server)
    # What went up and down but for the examination at the start, which a simulation has for nothing.
    examined = there["bytes"].pop("examinations")
    assert here["bytes"].pop("examinations") == 0 < examined
    assert there["bytes"] == here["bytes"]
    assert fleet.payloads == there["bytes"]["total"] + examined
    assert rounds_of(tmp_path / "there") == rounds_of(tmp_path / "here")
    assert trained.load(tmp_path / "here", "c1", quiet()).rounds == 2
    with pytest.raises(InputError, match="its clients were machines of their own, and their models are there"):
        trained.load(tmp_path / "there", "c1", quiet())


def test_a_sites_state_is_that_of_its_client(tmp_path):
    config = small("fedper", tmp_path / "there", rounds=1)
    deployed(config, tmp_path / "sites")
    train.run(small("fedper", tmp_path / "here", rounds=1, client_map="loop"), quiet())
    run = json.loads((tmp_path / "there" / "sites.json").read_text())["run"]
    held = leaves(tmp_path / "here")
    for client in range(3):
        with np.load(tmp_path / "sites" / f"c{client}" / run / f"{client:08d}-00000001.npz") as file:
            state = [file[f"arr_{number}"] for number in range(len(file.files))]
        own = [value for path, value in held.items() if path.startswith(f"clients/{client}/")]
        assert len(state) == len(own) == 2
        assert all(np.array_equal(a, b) for a, b in zip(state, own, strict=True))


def altered(answer, follower, change):
    """An answer whose upload is changed by `change(model, scalars)` -> both."""
    federation = follower._known[1]
    model, _ = split(federation.task.init(jax.random.key(0)), federation.engine.method.is_local)
    found, _, told = exchange.unpack(answer.payload, model, {"images": 0}, None)
    model, scalars = change(found, told)
    return answer._replace(payload=exchange.pack(model, None, scalars, None))


def bomb(payload):
    """A payload that says its values are 64 GiB once they are decompressed."""
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20)) * 1024
    return payload[: len(payload) // 2] + zeros


def trouble(root):
    """What client c1 does in each round; in those that are not here, and all others always, what they should."""

    def nan(order, follow):
        return altered(follow(order), follow, lambda model, told: (jax.tree.map(lambda x: x * np.nan, model), told))

    def huge(order, follow):
        return altered(follow(order), follow, lambda model, told: (model, {"images": 1e9}))

    def other_model(order, follow):
        return altered(follow(order), follow, lambda model, told: ({"params": {"w": np.ones(3, np.float32)}}, told))

    def truncated(order, follow):
        answer = follow(order)
        return answer._replace(payload=answer.payload[:-100])

    def flipped(order, follow):
        answer = follow(order)
        changed = bytearray(answer.payload)
        changed[len(changed) // 2] ^= 16
        return answer._replace(payload=bytes(changed))

    def bombed(order, follow):
        answer = follow(order)
        return answer._replace(payload=bomb(answer.payload))

    def foreign(order, follow):
        return Letter("<html>", b"")

    def silent(order, follow):
        return Silence("no answer in 5 s", sent=True)

    def without_its_folder(order, follow):
        for run in (root / "c1").iterdir():
            shutil.rmtree(run)
        return follow(order)

    happens = dict(enumerate([None, nan, huge, other_model, truncated, flipped, bombed, foreign, silent], start=0))
    happens[9] = without_its_folder

    def post(name, kind, number, order, follow):
        what = happens.get(number) if name == "c1" and kind == "train" else None
        return what(order, follow) if what else follow(order)

    return post


def test_a_site_that_fails_is_refused_named_and_comes_back(tmp_path):
    config = small("fedper", tmp_path / "out", rounds=12)
    summary, fleet = deployed(config, tmp_path / "sites", post=trouble(tmp_path / "sites"))
    refused = {entry["round"]: entry["reason"] for entry in summary["refused"]}
    assert {entry["client"] for entry in summary["refused"]} == {"c1"}
    assert sorted(refused) == list(range(1, 10))
    told = ["not finite", "'images' is 1e+09", "", "", "", "", "no JSON object", "no answer in 5 s", "has no state"]
    for round_, words in enumerate(told, start=1):
        assert words in refused[round_], (round_, refused[round_])
    assert all(len(reason) <= 300 and "\n" not in reason for reason in refused.values())
    values = leaves(tmp_path / "out")
    assert all(np.isfinite(value).all() for path, value in values.items() if path.startswith("server"))
    # The state it goes on from is the last that was accepted: rounds completed 1 until its folder went, then none, then
    # what it came to since.
    assert [values[f"clients/{client}/memory"] for client in range(3)] == [12, 12, 12]
    assert summary["clients"].keys() == {"c0", "c1", "c2"}


def test_a_site_that_tells_anything_spoils_nothing_but_its_own_rows(tmp_path):
    """Beside a payload that is as it should be, c1 tells what no site of ours does."""
    tales = [
        {"entry": {"loss": 10**400, "seconds": [1], "decision": ["accepted"]}, "results": 3, "density": "high"},
        {"entry": "all is well", "results": {"before": {"c1": {"accuracy": 2}}}, "density": None, "validation": [1]},
        {"entry": {"loss": {}}, "results": {"before": {"c1": {"accuracy": "best", "images": 0}}}, "validation": {}},
    ]  # fmt: skip

    def post(name, kind, number, order, follow):
        answer = follow(order)
        told = json.loads(answer.text)
        return answer._replace(text=json.dumps(told | tales[number % 3])) if name == "c1" else answer

    more = {"rounds": 3, "eval__every": 1}
    lied, _ = deployed(small("fedavg", tmp_path / "lied", **more), tmp_path / "sites", post=post)
    right, _ = deployed(small("fedavg", tmp_path / "right", **more), tmp_path / "others")
    assert lied["refused"] == []
    assert lied["clients"] == {name: row for name, row in right["clients"].items() if name != "c1"}
    assert same(leaves(tmp_path / "lied"), leaves(tmp_path / "right"))
    assert (tmp_path / "lied" / "report.html").exists()


def test_a_site_that_was_away_goes_on_from_its_last_accepted_state(tmp_path):
    orders = []

    def post(name, kind, number, order, follow):
        if name == "c2" and kind == "train":
            orders.append(json.loads(order.text)["state"])
            if number == 2:
                # Its upload is lost on the way; the state it wrote does not count.
                follow(order)
                return Silence("no answer in 5 s", sent=True)
        return follow(order)

    config = small("fedper", tmp_path / "out", rounds=4)
    summary, fleet = deployed(config, tmp_path / "sites", post=post)
    assert orders == [0, 1, 2, 2]
    assert [(entry["client"], entry["round"]) for entry in summary["refused"]] == [("c2", 2)]


def test_a_server_that_is_gone_goes_on_with_its_sites(tmp_path):
    class Gone(Exception):
        pass

    def dies(name, kind, number, order, follow):
        if kind == "train" and number == 2 and name == "c1":
            raise Gone
        return follow(order)

    more = {"rounds": 4, "checkpoint__every": 2}
    with pytest.raises(Gone):
        deployed(small("fedobp", tmp_path / "out", **more), tmp_path / "sites", post=dies)
    resumed, _ = deployed(small("fedobp", tmp_path / "out", **more), tmp_path / "sites")
    whole, _ = deployed(small("fedobp", tmp_path / "whole", **more), tmp_path / "others")
    assert same(leaves(tmp_path / "out"), leaves(tmp_path / "whole"))
    assert resumed["clients"] == whole["clients"] and resumed["bytes"] == whole["bytes"]


def test_a_site_that_joins_late_takes_part_from_then_on(tmp_path):
    config = small("fedavg", tmp_path / "out", rounds=4, deploy__least=2)
    summary, _ = deployed(config, tmp_path / "sites", here=lambda name, orders: name != "c0" or orders >= 2)
    assert [(entry["client"], entry["round"]) for entry in summary["refused"]] == [("c0", 0), ("c0", 1)]
    assert {entry["reason"] for entry in summary["refused"]} == {"not connected"}
    assert 0 <= summary["clients"]["c0"]["accuracy"] <= 1
    rows = [clients["c0"] for clients in rounds_of(tmp_path / "out")]
    assert [row["bytes_down"] > 0 for row in rows] == [False, False, True, True]
    assert [row["weight"] > 0 for row in rows] == [False, False, True, True]


def test_too_few_sites_stop_the_run_with_one_line(tmp_path):
    with pytest.raises(InputError, match="config.deploy.least: 1 of at least 3 sites are here after 2 s"):
        deployed(small("fedavg", tmp_path / "out"), tmp_path / "sites", here=lambda name, orders: name == "c0")


@pytest.mark.short
@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("method.name", "centralised", "footage stays at its site"),
        ("wire.encode", False, "messages travel as payloads"),
        ("data.unseen", "mall", "nobody here has its pictures"),
    ],
)
def test_what_is_not_for_a_deployment_is_told_at_the_start(tmp_path, setting, value, words):
    config = small("fedavg", tmp_path / "out", task__name="supervised", model__arch="thin", data__source="synthetic")
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(InputError, match=words):
        deployed(config, tmp_path / "sites")
    assert not (tmp_path / "out").exists()


@pytest.mark.short
def test_orders_that_cannot_be_followed_are_answered_with_a_fault(tmp_path):
    follower = InProcess(Letter(""), ("c0",), tmp_path).follower("c0")
    given = settings.flat(small("fedavg", tmp_path / "out", data__source="synthetic"))
    for text, words in [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ('{"kind": "sell"}', "of kind 'sell'"),
        ('{"kind": "enrol"}', "an order without 'settings'"),
        ('{"kind": "enrol", "settings": []}', "whose 'settings' is of another kind"),
        (json.dumps({"kind": "enrol", "settings": {"no.such": 1}}), "use the same version"),
        (json.dumps({"kind": "enrol", "settings": given | {"rounds": -1}}), "config.rounds: -1"),
        (json.dumps({"kind": "train", "settings": given}), "an order without 'run'"),
        (
            json.dumps({"kind": "train", "settings": given, "run": "ab" * 8, "names": ["a"], "sizes": {}, "round": 0,
                        "state": 0, "epochs": 1}),
            "'c0' is no client",
        ),
    ]:  # fmt: skip
        fault = json.loads(follower(Letter(text)).text)["fault"]
        assert words in fault and "\n" not in fault
