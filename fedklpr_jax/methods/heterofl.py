"""HeteroFL: every device trains the first channels of each layer, as many as it can carry.

Diao, Ding, Tarokh, "HeteroFL: computation and communication efficient federated learning for heterogeneous clients",
ICLR 2021, algorithm 1. A client of capacity p trains W[: p d_out, : p d_in] of every layer W, and

    W[j] <- mean of W_k[j] over the clients k that hold entry j, the old value where nobody does

Of their other parts:

* *Scaler* (a layer's output divided by p while training, then batch norm) is left out: a norm divides it away again,
  up to its epsilon. The CNN has no norms, and there it is missing.
* *Static batch norm* (no running statistics; after training the server asks all clients for them) becomes running
  statistics, so that a model can be tested at any round. With `batch_stats` among the local layers each client keeps
  its own; else they travel and are averaged like weights, over the clients that hold them, which suits no submodel.
* The mean over clients is unweighted, as theirs; by images (`method.hetero.weights`) it is FedAvg at full capacity.
* *Masked cross-entropy* (logits of classes a client has no image of are zeroed) belongs to the task; ours has none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedklpr_jax import aggregation
from fedklpr_jax.capacity import DeviceClasses
from fedklpr_jax.channels import keep_cut
from fedklpr_jax.federated import (
    ClientContext,
    ClientState,
    Message,
    Method,
    ServerContext,
    ServerState,
    Upload,
    Uploads,
)
from fedklpr_jax.methods.fedper import named
from fedklpr_jax.pruning import apply_mask, density
from fedklpr_jax.trees import PyTree


def own_submodel(message: Message, client: ClientState) -> PyTree:
    """What a client deploys: its channels of the global model."""
    return apply_mask(message.model, client.mask)


def send_submodel(
    model: PyTree, client: ClientState, context: ClientContext
) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
    """Its channels go up; in layers that stay, what belongs to other channels remains as it was."""
    # Under a mask alone weight decay would move them.
    client = client._replace(local=keep_cut(client.local, client.mask, context.received_local))
    upload = Upload(apply_mask(model, client.mask), client.mask, {"images": context.images})
    return upload, client, {"density": density(client.mask)}


def make(*, shares: str, min_channels: int, local: str, weights: str) -> Method:
    """HeteroFL.

    Args:
      shares: of the channels of each layer that each class of devices trains, such as `1.0,0.5`.
      min_channels: that a layer keeps at least.
      local: comma-separated layers that stay at the client; "" = none.
      weights: of the clients in the mean: `equal` or `images`.
    """
    capacity = DeviceClasses.parse(shares, min_channels)

    def download(server: ServerState, client: jax.Array) -> Message:
        mask = capacity.first_mask(server.model, client)
        return Message(apply_mask(server.model, mask), mask)

    def aggregate(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        images = uploads.scalars["images"]
        counted = jnp.ones_like(images) if weights == "equal" else images
        by = aggregation.image_weights(counted, uploads.accepted)
        model = context.mean(uploads.model, uploads.mask, by, server.model)
        return server._replace(model=model, round=server.round + 1), {"weight": by}

    return Method(
        "heterofl",
        is_local=named(local),
        download=download,
        finish=send_submodel,
        aggregate=aggregate,
        personalise=own_submodel,
        capacity=capacity,
    )
