"""ResNets of torchvision and EfficientNet-Lite0 in plain PyTorch, for comparison: a script for a Python that has it.

    PYTHON tests/torch_networks.py FOLDER NAME

writes into FOLDER random weights of the network NAME as `torch.save` does, in both formats, some images, and the
features of the network for each stride of its last stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

NETWORKS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        kinds = [(inputs, width, 3, stride), (width, width, 3)]
        if bottleneck:
            kinds = [(inputs, width, 1), (width, width, 3, stride), (width, outputs, 1)]
        self.count = len(kinds)
        for number, kind in enumerate(kinds, 1):
            self.add_module(f"conv{number}", convolution(*kind))
            self.add_module(f"bn{number}", nn.BatchNorm2d(kind[1]))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number in range(1, self.count + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.count:
                y = torch.relu(y)
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, last_stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, (count, width, first) in enumerate(
            zip(blocks, (64, 128, 256, 512), (1, 2, 2, last_stride), strict=True), 1
        ):
            layers = []
            for number in range(count):
                layers.append(Block(inputs, width, 1 if number else first, bottleneck))
                inputs = 4 * width if bottleneck else width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The feature in front of `fc`."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class Same(nn.Conv2d):
    """A convolution padded as in TensorFlow: zeros for ceil(size / stride) places, the odd one behind."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, pads))


def slow_norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self._expand_conv = Same(inputs, wide, 1) if expansion > 1 else None
        if expansion > 1:
            self._bn0 = slow_norm(wide)
        self._depthwise_conv, self._bn1 = Same(wide, wide, kernel, stride, groups=wide), slow_norm(wide)
        self._project_conv, self._bn2 = Same(wide, outputs, 1), slow_norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        if self._expand_conv is not None:
            y = nn.functional.relu6(self._bn0(self._expand_conv(y)))
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if x.shape == y.shape else y


class Lite0(nn.Module):
    def __init__(self, last_stride: int = 2) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2), slow_norm(32)
        inputs, blocks = 32, []
        for outputs, count, kernel, stride, expansion in (
            (16, 1, 3, 1, 1), (24, 2, 3, 2, 6), (40, 2, 5, 2, 6), (80, 3, 3, 2, 6), (112, 3, 5, 1, 6),
            (192, 4, 5, last_stride, 6), (320, 1, 3, 1, 6),
        ):  # fmt: skip
            for number in range(count):
                blocks.append(Inverted(inputs, outputs, kernel, 1 if number else stride, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = Same(320, 1280, 1), slow_norm(1280)
        self._fc = nn.Linear(1280, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The feature in front of `_fc`."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        return nn.functional.relu6(self._bn1(self._conv_head(self._blocks(x)))).mean((2, 3))


def network(name: str, last_stride: int) -> nn.Module:
    return Lite0(last_stride) if name == "efficientnet_lite0" else ResNet(*NETWORKS[name], last_stride)


def main(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    net = network(name, 2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    weights = net.state_dict()
    torch.save(weights, folder / "zip.pth")
    checkpoint = {f"module.{key}": nn.Parameter(value, requires_grad=False) for key, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": checkpoint}, folder / "stream.pth", _use_new_zipfile_serialization=False)
    images = torch.randn(1, 3, 64, 32)
    np.save(folder / "images.npy", images.permute(0, 2, 3, 1).contiguous().numpy())
    for stride in (1, 2):
        same = network(name, stride)
        same.load_state_dict(weights)
        with torch.no_grad():
            np.save(folder / f"features-{stride}.npy", same.eval()(images).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
