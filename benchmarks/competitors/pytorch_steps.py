"""PyTorch's side of `benchmarks/step.py`: a ResNet's training steps, timed on request.

Reads one JSON object a line. `{"build": [BLOCKS, BOTTLENECK, HEIGHT, WIDTH, BATCH, FORM, DTYPE]}` makes the network and
runs two steps; `{"steps": n}` runs n. FORM is `default`, `channels_last`, `compile` or `both`; with DTYPE `bfloat16`
the network runs under automatic mixed precision. On a GPU where PyTorch sees one. Answers each with the seconds of a
step as JSON on a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 to four times the width."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        shape = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)] if bottleneck else [
            (channels, width, 3, stride), (width, width, 3, 1)]  # fmt: skip
        layers: list[nn.Module] = []
        for inner, outer, kernel, step in shape:
            layers += [nn.Conv2d(inner, outer, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.short = nn.Identity() if stride == 1 and channels == out else nn.Sequential(
            nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] to [n, out, h / stride, w / stride]."""
        return torch.relu(self.layers(x) + self.short(x))


def network(blocks: list[int], bottleneck: bool) -> nn.Module:
    """The trunk with stride 1 in the last stage, average pooling and a norm on the feature."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                               nn.MaxPool2d(3, 2, 1)]  # fmt: skip
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for i in range(count):
            layers.append(Block(channels, width, 2 if i == 0 and stage in (1, 2) else 1, bottleneck))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(channels))


def build(
    blocks: list[int], bottleneck: bool, height: int, width: int, batch: int, form: str, dtype: str
) -> Callable[[], None]:
    """A step: forward, backward, SGD."""
    net, images = network(blocks, bottleneck).to(DEVICE), torch.randn(batch, 3, height, width, device=DEVICE)
    if form in ("channels_last", "both"):
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    called = torch.compile(net) if form in ("compile", "both") else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            features = called(images)
        (features.float() - 1).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    """Answers until there is nothing more to read."""
    step, count = None, 0
    for line in sys.stdin:
        asked = json.loads(line)
        if "build" in asked:
            step, count = build(*asked["build"]), 2
        else:
            count = asked["steps"]
        assert step is not None
        began = time.perf_counter()
        for _ in range(count):
            step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(json.dumps((time.perf_counter() - began) / count), flush=True)


if __name__ == "__main__":
    main()
