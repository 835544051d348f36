"""Every setting of a run: name, default, range, meaning. `experiments/*.py` start from `default_config()`.

Marks: [S] stated by the method's paper or its authors' code; [C] our choice where the public text gives none. Where the
tasks need different values a setting is empty until `resolved` gives it the one of `task.name`.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from fedklpr_jax.errors import InputError
from fedklpr_jax.fields import (
    ByTask,
    Field,
    above,
    at_least,
    between,
    copies,
    hosts,
    identities,
    layers,
    one_of,
    shares,
)

FIELDS: dict[str, Field] = {
    "name": Field("", "name of the run; empty = the method's", "a name without / in it",
                  lambda v: v not in (".", "..") and "/" not in v),
    "out": Field("", "directory of the results; empty = runs/<name>"),
    "seed": Field(0, "everything random is a function of it", *between(0, 2**31 - 1)),
    "rounds": Field(ByTask(12, 8, 20), "communication rounds T", *at_least(1)),
    "epochs": Field(2, "local epochs E of a round, and of the 'after' column", *at_least(1)),
    "participation": Field(1.0, "share of the clients in each round, at least one", *above(0)),
    "data.source": Field("synthetic", "where pictures come from: drawn, a folder, or a TFDS data set (re-ID: "
                         "tfds:reid_folder)",
                         "synthetic, folder or tfds:NAME",
                         lambda v: v in ("synthetic", "folder") or (v.startswith("tfds:") and len(v) > 5)),
    "data.root": Field("", "folder source: re-ID: the directory whose sub-folders are the clients; classification: one "
                       "with an .npz of images and labels, or a sub-folder of pictures a class; tfds: where sets lie"),
    "data.clients": Field("", "re-ID: comma-separated clients by name, in this order; empty = all there are"),
    "data.unseen": Field("", "re-ID: comma-separated sites that nobody trains on, to test the server's model on"),
    "data.count": Field(10, "classification: how many clients share the data set", *at_least(1)),
    "data.partition": Field("dirichlet", "classification: how it is dealt", *one_of("dirichlet", "shards")),
    "data.alpha": Field(0.5, "dirichlet: concentration; small = few classes a client", *above(0)),
    "data.least": Field(10, "dirichlet: images a client has at least [S FedOBP]", *at_least(4)),
    "data.shards": Field(2, "shards: pieces, sorted by class, that a client gets", *at_least(1)),
    "data.test": Field(0.25, "classification: share of each client's images it is tested on [S FedOBP]",
                       *between(0.01, 0.9)),
    "data.validation": Field(0.1, "classification: share of the others held out for validation scores; 0 = none, "
                             "where no method reads them", *between(0, 0.9)),
    "data.seed": Field(0, "seed of the drawn people and sites, and of partition and test split",
                       *between(0, 2**31 - 1)),
    "data.height": Field(64, "image height in pixels", *between(16, 1024)),
    "data.width": Field(32, "image width in pixels", *between(16, 1024)),
    "data.cache": Field("", "folder, tfds: directory for decoded pictures; empty = the user's cache directory"),
    "data.stream": Field(False, "training pictures stay on disk and are read a batch at a time, for sets larger than "
                         "memory (extra grain)"),
    "data.scenario": Field("dataset", "re-ID: a client is a site, one camera of a site, or a share of a site's people "
                           "[S FedReID]", *one_of("dataset", "camera", "identity")),
    "data.identity_clients": Field(2, "identity scenario: clients that a site's people are dealt to [S FedReID]",
                                   *at_least(2)),
    "data.public": Field("", "the server's unlabelled pictures, where a method reads some: a folder, in re-ID layout "
                         "or plain, whose people are no client's (never market1501_mini beside mars_mini, which share "
                         "theirs); empty = drawn people of no client"),
    "data.public_images": Field(256, "how many pictures are drawn for the server", "a multiple of 32 from 32",
                                lambda v: v >= 32 and v % 32 == 0),
    "data.copies": Field("2", "unsupervised: IDE, how often each picture counts, so that a person has about 20 [S]",
                         "a count from 1 to 100, or one for all and those of clients, such as 2,viper:10", copies),
    "data.flip": Field(ByTask(0.5, 0.5, 0.0), "probability of mirroring a training image", *between(0, 1)),
    "data.pad": Field(ByTask(4, 4, 0), "pixels a training image is shifted by at most", *between(0, 64)),
    "data.erase": Field(ByTask(0.3, 0.3, 0.0), "probability of erasing a rectangle of a training image",
                        *between(0, 1)),
    "model.arch": Field(ByTask("thin", "thin", "cnn"), "network; cnn, vgg* and *cifar* are for classification",
                        *one_of("thin", "resnet18", "resnet34", "resnet50", "efficientnet_lite0", "cnn", "vgg11",
                                 "vgg16", "vgg11_thin", "resnet18_cifar", "resnet_cifar_thin")),
    "model.pooling": Field("avg", "global pooling: average or generalised mean", *one_of("avg", "gem")),
    "model.norm": Field("batch", "classification: norms by statistics of the batch, or of each image over all channels "
                        "(group norm of one group), where submodels share none",
                        *one_of("batch", "group")),
    "model.embedding": Field(0, "width of FedReID's embedding block; 0 = BNNeck on the pooled feature", *at_least(0)),
    "model.dropout": Field(0.5, "dropout of the embedding block", *between(0, 0.95)),
    "model.dtype": Field("float32", "arithmetic of the forward pass; parameters stay float32",
                         *one_of("float32", "bfloat16")),
    "model.convolution": Field("auto", "Winograd's tiles (else patches), patches, XLA's own, or what suits the backend",
                               *one_of("auto", "winograd", "patches", "stock")),
    "model.weights": Field(ByTask("random", "synthetic"), "where the trunk starts: random, synthetic (trained with "
                           "labels on drawn sites of no client, cached), or a weight file (.npz)",
                           "random, synthetic or the path of an .npz file",
                           lambda v: v in ("random", "synthetic") or v.endswith(".npz")),
    "model.pretrained": Field("", "re-ID with a resnet or efficientnet_lite0, in place of model.weights: a file of "
                              "others' weights that the trunk starts from; what it has not stays random",
                              "the path of a .pth, .pth.tar, .pt, .safetensors or .npz file",
                              lambda v: not v or v.endswith((".pth", ".pth.tar", ".pt", ".safetensors", ".npz"))),
    "task.name": Field("unsupervised", "the learning problem",
                       *one_of("supervised", "unsupervised", "bottom_up", "classification")),
    "task.batch": Field(32, "classification: images in a batch", *at_least(1)),
    "task.people": Field(8, "P: identities, or proxies, in a batch", *at_least(2)),
    "task.shots": Field(4, "K: images of each of them", *at_least(2)),
    "task.smoothing": Field(0.1, "supervised: label smoothing of the identity loss", *between(0, 0.99)),
    "task.identity": Field(1.0, "supervised: weight of the identity cross-entropy; 0 switches it off", *at_least(0)),
    "task.triplet": Field(1.0, "supervised: weight of the batch-hard triplet loss; 0 switches it off", *at_least(0)),
    "task.margin": Field(0.3, "supervised: margin of the triplet loss", *at_least(0)),
    "cluster.k1": Field(20, "pseudo labels: neighbours that make the reciprocal sets [S]", *between(1, 1000)),
    "cluster.k2": Field(6, "pseudo labels: neighbours whose encodings are averaged [S]", *between(1, 1000)),
    "cluster.eps": Field(0.5, "pseudo labels: radius of DBSCAN on the Jaccard distance [S]",
                         "a number above 0 and below 1", lambda v: 0 < v < 1),
    "cluster.min_samples": Field(4, "pseudo labels: neighbours, itself included, of a core point [S]", *at_least(1)),
    "cluster.where": Field("auto", "clustering inside the compiled round, on the host, or the faster one here",
                           *one_of("auto", "host", "traced")),
    "bottom_up.batch": Field(16, "bottom_up: images in a batch [S]", *at_least(2)),
    "bottom_up.first_epochs": Field(1, "bottom_up: local epochs of round 0, in which every image is a cluster; 0 = as "
                                    "in the others [S: 20]", *at_least(0)),
    "bottom_up.first_decay_from": Field(16, "bottom_up: epoch of round 0 from which the step is a tenth [S]",
                                        *at_least(0)),
    "bottom_up.first": Field(0.1, "bottom_up: factor on the step size in round 0 [S: 10, of 0.01]", *above(0)),
    "bottom_up.merge": Field(0.05, "bottom_up: pairs of clusters merged a round, as a share of the images [S]",
                             *between(0, 1)),
    "bottom_up.identities": Field("", "bottom_up: personalised clustering: people at a client, so that merges = (images"
                                  " - people) / rounds [S]; below 1 a share of its images; empty = bottom_up.merge",
                                  "a number above 0, or one for all and those of clients, such as 0.1,viper:316",
                                  identities),
    "bottom_up.size": Field(0.003, "bottom_up: lambda, what an image of two clusters adds to their distance [S]",
                            *at_least(0)),
    "bottom_up.scale": Field(10.0, "bottom_up: factor on the similarities to the clusters [S]", *above(0)),
    "bottom_up.early": Field(True, "bottom_up: personalised epoch: it ends when a batch is all right or the running "
                             "precision exceeds 0.95 [S]"),
    "contrast.intra": Field(0.6, "weight of the contrast within the own camera [S]", *at_least(0)),
    "contrast.inter": Field(0.7, "weight of the contrast across cameras [S]", *at_least(0)),
    "contrast.online": Field(0.7, "[C] weight of O2CAP's online association; 0 switches it off, as published",
                             *at_least(0)),
    "contrast.temperature": Field(0.07, "tau of both contrasts [S]", *above(0)),
    "contrast.negatives": Field(50, "most similar other proxies that a sample is set against [S]", *at_least(1)),
    "contrast.momentum": Field(0.2, "share a proxy keeps when a sample moves it [S]", *between(0, 1)),
    "optimizer.name": Field("adam", "local optimiser, started afresh every round", *one_of("adam", "sgd")),
    "optimizer.learning_rate": Field(ByTask(4e-3, 1e-3, 1e-3), "step size", *above(0)),
    "optimizer.momentum": Field(0.9, "momentum of sgd", *between(0, 0.9999)),
    "optimizer.nesterov": Field(True, "whether sgd looks ahead"),
    "optimizer.weight_decay": Field(5e-4, "added to the gradient as L2", *at_least(0)),
    "optimizer.backbone": Field(1.0, "factor on the step size of the trunk (FedReID: 0.1)", *above(0)),
    "optimizer.decay_from": Field(0.67, "share of the rounds after which the step size falls", *between(0, 1)),
    "optimizer.decay": Field(0.2, "factor it falls by", *between(0, 1)),
    "last.epochs": Field(0, "local epochs of the last round; 0 = as in the others [S FedCAPR: 50]", *at_least(0)),
    "last.warmup": Field(5, "first epochs of a long last round, in which the step size rises [S]", *at_least(0)),
    "last.decay_every": Field(20, "epochs of a long last round after which the step size falls to a tenth [S]",
                              *at_least(1)),
    "client_map": Field("auto", "how clients are mapped; auto = what was measured to be the fastest on the backend",
                        *one_of("auto", "map", "vmap", "pmap", "loop")),
    "client_chunk": Field(0, "vmap: clients at once; 0 = all", *at_least(0)),
    "devices": Field(0, "devices of a host that share the clients; 0 = all; a CPU is one, or so many if more are "
                     "asked for",
                     *at_least(0)),
    "hosts": Field("", "several hosts that share the clients, each running the same command: where the first listens, "
                   "how many they are, which this is; auto = as the cluster's manager (such as Slurm) says",
                   "auto or HOST:PORT,COUNT,INDEX, such as 10.0.0.5:12345,2,0", hosts),
    "client_states": Field("auto", "where clients' states lie between rounds: in memory, or a file each in the run's "
                           "folder; auto = on disk from 1 GiB in all", *one_of("auto", "memory", "disk")),
    "deploy.least": Field(0, "of a deployment (docs/deploy.md): how many sites have to be here to begin, and for a "
                          "round; 0 = all to begin, one for a round", *at_least(0)),
    "deploy.wait": Field(600, "of a deployment: seconds to wait for sites, first for all, then for the least",
                         *at_least(1)),
    "deploy.deadline": Field(3600, "of a deployment: seconds after which a round goes on without the sites that have "
                             "not answered", *at_least(1)),
    "wire.encode": Field(True, "whether messages go through the wire format; False hands the arrays over and counts 4 "
                         "bytes a value, a bit a mask's entry: for thousands of clients"),
    "wire.dtype": Field("float32", "values on the wire: float32 is lossless", *one_of("float32", "bfloat16")),
    "merge.name": Field("mean", "what the server merges uploads with, entry by entry over those that keep it: the "
                        "method's weighted mean, the median, or a trimmed mean", *one_of("mean", "median", "trimmed")),
    "merge.trim": Field(0.2, "trimmed: share of the values cut at each end, rounded up", *between(0.001, 0.499)),
    "privacy.clip": Field(0.0, "norm that a client's update is clipped to, for differentially private runs of plain "
                          "means; 0 = off", *at_least(0)),
    "privacy.noise": Field(1.0, "privacy: deviation of the noise in the sum of the updates, as a multiple of the clip",
                           *at_least(0)),
    "privacy.delta": Field(1e-3, "privacy: delta at which epsilon is told, below 1 / clients",
                           *between(1e-12, 0.5)),
    "eval.every": Field(3, "rounds between evaluations on the test images (shown, never used)", *at_least(1)),
    "eval.after": Field(False, "also evaluate after local fine-tuning, each time"),
    "eval.rerank": Field(False, "k-reciprocal re-ranking of the test lists (k1 20, k2 6, lambda 0.3)"),
    "eval.average_precision": Field("standard", "the usual AP, or FedReID's", *one_of("standard", "trapezoidal")),
    "checkpoint.keep": Field(2, "checkpoints kept", *at_least(1)),
    "checkpoint.every": Field(1, "rounds between checkpoints", *at_least(1)),
    "dry_run": Field(False, "tells what would be run, how many steps, bytes and minutes that is, and runs nothing"),
    "tensorboard": Field(False, "also writes event files, in the run's folder tensorboard, as the run goes on (extra "
                         "tensorboard)"),
    "compilation_cache": Field("", "directory for compiled programs; empty = the user's cache directory"),
    "method.name": Field("fedklpr", "the method",
                         *one_of("fedklpr", "fedcapr", "fedavg", "fedpav", "fedprox", "local", "centralised",
                                  "fedobp", "fedper", "fedreid", "fedrep", "subfedavg", "lotteryfl", "fedureid",
                                  "cahfp", "heterofl")),
    "method.ureid.mu": Field(0.5, "[C] FedUReID: mu, share of its own model in what a client starts from [S: mu own + "
                             "(1 - mu) global]", *between(0, 1)),
    "method.prox.mu": Field(0.01, "FedProx: weight of the proximal term", *at_least(0)),
    "method.reid.cdw": Field(True, "FedReID: clients weigh as far as their logits turned, else by their images [S]"),
    "method.reid.distill_every": Field(3, "[C] FedReID: rounds between distillations on the public pictures; 0 = none "
                                       "[S: 10 of 300]", *at_least(0)),
    "method.reid.distill_rate": Field(5e-4, "FedReID: step size of the distillation [S]", *above(0)),
    "method.reid.cluster": Field(False, "FedReID: one model a cluster of clients, for which distillation is off [S]"),
    "method.reid.cloud_every": Field(0, "FedReID: rounds after which the cloud averages the edges, one a site, each "
                                     "over its own clients; 0 = no edges", *at_least(0)),
    "method.per.layers": Field(ByTask("classifier", "bnneck"), "FedPer: layers that stay at the client: the classifier "
                               "[S], or this and the last blocks; without one the neck [C]",
                               "parts of paths, such as classifier,layer4_0", layers),
    "method.rep.layers": Field(ByTask("classifier", "bnneck"), "FedRep: the head, which stays at the client: the "
                               "classifier [S]; without one the neck [C]",
                               "parts of paths, such as classifier,bnneck", layers),
    "method.rep.head_epochs": Field(1, "FedRep: first local epochs, which train the head alone; the others train the "
                                    "body alone [S: 10 of 11]", *at_least(1)),
    "method.sub.local": Field(ByTask("classifier", "", ""), "Sub-FedAvg: layers that stay at the client: none [S], in "
                              "re-ID the classifier [C]", "parts of paths, such as classifier,bnneck, or nothing",
                              lambda v: v == "" or layers(v)),
    "method.sub.step": Field(0.1, "Sub-FedAvg: p, share of the alive weights of a layer that a step removes [S]",
                             *between(0, 1)),
    "method.sub.target": Field(0.3, "Sub-FedAvg: pruned share that pruning stops at [S]", *between(0, 1)),
    "method.sub.eps": Field(1e-4, "Sub-FedAvg: Hamming distance of the first and the last epoch's mask that a step "
                            "needs [S]", *between(0, 1)),
    "method.sub.threshold": Field(0.5, "Sub-FedAvg: validation score (accuracy or mAP) that a pruned model needs [S]",
                                  *between(0, 1)),
    "method.lottery.local": Field(ByTask("classifier", "", ""), "LotteryFL: layers that stay at the client: none [S], "
                                  "in re-ID the classifier [C]",
                                  "parts of paths, such as classifier,bnneck, or nothing",
                                  lambda v: v == "" or layers(v)),
    "method.lottery.step": Field(0.2, "LotteryFL: p, share of the alive weights of a layer that a step removes [S]",
                                 *between(0, 1)),
    "method.lottery.start": Field(0.2, "LotteryFL: validation score (accuracy or mAP) of the download that a step "
                                  "needs [S]", *between(0, 1)),
    "method.lottery.end": Field(0.1, "LotteryFL: remaining rate at which pruning ends [S: 0.1 or 0.5]",
                                *between(0, 1)),
    "method.capacity.shares": Field("1.0,0.8,0.6,0.4", "CA-HFP, HeteroFL: share of the channels of each layer that a "
                                    "class of devices trains; client k is of class k modulo their number",
                                    "comma-separated shares above 0, at most 1, such as 1.0,0.5", shares),
    "method.capacity.min_channels": Field(8, "CA-HFP, HeteroFL: channels that a layer keeps at least", *at_least(1)),
    "method.capacity.form": Field("compact", "clients train networks of their own size, or the whole one under masks: "
                                  "the same numbers up to rounding", *one_of("compact", "masked")),
    "method.capacity.local": Field(ByTask("classifier,batch_stats", "batch_stats", "batch_stats"), "CA-HFP, HeteroFL: "
                                   "what stays at the client: in supervised re-ID the classifier, and always the "
                                   "statistics, which differ with the channels [C]",
                                   "some of classifier,bnneck,batch_stats, or nothing",
                                   lambda v: {n.strip() for n in v.split(",")} <= {"", "classifier", "bnneck",
                                                                                   "batch_stats"}),
    "method.hfp.score": Field(ByTask("curvature", "magnitude", "curvature"), "[C] CA-HFP: what a channel matters: "
                              "expected change of the loss, or (without labels) its squared weights",
                              *one_of("curvature", "magnitude")),
    "method.hfp.refresh": Field(0, "[C] CA-HFP: a client chooses its channels anew every so many of its rounds, each "
                                "time from the whole model; 0 = in its first alone", *at_least(0)),
    "method.hfp.fill": Field("coverage", "[C] CA-HFP: channels a client did not train are left out of the mean, or "
                             "count as the global ones, or as zeros", *one_of("coverage", "global", "zeros")),
    "method.hetero.weights": Field("equal", "HeteroFL: clients count alike [S], or by their images",
                                   *one_of("equal", "images")),
    "method.capr.weight": Field(0.13, "FedCAPR: weight of the cosine penalty [S]", *at_least(0)),
    "method.obp.quantile": Field(0.9999, "FedOBP: q, elements scored above this quantile are the client's own "
                                 "[S, 0.995 to 0.99993 by data set]; 1 = FedAvg", *between(0, 1)),
    "method.obp.score": Field("obd", "FedOBP: |(own - global) own|, or (own - global)^2 [S, both]",
                              *one_of("obd", "squared")),
    "method.obp.ema": Field(0.5, "FedOBP: weight of the client's older scores; 0 = the present ones alone [S]",
                            *between(0, 0.9999)),
    "method.obp.norm": Field("none", "FedOBP: averaged scores brought to [0, 1] in each layer, or over all (which "
                             "changes nothing) [S]", *one_of("none", "global", "layer")),
    "method.obp.classifier": Field(False, "FedOBP: only the identity classifier is scored [S, an option]"),
    "method.obp.score_on": Field("server", "FedOBP: who remembers a client's last model and scores it [S]",
                                 *one_of("server", "client")),
    # 0.22 makes d L_KL about 0.13 (1 - cos), FedCAPR's penalty, at the start of round 1.
    "method.kll.weight": Field(0.22, "[C] d, weight of the KL loss [S: L = L_base + d L_KL]", *at_least(0)),
    "method.kll.temperature": Field(1.0, "[C] T of the softmax over features, KLL and KLAW", *above(0)),
    "method.kll.direction": Field("forward", "[C] forward = KL(received || local)", *one_of("forward", "reverse")),
    "method.kll.space": Field("features", "[C] softmax over the embedding, or over similarities to the classes",
                              *one_of("features", "proxies")),
    "method.kll.reference": Field("personalised", "[C] the frozen model: the masked download, or the dense global one",
                                  *one_of("personalised", "global")),
    "method.klaw.sign": Field("align", "[C] prefer clients near the received model, those that gained most, "
                              "or none (then n_k)", *one_of("align", "gain", "none")),
    "method.praw.form": Field("compact", "[C] 1/(1-r), 1-r, or no pruning weight",
                              *one_of("compact", "dense", "none")),
    "method.klpwa.form": Field("product", "[C] product or weighted sum of the two", *one_of("product", "sum")),
    "method.klpwa.mix": Field(0.5, "[C] share of KLAW in the sum", *between(0, 1)),
    "method.klpwa.cap": Field(3.0, "[C] no weight exceeds cap / clients", *at_least(1)),
    "method.sas.form": Field("skip", "pruned entries are left out of the mean [S], or count as zeros (ablation)",
                             *one_of("skip", "zeros")),
    "method.prune.step": Field(ByTask(0.25, 0.5), "[C] share of the alive weights removed by a step", *between(0, 1)),
    "method.prune.target": Field(ByTask(0.4, 0.2), "[C] density that pruning stops at", *between(0, 1)),
    "method.prune.scope": Field("global", "[C] one threshold over all layers, or one for each",
                                *one_of("global", "layer")),
    "method.crr.drop": Field(0.02, "[C] validation mAP a step may cost", *at_least(0)),
    "method.crr.recover": Field(0.05, "[C] loss of validation mAP since the last step that undoes it", *at_least(0)),
    "method.crr.halt": Field(2, "[C] rounds without pruning after a recovery", *at_least(0)),
    "method.bn.statistics": Field("local", "[C] batch-norm statistics stay, or travel and are averaged",
                                  *one_of("averaged", "local")),
}  # fmt: skip


def default_config() -> ml_collections.ConfigDict:
    """A fresh copy of all settings with their defaults.

    >>> default_config().method.crr.drop
    0.02
    """
    config = ml_collections.ConfigDict()
    for path, field in FIELDS.items():
        *sections, leaf = path.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ml_collections.ConfigDict()
            node = node[section]
        by_task = isinstance(field.default, ByTask)
        node[leaf] = ml_collections.config_dict.placeholder(field.type) if by_task else field.default
    return config


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy in which the settings left empty have the value of the task.

    Beside `model.pretrained`, `model.weights` left empty is `random`.

    >>> config = default_config()
    >>> config.task.name = "supervised"
    >>> config.optimizer.learning_rate, resolved(config).optimizer.learning_rate
    (None, 0.004)
    """
    config = config.copy_and_resolve_references()
    for path, value in flat(config).items():
        default = FIELDS[path].default if path in FIELDS else None
        if value is None and isinstance(default, ByTask):
            config.update_from_flattened_dict({path: default.of(config.task.name)})
            if path == "model.weights" and config.model.pretrained:
                config.model.weights = "random"
    return config


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Every setting by its dotted path."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if isinstance(value, ml_collections.ConfigDict):
                walk(value, path + ".")
            else:
                found[path] = value

    walk(config, "")
    return found


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises `InputError` for the first setting that is unknown, missing, of another type, or out of its range.

    >>> config = default_config()
    >>> config.rounds = 0
    >>> validate(config)
    Traceback (most recent call last):
    fedklpr_jax.errors.InputError: config.rounds: 0 is not allowed; give a number from 1
    """
    values = flat(config)
    for path in values.keys() - FIELDS.keys():
        raise InputError(f"config.{path}: there is no such setting")
    for path, field in FIELDS.items():
        if path not in values:
            raise InputError(f"config.{path}: missing; its default is {field.default!r}")
        value = values[path]
        wanted = field.type
        if value is None and isinstance(field.default, ByTask):
            continue
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise InputError(f"config.{path}: {value!r} is not allowed; give a {wanted.__name__}")
        if not field.test(value):
            raise InputError(f"config.{path}: {value!r} is not allowed; give {field.right}")
    if config.participation > 1:
        raise InputError(f"config.participation: {config.participation!r} is not allowed; give a share of at most 1")
    if config.data.source == "folder" and not config.data.root:
        raise InputError("config.data.root: empty; the folder source needs the directory that holds the pictures")
    if config.data.source not in ("synthetic", "folder", "tfds:reid_folder") and config.task.name != "classification":
        raise InputError(f"config.data.source: {config.data.source!r} is for classification; give synthetic, folder or "
                         "tfds:reid_folder")
    copied = config.data.scenario != "dataset" or config.method.name == "centralised"
    if config.data.stream and (copied or config.hosts):
        raise InputError("config.data.stream: is for one host, the scenario dataset and clients of their own (not "
                         "centralised); leave it off, or change config.hosts, data.scenario or method.name")
    if config.model.norm != "batch" and config.task.name != "classification":
        raise InputError(f"config.model.norm: {config.model.norm!r} is for classification; give batch")
    if config.model.pretrained:
        known = ("resnet18", "resnet34", "resnet50", "efficientnet_lite0")
        if config.model.arch not in known:
            raise InputError(f"config.model.pretrained: is for {', '.join(known)}, not for "
                             f"{config.model.arch or 'the default network'}; set config.model.arch")
        if config.model.weights not in (None, "random"):
            raise InputError(f"config.model.pretrained: given beside model.weights={config.model.weights}, and a trunk "
                             "has one start; give one of the two")
    if config.wire.dtype != "float32" and not config.wire.encode:
        raise InputError(f"config.wire.dtype: {config.wire.dtype} is what values are encoded as; give wire.encode=True "
                         "or float32")
    if config.hosts and config.client_map not in ("auto", "map", "vmap"):
        raise InputError(f"config.client_map: {config.client_map!r} is for one host; give auto, map or vmap")
    if config.hosts and config.client_states == "disk":
        raise InputError("config.client_states: 'disk' is for one host, others could not read them; give memory")
    reid = config.method.reid
    if config.method.name == "fedreid" and bool(reid.distill_every) + reid.cluster + bool(reid.cloud_every) > 1:
        raise InputError("config.method.reid: distillation, clustering and edges are not combined; leave on one of "
                         "distill_every (off: 0), cluster (off: False) and cloud_every (off: 0)")
    if (config.method.name, config.method.hfp.score, config.task.name) == ("cahfp", "curvature", "unsupervised"):
        raise InputError("config.method.hfp.score: 'curvature' needs labels at the start of a round, which the "
                         "unsupervised task has not; give 'magnitude'")
    if config.merge.name != "mean":
        if config.privacy.clip:
            raise InputError(f"config.merge.name: {config.merge.name!r} hides no client in noise of this size; give "
                             "mean, or config.privacy.clip=0")
        if config.method.name == "fedreid" and (reid.distill_every or reid.cluster or reid.cloud_every):
            raise InputError(f"config.merge.name: {config.merge.name!r} is not how fedreid distils, or merges clusters "
                             "and edges; give mean, or leave off distill_every (0), cluster (False), cloud_every (0)")
    if config.method.name == "subfedavg" and config.epochs < 2:
        raise InputError("config.epochs: 1 is not allowed; subfedavg compares two epochs, give a number from 2")
    if config.method.name == "fedrep" and config.method.rep.head_epochs >= config.epochs:
        raise InputError(f"config.method.rep.head_epochs: {config.method.rep.head_epochs} is not allowed; give a "
                         f"number below config.epochs ({config.epochs}), the other epochs train the body")
