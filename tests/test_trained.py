"""What can be done with the folder of a run: load a client's model, export it, search by it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest
from PIL import Image

from fedklpr_jax import assembly, checkpoint, export, exporting, search, train, trained
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.console import Console
from fedklpr_jax.data.folder import SPLITS
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.features import evaluate_features
from fedklpr_jax.models import spec as networks
from fedklpr_jax.models.tensor_files import open_tensors, read_float32
from fedklpr_jax.ranked_picture import Tile, draw_ranking
from tests.federations import TINY, tiny_sites, write_shapes

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

ROOT = Path(__file__).resolve().parents[1]
QUIET = Console(io.StringIO())


def write_sites(root: Path) -> None:
    """The tiny sites as folders in the layout of Market-1501."""
    for site in tiny_sites():
        for split, images in zip(SPLITS, (site.train, site.query, site.gallery), strict=True):
            folder = root / site.name / split
            folder.mkdir(parents=True)
            for row, (person, camera) in enumerate(zip(images.ids, images.cams, strict=True)):
                Image.fromarray(images.pixels[row]).save(folder / f"{person:04d}_c{camera}s1_{row:06d}_00.png")


def run(out: Path, method: str, root: str, **settings: Any) -> Path:
    """The folder of a finished run of one or two short rounds."""
    config = default_config()
    config.method.name, config.data.source, config.data.root, config.out = method, "folder", root, str(out)
    config.epochs, config.eval.every, config.data.height, config.data.width = 1, 100, 32, 16
    config.data.count, config.data.least = 3, 20
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in settings.items()})
    train.run(config, QUIET)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder for runs and data; the default network is a tiny one as long as it is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.SPECS, "thin", dataclasses.replace(TINY, name="thin"))
        yield tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def people(place) -> Path:
    """Masks, layers that stay at their clients, rounded messages, and one of three clients in both rounds."""
    write_sites(place / "sites")
    pruning = {"method__prune__step": 0.3, "method__crr__drop": 1.0, "method__crr__recover": 1.0}
    sizes = {"task__name": "supervised", "task__people": 4, "task__shots": 2, "rounds": 2}
    more = {"seed": 1, "participation": 0.34, "wire__dtype": "bfloat16", **sizes, **pruning}
    return run(place / "people", "fedklpr", str(place / "sites"), **more)


@pytest.fixture(scope="module")
def shapes(place) -> Callable[[str], Path]:
    """Runs of classification by their method."""
    more = {"task__name": "classification", "rounds": 1}
    settings = {"cahfp": {"method__capacity__shares": "1.0,0.5"}, "fedobp": {"method__obp__quantile": 0.5}}
    root = write_shapes(place / "shapes")

    def made(method: str) -> Path:
        folder = place / method
        return folder if folder.exists() else run(folder, method, root, **more, **settings[method])

    return made


@contextlib.contextmanager
def away(folder: Path) -> Iterator[None]:
    """As if a folder were on another machine."""
    elsewhere = folder.with_name(f"{folder.name} elsewhere")
    folder.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(folder)


def config_of(folder: Path) -> ml_collections.ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(json.loads((folder / "config.json").read_text())["settings"])
    return resolved(config)


def taken_part(folder: Path) -> set[str]:
    """The clients of a run that have trained, and been accepted."""
    (meta,) = [meta for step, meta in checkpoint.metas(folder / "checkpoints").items() if step == 2]
    return {meta["trained"]["names"][int(number)] for number in meta["clients"]}


def command(capsys, module: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of a command; bad input is one line and no traceback."""
    status = module.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (status == 2) == (err.count("\n") == 1 and err.startswith("error: ")), err
    return status, out, err


def test_a_clients_embeddings_are_those_of_the_headline_without_a_picture(people, place):
    rows = json.loads((people / "summary.json").read_text())["clients"]
    sites = {site.name: site for site in assembly.load_sites(config_of(people))[0]}
    here = taken_part(people)
    assert here == {"pier"} and rows["pier"]["density"] < 1 == rows["yard"]["density"]
    with away(place / "sites"):
        models = {name: trained.load(people, name, QUIET) for name in here}
    models |= {name: trained.load(people, name, QUIET) for name in rows.keys() - here}
    for name, model in models.items():
        assert (model.rounds, model.classes, model.density) == (2, (), rows[name]["density"])
        network, site = model.network(), sites[name]
        features = (network(model.variables, part.pixels) for part in (site.query, site.gallery))
        metrics = evaluate_features(*features, site.query, site.gallery).metrics
        assert metrics == {key: rows[name][key] for key in metrics}


