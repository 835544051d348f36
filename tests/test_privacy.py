"""Differentially private updates: clip, noise and mean by hand, whom they may wrap, and the account of epsilon."""

from __future__ import annotations

import io
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import privacy as benchmark
from fedklpr_jax import assembly, privacy, simulation
from fedklpr_jax import round as rounds
from fedklpr_jax.config import validate
from fedklpr_jax.console import Console
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState, Method, ServerContext, ServerState, Upload, Uploads, send_all
from fedklpr_jax.methods import METHODS, make_method
from fedklpr_jax.metrics import Ledger, privacy_note
from tests.federations import tiny_config, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")
TARGETS = ((1.0, 3.0), (2.0, -1.0), (4.0, 0.5))
ZERO = {"params": {"w": jnp.zeros(2)}, "batch_stats": {}}


def make(method=None, *, clip=1.0, noise=0.0, participants=4, seed=0):
    return privacy.private(
        method or Method("fedavg"), clip=clip, noise=noise, participants=participants, key=privacy.seeded(seed)
    )


def sent(*updates, accepted=None):
    rows = {"params": {"w": jnp.array(updates)}, "batch_stats": {}}
    accepted = [True] * len(updates) if accepted is None else accepted
    return Uploads(rows, None, {}, jnp.arange(len(updates)), jnp.array(accepted))


def after(method, uploads, round_=0, model=ZERO):
    server = ServerState(model, (), jnp.int32(round_))
    server, logs = method.aggregate(server, uploads, ServerContext())
    assert int(server.round) == round_ + 1
    return np.asarray(server.model["params"]["w"]), logs["weight"].tolist()


def test_what_goes_up_is_the_clipped_update_alone():
    model = {"params": {"w": jnp.array([4.0, 6.0])}, "batch_stats": {"mean": jnp.array([12.0])}}
    context = SimpleNamespace(
        received={"params": {"w": jnp.array([1.0, 2.0])}, "batch_stats": {"mean": jnp.zeros(1)}}, images=7.0
    )
    state = ClientState({}, None, ())
    upload, kept, logs = make(clip=6.5).finish(model, state, context)
    # (3, 4) and 12 together are 13 long: half of it goes.
    assert upload.model["params"]["w"].tolist() == [1.5, 2.0] and upload.model["batch_stats"]["mean"].tolist() == [6.0]
    assert upload.scalars == {} and upload.mask is None and kept is state and float(logs["update_norm"]) == 13
    short, _, _ = make(clip=20.0).finish(model, state, context)
    assert short.model["batch_stats"]["mean"].tolist() == [12.0]


def test_the_mean_is_over_the_fixed_number_of_participants():
    moved, weights = after(make(clip=5.0), sent([3.0, 4.0], [1.0, 0.0], [math.nan, 0.0], accepted=[True, True, False]))
    np.testing.assert_allclose(moved, [1.0, 1.0])
    assert weights == [0.25, 0.25, 0.0]
    # Who did not clip is clipped: 30 and 40 become 0.6 and 0.8; where squares overflow nothing is left.
    moved, _ = after(make(clip=1.0), sent([30.0, 40.0], [0.0, 0.5], [3e38, 3e38]))
    np.testing.assert_allclose(moved, [0.15, 0.325], rtol=1e-6)


def test_the_noise_is_of_the_size_that_is_asked_for():
    model = {"params": {"w": jnp.zeros(20_000)}, "batch_stats": {}}
    nothing = sent(jnp.zeros(20_000), accepted=[False])
    method = make(clip=3.0, noise=2.0, participants=4)
    noise, _ = after(method, nothing, 0, model)
    # All are refused, and there is noise as ever: 2 * 3 / 4.
    assert noise.std() == pytest.approx(1.5, rel=0.03) and abs(noise.mean()) < 0.05
    again, _ = after(method, nothing, 0, model)
    np.testing.assert_array_equal(noise, again)
    for other in (after(method, nothing, 1, model), after(make(clip=3.0, noise=2.0, seed=1), nothing, 0, model)):
        assert abs(np.corrcoef(noise, other[0])[0, 1]) < 0.03


