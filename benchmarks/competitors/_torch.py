"""The small network of FedOBP (two 5x5 convolutions, a dense layer) and a client's epochs, in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """Logits [n, 10] of images [n, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.layers(images)


def vector(net: nn.Module) -> np.ndarray:
    """All parameters as one array."""
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).numpy()


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, work: Any) -> None:
    """A client's local epochs."""
    optimizer = torch.optim.SGD(net.parameters(), lr=work.rate, momentum=work.momentum)
    loss = nn.CrossEntropyLoss()
    for _ in range(work.epochs):
        for rows in torch.randperm(len(images)).split(work.batch):
            optimizer.zero_grad()
            loss(net(images[rows]), labels[rows]).backward()
            optimizer.step()
