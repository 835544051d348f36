"""A plain PyTorch loop: one network, each client in turn, a running weighted sum."""

from __future__ import annotations

import torch
from _torch import Net, train, vector
from _work import Work, main


def play(work: Work):  # noqa: ANN201
    """See `_work.main`."""
    net = Net()
    images, labels = torch.from_numpy(work.images)[:, None], torch.from_numpy(work.labels)
    rows = torch.from_numpy(work.rows)
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def round_(number: int) -> None:
        sums = {name: torch.zeros_like(value) for name, value in state.items()}
        total = 0
        for client in work.participants[number]:
            own = rows[work.starts[client] : work.starts[client + 1]]
            net.load_state_dict(state)
            train(net, images[own], labels[own], work)
            for name, value in net.state_dict().items():
                sums[name] += len(own) * value
            total += len(own)
        for name, value in sums.items():
            state[name] = value / total
        net.load_state_dict(state)

    return round_, lambda: vector(net).copy()


if __name__ == "__main__":
    main(play)