def test_leaves_do_not_share_their_noise_and_variances_stay_above_zero():
    model = {"params": {"a": jnp.zeros(999), "b": jnp.zeros(999)}, "batch_stats": {"bn": {"var": jnp.zeros(999)}}}
    server = ServerState(model, (), jnp.int32(0))
    rows = jax.tree.map(lambda leaf: leaf[None], model)
    uploads = Uploads(rows, None, {}, jnp.arange(1), jnp.ones(1, bool))
    moved = make(noise=1.0).aggregate(server, uploads, ServerContext())[0].model
    assert abs(np.corrcoef(moved["params"]["a"], moved["params"]["b"])[0, 1]) < 0.15
    variance = np.asarray(moved["batch_stats"]["bn"]["var"])
    assert variance.min() == 0 and (variance > 0).mean() == pytest.approx(0.5, abs=0.1)


def test_the_system_gives_a_new_key_at_every_call_of_a_compiled_step():
    draw = jax.jit(lambda round_: jax.random.normal(privacy.from_system(round_), (3,)))
    assert len({float(x) for _ in range(4) for x in draw(jnp.int32(0))}) == 12


def test_the_benchmark_prints_a_row_a_level(capsys, tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", images=random.integers(0, 256, (600, 28, 28), np.uint8),
             labels=random.integers(0, 10, 600))  # fmt: skip
    benchmark.main(["--data", str(tmp_path), "--clients", "30", "--share", "0.1", "--rounds", "1", "--noises", "1",
                    "--delta", "1e-3"])  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
            if line.startswith("|")]  # fmt: skip
    assert [row[0] for row in rows[2:]] == ["not private", "1"]
    assert rows[2][1] == "-" and float(rows[3][1]) == pytest.approx(
        privacy.epsilon(noise=1.0, delta=1e-3, clients=30, participants=3, rounds=1), abs=0.06
    )


ALLOWED = {"fedavg", "fedpav", "fedprox", "fedper", "fedrep", "fedureid"}


@pytest.mark.parametrize("name", [*sorted(METHODS), "fedobp at the clients"])
def test_only_plain_means_may_be_private(name):
    score_on = "client" if name.endswith("clients") else "server"
    method = make_method(tiny_config(name.split()[0], method__obp__score_on=score_on).method)
    if name in ALLOWED or score_on == "client":
        private = make(method)
        assert private.name == method.name and private.tells == ()
        return
    with pytest.raises(InputError, match=f"config.privacy.clip: {name} ") as caught:
        make(method)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_are_refused():
    config = tiny_config("fedavg", privacy__clip=1.0)
    validate(config)
    plain = Method("fedavg")
    how = {"clients": 2000, "participants": 10, "key": privacy.seeded(0)}
    with pytest.raises(InputError, match="give a number below 0.0005"):
        privacy.protected(plain, config.privacy, **how)
    assert privacy.protected(plain, tiny_config("fedavg").privacy, **how) is plain
    assert privacy.spent(tiny_config("fedavg").privacy, clients=3, participants=3, rounds=1) is None


def test_epsilon_by_hand():
    """Full participation: Renyi divergence a * T / (2 (z / 2)^2) at order a, brought to (epsilon, delta) by Mironov's
    Proposition 3 (2017), which later conversions only improve on."""
    rounds_, delta = 3, 1e-3
    for noise in (1.0, 4.0):
        orders = np.linspace(1.01, 60, 6000)
        known = np.min(2 * orders * rounds_ / noise**2 + np.log(1 / delta) / (orders - 1))
        found = privacy.epsilon(noise=noise, delta=delta, clients=9, participants=9, rounds=rounds_)
        assert 0.7 * known < found <= known
    assert privacy.epsilon(noise=0.0, delta=delta, clients=9, participants=9, rounds=1) == math.inf


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_sampling():
    def epsilon(noise=4.0, clients=100, rounds_=10):
        return privacy.epsilon(noise=noise, delta=1e-3, clients=clients, participants=10, rounds=rounds_)

    assert epsilon(rounds_=20) > epsilon() > epsilon(noise=8.0) and epsilon(clients=10) > 3 * epsilon()
    # The bound of a draw is the looser one where there is little noise; no draw is then better than any.
    assert epsilon(noise=0.5, clients=20) <= epsilon(noise=0.5, clients=10)


