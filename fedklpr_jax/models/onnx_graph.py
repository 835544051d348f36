"""The networks as ONNX, layer by layer, for those who run a trained one without JAX.

No kept converter does this here: jax2onnx wants an Orbax from before the one that checkpoints are written with, and JAX
itself exports StableHLO alone. The networks have few kinds of layers, so that each is written down with ONNX's own
helpers; a convolution stays one convolution and a norm one norm, which runtimes know how to fuse. Weights keep the
paths of their leaves, with dots; kernels of convolutions lie as ONNX wants them, [out, in, rows, columns].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import traverse_util

from fedklpr_jax.data.picture_format import PictureFormat
from fedklpr_jax.errors import InputError
from fedklpr_jax.models import efficientnet
from fedklpr_jax.models.spec import ModelSpec

if TYPE_CHECKING:
    import onnx

# Of 2022, which every runtime of today reads.
OPSET, IR = 18, 8
INPUT, OUTPUT = "pictures", {False: "embedding", True: "logits"}
_EPSILON = 1e-5
# The end of a slice that runs backwards to the first entry.
_BEFORE_FIRST = -(2**63)


class Graph:
    """A graph that grows at its end; what is asked for is the name of a value."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        from onnx import helper

        self._node = helper.make_node
        self._leaves = traverse_util.flatten_dict(variables, sep="/")
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """What a node of this kind makes of its inputs, called `out` if that is given."""
        name = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(self._node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Any) -> str:
        """These float32 values, under a name of their own."""
        self.constants[name] = np.asarray(values, np.float32)
        return name

    def whole(self, name: str, *values: int) -> str:
        """These whole numbers, int64 [their count], under a name of their own."""
        self.constants[name] = np.array(values, np.int64)
        return name

    def has(self, path: str) -> bool:
        """Whether the network has this leaf."""
        return path in self._leaves

    def leaf(self, path: str) -> np.ndarray:
        """The values of a leaf, float32."""
        return np.asarray(self._leaves[path], np.float32)

    def weight(self, path: str) -> str:
        """A leaf of the network, as it is."""
        return self.constant(path.replace("/", "."), self.leaf(path))

    def conv(self, x: str, path: str, stride: int = 1, pad: int | None = None) -> str:
        """The square convolution of layer `path`, padded so that stride 1 keeps the map's size where `pad` is None."""
        kernel = self.leaf(f"params/{path}/kernel")
        size = kernel.shape[0]
        inputs = [x, self.constant(f"params.{path.replace('/', '.')}.kernel", kernel.transpose(3, 2, 0, 1))]
        if self.has(f"params/{path}/bias"):
            inputs.append(self.weight(f"params/{path}/bias"))
        pads = [size // 2 if pad is None else pad] * 4
        return self.op("Conv", *inputs, kernel_shape=[size, size], strides=[stride, stride], pads=pads)

    def same_conv(self, x: str, path: str, stride: int = 1, groups: int = 1) -> str:
        """The square convolution of layer `path`, padded as `models.layers.same_conv`."""
        kernel = self.leaf(f"params/{path}/kernel")
        weight = self.constant(f"params.{path.replace('/', '.')}.kernel", kernel.transpose(3, 2, 0, 1))
        size = [kernel.shape[0]] * 2
        return self.op("Conv", x, weight, kernel_shape=size, strides=[stride] * 2, auto_pad="SAME_UPPER", group=groups)

    def dense(self, x: str, path: str, out: str = "") -> str:
        """The dense layer `path`."""
        return self.op("Gemm", x, self.weight(f"params/{path}/kernel"), self.weight(f"params/{path}/bias"), out=out)

    def norm(self, x: str, path: str, epsilon: float = _EPSILON) -> str:
        """The norm `path` of a map or of features: by running statistics, or group norm where it has none."""
        scale, dotted = self.leaf(f"params/{path}/scale"), f"params.{path.replace('/', '.')}"
        bias = self.leaf(f"params/{path}/bias") if self.has(f"params/{path}/bias") else np.zeros_like(scale)
        if not self.has(f"batch_stats/{path}/mean"):
            return self._group_norm(x, dotted, scale, bias, epsilon)
        statistics = (self.weight(f"batch_stats/{path}/{name}") for name in ("mean", "var"))
        weights = (self.constant(f"{dotted}.{name}", values) for name, values in (("scale", scale), ("bias", bias)))
        return self.op("BatchNormalization", x, *weights, *statistics, epsilon=epsilon)

    def _group_norm(self, x: str, dotted: str, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> str:
        """`models.norms.GroupNorm` of a map: over all places and the channels that are not pruned."""
        # ONNX's own counts pruned channels too.
        kept = (scale != 0).astype(np.float32)
        share, scales, biases = (
            self.constant(f"{dotted}.{name}", values.reshape(1, -1, 1, 1))
            for name, values in (("share", kept / max(kept.sum(), 1.0)), ("scale", scale), ("bias", bias))
        )
        places, channels = self.whole("axes.places", 2, 3), self.whole("axes.channels", 1)

        def over_kept(values: str) -> str:
            return self.op("ReduceSum", self.op("Mul", self.op("ReduceMean", values, places), share), channels)

        mean = over_kept(x)
        square = self.op("Sub", over_kept(self.op("Mul", x, x)), self.op("Mul", mean, mean))
        variance = self.op("Max", square, self.constant("zero", 0))
        deviation = self.op("Sqrt", self.op("Add", variance, self.constant(f"{dotted}.epsilon", epsilon)))
        moved = self.op("Mul", self.op("Sub", x, mean), self.op("Div", scales, deviation))
        return self.op("Add", moved, biases)

    def relu(self, x: str) -> str:
        """max(x, 0)."""
        return self.op("Relu", x)

    def relu6(self, x: str) -> str:
        """min(max(x, 0), 6)."""
        return self.op("Clip", x, self.constant("zero", 0), self.constant("six", 6))

    def pool(self, x: str, pooling: str) -> str:
        """The map [n, c, h, w] to [n, c], by `avg` or `gem`."""
        if pooling == "avg":
            return self.op("Flatten", self.op("GlobalAveragePool", x))
        power = self.weight("params/trunk/gem/p")
        raised = self.op("Pow", self.op("Max", x, self.constant("gem.epsilon", 1e-6)), power)
        mean = self.op("Flatten", self.op("GlobalAveragePool", raised))
        return self.op("Pow", mean, self.op("Reciprocal", power))


def _resnet(graph: Graph, spec: ModelSpec, x: str, pictures: PictureFormat) -> str:
    stride = {"7x7/2+pool": 2, "3x3/2": 2, "3x3/1": 1}[spec.stem]
    x = graph.relu(graph.norm(graph.conv(x, "trunk/conv1", stride), "trunk/bn1"))
    if spec.stem == "7x7/2+pool":
        x = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    layers = 3 if spec.bottleneck else 2
    for stage, count in enumerate(spec.blocks):
        for place in range(count):
            block = f"trunk/layer{stage + 1}_{place}"
            stride = 1 if stage == 0 or place else spec.last_stride if stage == len(spec.blocks) - 1 else 2
            # Of a bottleneck the 3x3 convolution strides, else the first.
            y, shortcut = x, x
            for layer in range(1, layers + 1):
                y = graph.conv(y, f"{block}/conv{layer}", stride if layer == layers - 1 else 1)
                y = graph.norm(y, f"{block}/bn{layer}")
                y = graph.relu(y) if layer < layers else y
            if graph.has(f"params/{block}/downsample_conv/kernel"):
                shortcut = graph.norm(graph.conv(x, f"{block}/downsample_conv", stride), f"{block}/downsample_bn")
            x = graph.relu(graph.op("Add", y, shortcut))
    return graph.pool(x, spec.pooling)


def _vgg(graph: Graph, spec: ModelSpec, x: str, pictures: PictureFormat) -> str:
    smaller = min(pictures.height, pictures.width)
    for group, count in enumerate(spec.blocks, 1):
        for place in range(1, count + 1):
            layer = f"{group}_{place}"
            x = graph.relu(graph.norm(graph.conv(x, f"trunk/conv{layer}"), f"trunk/bn{layer}"))
        if smaller >= 2:
            x, smaller = graph.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), smaller // 2
    return graph.pool(x, spec.pooling)


def _cnn(graph: Graph, spec: ModelSpec, x: str, pictures: PictureFormat) -> str:
    for layer in ("trunk/conv1", "trunk/conv2"):
        x = graph.relu(graph.op("MaxPool", graph.conv(x, layer, pad=0), kernel_shape=[2, 2], strides=[2, 2]))
    # Its dense layer reads the map as it lies here, channels last.
    x = graph.op("Flatten", graph.op("Transpose", x, perm=[0, 2, 3, 1]))
    return graph.relu(graph.dense(x, "trunk/dense"))


def _efficientnet(graph: Graph, spec: ModelSpec, x: str, pictures: PictureFormat) -> str:
    def layer(x: str, conv: str, norm: str, stride: int = 1, groups: int = 1) -> str:
        return graph.norm(graph.same_conv(x, f"trunk/{conv}", stride, groups), f"trunk/{norm}", efficientnet.EPSILON)

    x, number = graph.relu6(layer(x, "conv_stem", "bn0", 2)), 0
    for count, first in zip(spec.blocks, efficientnet.strides(spec.last_stride), strict=True):
        for place in range(count):
            block, stride, y = f"blocks_{number}", 1 if place else first, x
            if graph.has(f"params/trunk/{block}/expand_conv/kernel"):
                y = graph.relu6(layer(y, f"{block}/expand_conv", f"{block}/bn0"))
            kernel = graph.leaf(f"params/trunk/{block}/depthwise_conv/kernel")
            y = graph.relu6(layer(y, f"{block}/depthwise_conv", f"{block}/bn1", stride, kernel.shape[-1]))
            y = layer(y, f"{block}/project_conv", f"{block}/bn2")
            # The first block of a stage may have equal widths on both sides too.
            inputs = graph.leaf(f"params/trunk/{block}/{'expand' if number else 'depthwise'}_conv/kernel").shape
            same = stride == 1 and inputs[2 if number else 3] == graph.leaf(f"params/trunk/{block}/bn2/scale").size
            x, number = graph.op("Add", x, y) if same else y, number + 1
    return graph.pool(graph.relu6(layer(x, "conv_head", "bn1")), spec.pooling)


_FAMILIES = {"resnet": _resnet, "vgg": _vgg, "cnn": _cnn, "efficientnet": _efficientnet}


def _neck(graph: Graph, spec: ModelSpec, pooled: str) -> str:
    if spec.neck == "none":
        return pooled
    if spec.embedding_dim:
        return graph.norm(graph.dense(pooled, "trunk/embedding"), "trunk/embedding_bn")
    return graph.norm(pooled, "trunk/bnneck")


def onnx_bytes(
    spec: ModelSpec, variables: Mapping[str, Any], pictures: PictureFormat, metadata: Mapping[str, str], *, logits: bool
) -> bytes:
    """A trained network as a file of ONNX, which computes in float32.

    It takes `pictures`, uint8 [n, height, width, channels] for any n, normalises them itself, and gives `logits`, or
    `embedding` as the tests of re-ID rank by it: f(x) + f(flip x), L2-normalised; float32 [n, d].

    Args:
      spec: the network.
      variables: those of a task; what is pruned is 0 and stays so.
      pictures: what it takes.
      metadata: goes into the file's properties.
      logits: whether the task's classifier follows the embedding.

    Raises:
      InputError: a family of networks that is not written down here.
      ImportError: onnx is not installed.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    if spec.family not in _FAMILIES:
        raise InputError(f"--format: networks of the family {spec.family} are not written as onnx; give safetensors")
    graph = Graph(variables)
    mean, deviation = (graph.constant(f"pictures.{name}", getattr(pictures, name)) for name in ("mean", "deviation"))
    scaled = graph.op("Div", graph.op("Sub", graph.op("Cast", INPUT, to=TensorProto.FLOAT), mean), deviation)
    x = graph.op("Transpose", scaled, perm=[0, 3, 1, 2])
    if not logits:
        x = _with_mirrored(graph, x)
    embedding, name = _neck(graph, spec, _FAMILIES[spec.family](graph, spec, x, pictures)), OUTPUT[logits]
    if logits:
        graph.dense(embedding, "classifier", out=name)
        width = len(graph.leaf("params/classifier/bias"))
    else:
        width = spec.feature_dim
        _length_one(graph, embedding, width, out=name)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, spec.name,
            [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["n", *pictures.shape])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])],
            [numpy_helper.from_array(values, key) for key, values in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="fedklpr_jax",
    )  # fmt: skip
    helper.set_model_props(model, dict(metadata))
    # Kinds, attributes and shapes of every node; a mistake here is ours.
    checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _with_mirrored(graph: Graph, x: str) -> str:
    """Maps [n, c, h, w], and their mirror images behind them: [2 n, c, h, w]."""
    backwards = {"starts": -1, "ends": _BEFORE_FIRST, "axes": 3, "steps": -1}
    places = (graph.whole(f"mirror.{name}", value) for name, value in backwards.items())
    return graph.op("Concat", x, graph.op("Slice", x, *places), axis=0)


def _length_one(graph: Graph, both: str, width: int, out: str) -> str:
    """Of the features [2 n, width] of pictures and of their mirror images the sums [n, width], brought to length 1."""
    pairs = graph.op("Reshape", both, graph.whole("pairs", 2, -1, width))
    total = graph.op("ReduceSum", pairs, graph.whole("axes.pair", 0), keepdims=0)
    length = graph.op("ReduceL2", total, graph.whole("axes.features", 1))
    return graph.op("Div", total, graph.op("Max", length, graph.constant("least", 1e-12)), out=out)
