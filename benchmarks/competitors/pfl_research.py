"""pfl-research: FederatedAveraging on its simulated backend, in one process."""

from __future__ import annotations

import time

import torch
from _torch import Net, vector
from _work import Work, load, tell
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


class Model(Net):
    """The network with the two methods that the library asks for."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        self.train()
        return torch.nn.functional.cross_entropy(self(images), labels)

    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict:
        """Nothing: what is timed is training."""
        return {}


class Clock(TrainingProcessCallback):
    """The time at the end of every round."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # noqa: ANN001, ANN201
        """Called by the library."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def run(work: Work) -> None:
    """All rounds; tells the seconds of each."""
    images, labels = torch.from_numpy(work.images)[:, None], torch.from_numpy(work.labels)
    order = iter(work.participants.reshape(-1).tolist() + [0] * work.participants.shape[1])

    def dataset(client: int) -> PyTorchTensorDataset:
        own = torch.from_numpy(work.of(client))
        return PyTorchTensorDataset([images[own], labels[own]], user_id=str(client))

    users = FederatedDataset(dataset, lambda: next(order))
    net = Model()
    model = PyTorchModel(
        net,
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=work.momentum),
        torch.optim.SGD(net.parameters(), lr=1.0),
    )
    before, clock = vector(net).copy(), Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=len(work.participants),
            evaluation_frequency=10**6,
            train_cohort_size=work.participants.shape[1],
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=work.epochs, local_learning_rate=work.rate, local_batch_size=work.batch
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    tell([end - start for start, end in zip(clock.times, clock.times[1:], strict=False)], vector(net) - before)


if __name__ == "__main__":
    import sys

    run(load(sys.argv[1]))