def test_without_the_extra_there_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match=r"pip install 'fedklpr_jax\[privacy\]'"):
        privacy.epsilon(noise=1.0, delta=1e-3, clients=9, participants=9, rounds=1)


def begin(method, **settings):
    config = tiny_config("fedavg", epochs=1, **settings)
    engine = rounds.make_engine(toy_task(TARGETS), method, epochs=1)
    server, clients = rounds.start(engine.task, method, 0)
    return assembly.Federation(config, [], engine, ()), simulation.RunState(server, clients, Ledger(), 0.0)


@pytest.mark.parametrize("settings", [{}, {"wire__encode": False}], ids=str)
def test_a_private_round_by_hand(settings):
    federation, state = begin(make(clip=1.0, participants=3), **settings)
    assert federation.engine.update_summed is None, "sums by images would be another mean"
    state, event = simulation.run_round(federation, state)
    assert not event["refused"]
    # One step halves all distances; the classifier moves by 5 and the count by 1 at every client.
    updates = np.array([[*(np.array(target) / 2), 5.0, 1.0] for target in TARGETS])
    wanted = (updates / np.linalg.norm(updates, axis=1)[:, None]).mean(axis=0)
    model = state.server.model
    moved = [*model["params"]["trunk"]["kernel"], *model["params"]["classifier"]["kernel"],
             model["batch_stats"]["trunk"]["count"]]  # fmt: skip
    np.testing.assert_allclose(moved, wanted, rtol=1e-5)
    norms = [row["update_norm"] for row in event["clients"].values()]
    np.testing.assert_allclose(norms, np.linalg.norm(updates, axis=1), rtol=1e-6)


def test_a_client_that_is_not_finite_moves_nothing():
    def spoil(model, client, context):
        upload, client, logs = send_all(model, client, context)
        bad = jnp.where(context.client == 1, jnp.nan, 1.0)
        return Upload(jax.tree.map(lambda leaf: bad * leaf, upload.model), None, upload.scalars), client, logs

    federation, state = begin(make(Method("spoilt", finish=spoil), clip=100.0, participants=3))
    state, event = simulation.run_round(federation, state)
    assert [entry["client"] for entry in event["refused"]] == ["client 1"]
    np.testing.assert_allclose(state.server.model["params"]["trunk"]["kernel"], np.array([2.5, 1.75]) / 3, rtol=1e-6)


def test_what_was_spent_is_told():
    config = tiny_config("fedavg", privacy__clip=0.5, privacy__noise=2.0, participation=0.5, rounds=7)
    account = assembly.privacy_spent(config, 10)
    assert account["epsilon"] == privacy.epsilon(noise=2.0, delta=1e-3, clients=10, participants=5, rounds=7)
    line = privacy_note(account)
    assert line.endswith("after 7 rounds (5 of 10 clients each, clip 0.5, noise 2)")
    text = io.StringIO()
    sizes = {"total": 0, "dense_total": 0, "down": 0, "up": 0}
    Console(text).table({"clients": {"a": {"accuracy": 0.5}}, "mean": {"accuracy": 0.5}, "bytes": sizes,
                         "privacy": account})  # fmt: skip
    assert line in text.getvalue()
    assert "no bound after 7 rounds" in privacy_note(account | {"epsilon": None}) and privacy_note(None) == ""