def test_a_client_that_never_took_part_needs_the_runs_data(people, place):
    (name, *_) = {"pier", "gate", "yard"} - taken_part(people)
    with away(place / "sites"), pytest.raises(InputError, match=f"{name} has taken part in no round, and what it "):
        trained.load(people, name, QUIET)


@pytest.mark.parametrize("method", ["cahfp", "fedobp"])
def test_a_clients_logits_are_those_of_the_headline(shapes, method):
    folder = shapes(method)
    config, rows = config_of(folder), json.loads((folder / "summary.json").read_text())["clients"]
    data = assembly.load_labelled(config)
    for number, share in enumerate(assembly.deal(data.labels, config.data)):
        model = trained.load(folder, f"c{number}", QUIET)
        assert model.classes == data.classes and model.density == rows[f"c{number}"]["density"]
        answers = model.network()(model.variables, data.pixels[share.test]).argmax(axis=1)
        assert np.mean(answers == data.labels[share.test]) == rows[f"c{number}"]["accuracy"]


def test_an_interrupted_run_gives_its_newest_checkpoint(people, tmp_path):
    cut = shutil.copytree(people, tmp_path / "cut")
    (cut / "checkpoints" / "step-00000002.json").unlink()
    (cut / "report.html").unlink()
    name = next(iter(taken_part(people)))
    assert trained.load(cut, name, QUIET).rounds == 1


def refused(folder: Path, client: str = "pier") -> str:
    with pytest.raises(InputError) as caught:
        trained.load(folder, client, QUIET)
    return str(caught.value).replace(str(folder), "RUN")


def test_what_is_no_run_or_client_is_one_line(people, tmp_path):
    assert refused(people, "peer") == "--client: 'peer' is no client of RUN; there are gate, pier, yard"
    assert refused(tmp_path).startswith("RUN/config.json: no such file; give the folder of a run")
    copy = shutil.copytree(people, tmp_path / "copy")
    record = copy / "checkpoints" / "step-00000002.json"
    told = json.loads(record.read_text())
    told["meta"]["trained"] = None
    record.write_text(json.dumps(told))
    assert "RUN: its clients were machines of their own, and their models are there" in refused(copy)
    del told["meta"]["trained"]
    record.write_text(json.dumps(told))
    assert "RUN/checkpoints: was written by an earlier version" in refused(copy)
    shutil.rmtree(copy / "checkpoints")
    assert "holds no complete checkpoint; give a run that has finished a round" in refused(copy)
    (copy / "config.json").write_text('{"settings": {"roundss": 1}}')
    assert "RUN: config.roundss: there is no such setting" in refused(copy)


