"""Makes the inputs `seed-*` in the folders beside this file, one folder a target of `fuzz/`.

    python -m tests.fuzz_seeds.make

Inputs `found-*` stand there too: each once broke its target.
"""

from __future__ import annotations

import random
from pathlib import Path

from fedklpr_jax.data.folder import SPLITS
from fedklpr_jax.wire import encode
from fuzz.folders import packed, pictures
from fuzz.payloads import RECEIVERS, honest

HERE = Path(__file__).resolve().parent


def payloads() -> dict[str, bytes]:
    """A payload of every way of sending masks to each receiver but the large one, and one that rounds its values."""
    made = {
        f"receiver{number}-{mode}": bytes([2 * number]) + honest(receiver, random.Random(number), mode)
        for number, receiver in enumerate(RECEIVERS[:-1])
        for mode in ("none", "full", "change", "held")
    }
    made["blocks"] = bytes([2 * len(RECEIVERS) - 2]) + encode(RECEIVERS[-1].tree, RECEIVERS[-1].previous)
    made["rounded"] = b"\0" + encode(RECEIVERS[0].tree, RECEIVERS[0].mask, value_dtype="bfloat16")
    return made


def folders() -> dict[str, bytes]:
    """A site of one person, one of every kind of picture, and one folder a class."""
    names = (b"0001_c1s1_000001_00.png", b"0001_c1s1_000001_00.png", b"0001_c2s1_000001_00.png")
    site = [(split, name, pictures()[0]) for split, name in enumerate(names)]
    kinds = [(0, f"0002_c1s1_{row:06d}_00.png".encode(), picture) for row, picture in enumerate(pictures()[-9:])]
    # The three splits of a site are folders of pictures as well.
    classes = [(split, b"a.png", pictures()[0]) for split in range(len(SPLITS))]
    return {"site": packed(site), "kinds": packed(site + kinds), "classes": packed(classes)}


def commands() -> dict[str, bytes]:
    """Settings of every kind, and one switch."""
    lines = ("--config.rounds=3", "--config.data.clients=mall,arena", "--config.eval.rerank", "--config.data.pad=1")
    return {"settings": "\n".join(lines).encode()}


def settings() -> dict[str, bytes]:
    """Values of every kind."""
    lines = ("rounds=3", "data.copies=2,viper:10", "method.capacity.shares='1.0,0.5'", "hosts=a:1,2,0",
             "eval.rerank=True", "bottom_up.identities=0.1,viper:316")  # fmt: skip
    return {"values": "\n".join(lines).encode()}


MADE = {"decode": payloads, "folder": folders, "command": commands, "settings": settings}


def main() -> None:
    """Writes them."""
    for target, made in MADE.items():
        (HERE / target).mkdir(exist_ok=True)
        for name, data in made().items():
            (HERE / target / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
