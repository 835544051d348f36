"""PyTorch's side of `benchmarks/fedreid.py`: FedReID as a plain loop, a client after the other, on request.

`python pytorch_fedreid.py WORK.npz` with a `_work.ReIDWork` reads one JSON string a line: `round` trains the clients
and averages them, `evaluate` tests each client's model and gives mean mAP and Rank-1, `features` gives those of the
first client's probe. Answers each with `{"seconds": ..., "told": ...}` on a line.

As the usual code does it: the network is copied for every client and every upload, pictures are augmented one by one,
and each query sorts the gallery for itself.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time

import numpy as np
import torch
from _work import ReIDWork, load
from pytorch_steps import network
from torch import nn
from torch.nn import functional

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def make_net(work: ReIDWork) -> nn.Sequential:
    """Trunk, linear layer, norm, dropout; with the values of `work.start`.

    Raises:
      ValueError: they are not as many as the network has.
    """
    *trunk, neck = network(work.blocks.tolist(), work.bottleneck)
    net = nn.Sequential(
        nn.Sequential(*trunk), nn.Linear(neck.num_features, work.embedding), nn.BatchNorm1d(work.embedding),
        nn.Dropout(work.dropout),
    )  # fmt: skip
    values = [value for value in net.state_dict().values() if value.is_floating_point()]
    sizes = [value.numel() for value in values]
    if sum(sizes) != len(work.start):
        raise ValueError(f"the network has {sum(sizes)} values, the work {len(work.start)}")
    for value, given in zip(values, torch.from_numpy(work.start).split(sizes), strict=True):
        value.copy_(given.view_as(value))
    return net.to(work.device)


def normalised(picture: torch.Tensor) -> torch.Tensor:
    """uint8 [h, w, 3] to float32 [3, h, w]."""
    return (picture.permute(2, 0, 1).float() / 255 - MEAN) / STD


def augmented(picture: torch.Tensor, work: ReIDWork) -> torch.Tensor:
    """Normalised, mirrored and shifted by chance."""
    image = normalised(picture)
    if random.random() < work.flip:
        image = image.flip(2)
    _, height, width = image.shape
    top, left = random.randint(0, 2 * work.pad), random.randint(0, 2 * work.pad)
    return functional.pad(image, [work.pad] * 4)[:, top : top + height, left : left + width]


def train(net: nn.Sequential, classifier: nn.Linear, batches: np.ndarray, pixels: torch.Tensor, work: ReIDWork) -> None:
    """A client's epoch."""
    optimizer = torch.optim.SGD(
        [{"params": net[0].parameters(), "lr": work.rate * work.backbone},
         {"params": [*net[1:].parameters(), *classifier.parameters()]}],
        lr=work.rate, momentum=work.momentum, weight_decay=work.decay, nesterov=True,
    )  # fmt: skip
    loss, labels = nn.CrossEntropyLoss(), torch.from_numpy(work.labels).long()
    net.train()
    for rows in torch.from_numpy(batches).long():
        images = torch.stack([augmented(pixels[row], work) for row in rows]).to(work.device)
        optimizer.zero_grad()
        loss(classifier(net(images)), labels[rows].to(work.device)).backward()
        optimizer.step()


@torch.no_grad()
def features_of(net: nn.Sequential, pixels: torch.Tensor, work: ReIDWork) -> np.ndarray:
    """f(x) + f(mirrored x), each of length 1: float32 [n, embedding]."""
    net.eval()
    parts = []
    for chunk in pixels.split(work.test_batch):
        images = torch.stack([normalised(picture) for picture in chunk]).to(work.device)
        parts.append(functional.normalize(net(images) + net(images.flip(3))).cpu().numpy())
    return np.concatenate(parts)


def rank(queries: tuple[np.ndarray, ...], gallery: tuple[np.ndarray, ...]) -> tuple[float, float]:
    """Mean AP and Rank-1 of (features, identities, cameras), over the queries with a match."""
    features, ids, cams = gallery
    cmc, precisions = np.zeros(len(ids)), []
    for feature, person, camera in zip(*queries, strict=True):
        order = np.argsort(-(features @ feature))
        same = ids[order] == person
        hits = same[~(same & (cams[order] == camera))]
        if hits.any():
            cmc[hits.argmax() :] += 1
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            precisions.append(precision[hits].mean())
    return float(np.mean(precisions)), float(cmc[0] / len(precisions))


class Federation:
    """Server and clients; each client keeps its classifier."""

    def __init__(self, work: ReIDWork) -> None:
        self.work, self.net, self.number = work, make_net(work), 0
        self.pixels, self.test_pixels = torch.from_numpy(work.pixels), torch.from_numpy(work.test_pixels)
        self.classifiers = [nn.Linear(work.embedding, int(n), bias=False).to(work.device) for n in work.classes]
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.001)

    @torch.no_grad()
    def logits(self, net: nn.Sequential, client: int) -> torch.Tensor:
        """Of the client's probe, eval mode."""
        images = torch.stack([normalised(self.pixels[row]) for row in self.work.probes[client]])
        return self.classifiers[client](net.eval()(images.to(self.work.device)))

    def round(self) -> None:
        """The clients' epochs, and the mean of their networks by how far their logits turned."""
        work = self.work
        shares = np.split(work.batches[self.number], np.cumsum(work.steps)[:-1])
        uploads, turned = [], []
        for client, batches in enumerate(shares):
            net = copy.deepcopy(self.net)
            before = self.logits(net, client)
            train(net, self.classifiers[client], batches, self.pixels, work)
            cosine = functional.cosine_similarity(before, self.logits(net, client))
            turned.append((1 - cosine).mean().item())
            uploads.append(copy.deepcopy(net.state_dict()))
        for name, value in self.net.state_dict().items():
            if value.is_floating_point():
                value.copy_(sum(d / sum(turned) * upload[name] for d, upload in zip(turned, uploads, strict=True)))
        if work.device == "cuda":
            torch.cuda.synchronize()
        self.number += 1

    def evaluate(self) -> list[float]:
        """Mean over the clients of mAP and Rank-1."""
        work, first, scores = self.work, 0, []
        for counts in work.tests:
            sides = []
            for count in counts:
                own = slice(first, first + count)
                found = features_of(self.net, self.test_pixels[own], work)
                sides.append((found, work.test_ids[own], work.test_cams[own]))
                first += count
            scores.append(rank(*sides))
        return np.mean(scores, axis=0).tolist()

    def features(self) -> list[list[float]]:
        """Of the first client's probe."""
        return features_of(self.net, self.pixels[self.work.probes[0]], self.work).tolist()


def main() -> None:
    """Answers until there is nothing more to read."""
    federation = Federation(load(sys.argv[1], ReIDWork))
    for line in sys.stdin:
        call = getattr(federation, json.loads(line))
        began = time.perf_counter()
        told = call()
        print(json.dumps({"seconds": time.perf_counter() - began, "told": told}), flush=True)


if __name__ == "__main__":
    main()