def test_an_onnx_file_gives_the_embeddings_and_tells_what_it_is(people, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime (extra onnx) is not installed")
    name = min(taken_part(people))
    status, out, _ = command(capsys, export, people, "--client", name, "--format", "onnx")
    assert status == 0 and re.search(rf"compared on \d+ test pictures of {name}: largest difference \d\.\de-0\d\n", out)
    session = runtime.InferenceSession(str(people / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    model = trained.load(people, name, QUIET)
    (site,) = [site for site in tiny_sites() if site.name == name]
    found = session.run(["embedding"], {"pictures": site.query.pixels})[0]
    np.testing.assert_allclose(found, model.network()(model.variables, site.query.pixels), atol=2e-6)
    told = session.get_modelmeta().custom_metadata_map
    assert told == exporting.metadata(model)
    assert [told[key] for key in ("run", "client", "method", "rounds")] == ["people", name, "fedklpr", "2"]
    assert told["takes"].startswith("uint8 [n, 32, 16, 3]: pictures, rows, columns, red, green, blue (NHWC), 0 to 255")
    assert told["configuration"] == train.fingerprint(config_of(people))


def test_a_safetensors_file_is_one_for_others_and_for_us(people, tmp_path, capsys):
    name, path = min(taken_part(people)), tmp_path / "its.safetensors"
    assert command(capsys, export, people, "--client", name, "--format", "safetensors", "--out", path)[0] == 0
    model = trained.load(people, name, QUIET)
    kernel = model.variables["params"]["trunk"]["layer2_0"]["conv1"]["kernel"]
    tensors = open_tensors(path)
    np.testing.assert_array_equal(read_float32(path, tensors, "params.trunk.layer2_0.conv1.kernel"), kernel)
    assert not [name for name in tensors if "classifier" in name]
    library = pytest.importorskip("safetensors", reason="the package safetensors is not installed")
    with library.safe_open(str(path), "np") as file:
        assert file.metadata() == exporting.metadata(model)
        np.testing.assert_array_equal(file.get_tensor("params.trunk.layer2_0.conv1.kernel"), kernel)
        zeros = sum(np.sum(file.get_tensor(name) == 0) for name in file.keys() if name.endswith("kernel"))  # noqa: SIM118
    assert zeros > 0


@pytest.mark.parametrize("form", ["onnx", "safetensors"])
def test_a_smaller_device_has_a_smaller_file(shapes, tmp_path, capsys, form):
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="the package onnxruntime (extra onnx) is not installed")
    folder, sizes = shapes("cahfp"), []
    for name in ("c0", "c1"):
        path = tmp_path / f"{name}.{form}"
        # What is compared with are the logits of the whole network under the client's mask.
        assert command(capsys, export, folder, "--client", name, "--format", form, "--out", path)[0] == 0
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.35 * sizes[0]


def test_without_the_clients_pictures_noise_is_compared(people, place, tmp_path, capsys):
    with away(place / "sites"):
        path = tmp_path / "its.safetensors"
        arguments = ("--client", min(taken_part(people)), "--format", "safetensors", "--out", path)
        status, out, _ = command(capsys, export, people, *arguments)
    assert status == 0 and "compared on 64 pictures of noise, as the client's own are not here" in out


def test_a_file_that_gives_other_numbers_is_not_kept(people, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the package onnxruntime (extra onnx) is not installed")
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    path = tmp_path / "its.onnx"
    path.write_bytes(b"an older one")
    arguments = ("--client", min(taken_part(people)), "--format", "onnx", "--out", path)
    status, _, err = command(capsys, export, people, *arguments)
    assert status == 2 and "not written: what was read back differs by " in err
    assert [file.name for file in tmp_path.iterdir()] == ["its.onnx"] and path.read_bytes() == b"an older one"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_told(people, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ("--client", min(taken_part(people)), "--format", "onnx", "--out", tmp_path / "its.onnx")
    status, _, err = command(capsys, export, people, *arguments)
    assert status == 2 and "pip install 'fedklpr_jax[onnx]'" in err and not list(tmp_path.iterdir())


def test_other_wrong_arguments_of_an_export(people, tmp_path, capsys):
    for out in (tmp_path / "a.bin", tmp_path / "none" / "a.onnx"):
        status, _, err = command(capsys, export, people, "--client", "pier", "--format", "onnx", "--out", out)
        assert status == 2
        assert err == f"error: --out: {out} is not allowed; give a name ending in .onnx in an existing folder\n"


@pytest.mark.parametrize("module", ["export", "search"])
def test_help_is_quick(module):
    program = (
        f"import sys, fedklpr_jax.{module} as module\ntry:\n    module.main(['--help'])\n"
        "except SystemExit:\n    print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--client NAME" in done.stdout and done.stdout.endswith("False\n")


def test_a_search_ranks_as_the_tests_do(people, place, tmp_path, capsys):
    name = min(taken_part(people))
    model, (site,) = trained.load(people, name, QUIET), [site for site in tiny_sites() if site.name == name]
    query, gallery = (model.network()(model.variables, part.pixels) for part in (site.query, site.gallery))
    order = np.argsort(-gallery @ query[0], kind="stable")[:5]
    folder, picture = place / "sites" / name, tmp_path / "ranked.png"
    (file,) = (folder / "query").glob("*_000000_00.png")
    arguments = ("--client", name, "--gallery", folder, "--query", file, "--top", 5, "--out", picture)
    status, out, _ = command(capsys, search, people, *arguments)
    assert status == 0
    assert f"{file.name} among {len(site.gallery)} pictures, by the network of {name} after 2 rounds" in out
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+\d+ ", line)]
    assert [row[0] for row in rows] == list("12345")
    np.testing.assert_allclose([float(row[1]) for row in rows], (gallery @ query[0])[order], atol=6e-4)
    person = site.query.ids[0]
    for row, place_ in zip(rows, order, strict=True):
        assert (int(row[2]), int(row[3])) == (site.gallery.ids[place_], site.gallery.cams[place_])
        assert row[4] == ("✓" if site.gallery.ids[place_] == person else "✗")
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 6 * 96


def test_pictures_under_any_names_are_searched_and_broken_ones_counted(people, place, tmp_path, capsys):
    name = min(taken_part(people))
    files = sorted((place / "sites" / name / "query").iterdir())
    gallery = tmp_path / "gallery"
    (gallery / "monday").mkdir(parents=True)
    shutil.copy(files[0], gallery / "door.png")
    shutil.copy(files[0], gallery / "monday" / "same as the door.PNG")
    shutil.copy(files[1], gallery / "monday" / "other.png")
    (gallery / "broken.jpg").write_bytes(b"no picture")
    (gallery / "empty.png").touch()
    (gallery / "notes.txt").write_text("no picture either, and nobody would take it for one")
    arguments = ("--client", name, "--gallery", gallery, "--query", gallery / "door.png")
    status, out, _ = command(capsys, search, people, *arguments)
    assert status == 0 and "door.png among 2 pictures, 2 left out" in out and "Person" not in out
    assert "left out: broken.jpg: not a JPEG or PNG picture" in out and "left out: empty.png: 0 bytes" in out
    rows = [line.split(maxsplit=2) for line in out.splitlines() if re.match(r"\s+\d+ ", line)]
    assert [row[2].rstrip() for row in rows] == ["monday/same as the door.PNG", "monday/other.png"]
    assert float(rows[0][1]) == 1.0


def test_an_archive_is_searched_like_the_folder_it_holds(people, place, tmp_path, capsys):
    name = min(taken_part(people))
    folder, zipped = place / "sites" / name, tmp_path / "zipped"
    zipped.mkdir()
    with zipfile.ZipFile(zipped / "images.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder).as_posix())
    file = min((folder / "query").iterdir())
    more = ("--query", file, "--out", tmp_path / "a.png")
    outs = [command(capsys, search, people, "--client", name, "--gallery", where, *more) for where in (folder, zipped)]
    assert outs[0] == outs[1] and outs[0][0] == 0


def test_wrong_arguments_of_a_search(people, shapes, place, tmp_path, capsys):
    name, good = min(taken_part(people)), min((place / "sites" / "pier" / "query").iterdir())
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "none").mkdir()

    def said(*more: object, run: Path = people, client: str = name, gallery: Path = good.parent, query: Path = good):
        given = (run, "--client", client, "--gallery", gallery, "--query", query, *more)
        status, _, err = command(capsys, search, *given)
        assert status == 2
        return err.replace(str(tmp_path), "TMP")

    assert "its network tells 10 classes apart and has no embedding" in said(run=shapes("fedobp"), client="c0")
    assert "--query: TMP/a.jpg is no file; give a picture" in said(query=tmp_path / "a.jpg")
    assert "--query: TMP/bad.jpg: not a JPEG or PNG picture" in said(query=tmp_path / "bad.jpg")
    assert "--gallery: TMP/none holds no picture to search in" in said(gallery=tmp_path / "none")
    assert "holds no picture that can be searched; the first: bad.jpg: not a" in said(gallery=tmp_path)
    assert "--gallery: TMP/a is no folder" in said(gallery=tmp_path / "a")
    for wrong in (("--top", 0), ("--out", tmp_path / "a.jpg"), ("--out", tmp_path / "no" / "a.png")):
        assert f"{wrong[0]}: " in said(*wrong)
    assert not list(tmp_path.glob("*.png"))


def test_a_ranking_is_drawn_with_hits_and_misses_framed():
    grey = np.full((40, 20, 3), 128, np.uint8)
    found = [Tile(grey, ["1"], True), Tile(grey, ["2"], False), Tile(grey, ["a name that is far too long for it"])] * 4
    with Image.open(io.BytesIO(draw_ranking(Tile(grey, ["query"]), found))) as image:
        pixels = np.asarray(image.convert("RGB"))
    colours = [tuple(int(name[i : i + 2], 16) for i in (1, 3, 5)) for name in ("#009E73", "#D55E00")]
    full, dashed = (int((pixels == colour).all(axis=2).sum()) for colour in colours)
    # A frame 4 wide around 40 x 20, four times; of the dashed ones about half of it.
    assert full == 4 * (40 * 20 - 32 * 12) and 0.4 * full < dashed < 0.7 * full


def test_the_code_of_the_page_runs(people, place, tmp_path, capsys, monkeypatch):
    for package in ("onnxruntime", "safetensors"):
        pytest.importorskip(package, reason=f"the package {package} (extra onnx) is not installed")
    name = min(taken_part(people))
    for form in ("onnx", "safetensors"):
        command(capsys, export, people, "--client", name, "--format", form, "--out", tmp_path / f"mall.{form}")
    for number, file in enumerate(sorted((place / "sites" / name / "query").iterdir())[:2]):
        shutil.copy(file, tmp_path / ("a.jpg", "b.jpg")[number])
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "trained-models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "trained-models.md", "exec"), names)
    model = trained.load(people, name, QUIET)
    expected = model.network()(model.variables, names["pictures"])
    np.testing.assert_allclose(names["embeddings"], expected, atol=2e-6)
    assert f"{expected[0] @ expected[1]:.3f}" in capsys.readouterr().out
