"""Flower's simulation: FedAvg over Ray actors with one core each. It draws its participants itself."""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from _torch import Net, train, vector
from _work import Work, load, tell
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

PATH = sys.argv[1]
known: dict[str, Work] = {}


def work_of() -> Work:
    """The work, read once by each process."""
    if "work" not in known:
        torch.set_num_threads(1)
        known["work"] = load(PATH)
    return known["work"]


def arrays(net: Net) -> list[np.ndarray]:
    """The parameters as Flower sends them."""
    return [value.numpy() for value in net.state_dict().values()]


class Client(NumPyClient):
    """One client of the work."""

    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters, config):  # noqa: ANN001, ANN201
        """Its local epochs."""
        work, net = work_of(), Net()
        net.load_state_dict(dict(zip(net.state_dict(), map(torch.from_numpy, parameters), strict=True)))
        own = work.of(self.number)
        train(net, torch.from_numpy(work.images[own])[:, None], torch.from_numpy(work.labels[own]), work)
        return arrays(net), len(own), {}


class Timed(FedAvg):
    """FedAvg that notes when rounds begin and end."""

    def __init__(self, **options) -> None:  # noqa: ANN003
        super().__init__(**options)
        self.seconds: list[float] = []

    def configure_fit(self, *args, **options):  # noqa: ANN002, ANN003, ANN201
        """A round begins."""
        self.began = time.perf_counter()
        return super().configure_fit(*args, **options)

    def aggregate_fit(self, *args, **options):  # noqa: ANN002, ANN003, ANN201
        """A round ends."""
        found = super().aggregate_fit(*args, **options)
        self.seconds.append(time.perf_counter() - self.began)
        self.last = found[0]
        return found


def run(work: Work) -> None:
    """All rounds; tells the seconds of each."""
    rounds, together = work.participants.shape
    net = Net()
    strategy = Timed(
        fraction_fit=together / work.clients, min_fit_clients=together, fraction_evaluate=0.0,
        # The first round waits until all are there.
        min_available_clients=work.clients, initial_parameters=ndarrays_to_parameters(arrays(net)),
    )  # fmt: skip

    def server(context: Context) -> ServerAppComponents:
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    run_simulation(
        ServerApp(server_fn=server),
        ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client()),
        num_supernodes=work.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
    )
    after = np.concatenate([value.ravel() for value in parameters_to_ndarrays(strategy.last)])
    tell(strategy.seconds, after - vector(net))


if __name__ == "__main__":
    run(load(PATH))
