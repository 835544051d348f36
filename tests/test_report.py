from __future__ import annotations

import base64
import doctest
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedklpr_jax import figures
from fedklpr_jax.errors import InputError
from fedklpr_jax.figures import LIGHT, Curve, Panel, Plot, client_styles, draw, run_plots
from fedklpr_jax.metrics import MetricsLog, write_json
from fedklpr_jax.report import RankedList, write_report

EVIL = "<script>alert('$x^$')</script>"
PANELS = ["Accuracy per round", "Accuracy against bytes exchanged", "Density", "Aggregation weights",
          "Validation scores", "Training loss", "Ranked lists", "Refused", "Notes", "Run it again"]


def _run(directory: Path, events: list[dict], **summary: object) -> Path:
    with MetricsLog.open(directory / "metrics.jsonl") as log:
        for event in events:
            log.write(event)
    write_json(directory / "config.json", {"command": ["python", "run.py", "--name=a b"], "key": EVIL})
    row = {"rank1": 0.5, "map": 0.25, "density": 0.75}
    write_json(directory / "summary.json", {
        "method": "FedKLPR", "task": "re-ID", "seed": 7, "rounds": 2, "seconds": 60, "clients": {EVIL: row, "b": row},
        "mean": row, "after": {"clients": {EVIL: {"rank1": 0.625}}, "mean": {"rank1": 0.625}},
        "bytes": {"down": 2_000_000, "up": 1_000_000, "total": 3_000_000, "dense_total": 4_000_000,
                  "raw_total": 5_000_000, "per_client": {EVIL: {"down": 2_000_000, "up": 1_000_000}}},
        "saving": 0.25, "refused": [{"client": EVIL, "reason": "bad <b>"}], "notes": ["note 1"], **summary})
    return directory


def _events() -> list[dict]:
    client = {"loss": 1.0, "density": 0.9, "weight": 0.5, "klaw": 0.01, "praw": 1.1, "decision": "accepted",
              "score_download": 0.3, "score_current": 0.4, "score_candidate": 0.35}
    result = {"rank1": 0.5, "map": 0.25}
    evaluation = {"event": "eval", "round": 1, "clients": {EVIL: result}, "mean": result, "bytes_total": 10**6}
    return [
        {"event": "note", "text": f"skipped {EVIL}"},
        {"event": "round", "round": 0, "seconds": 1, "clients": {EVIL: client, "b": {"loss": None}},
         "refused": [{"client": EVIL, "reason": "bad <b>"}]},
        {"event": "round", "round": 1, "clients": {EVIL: {**client, "decision": "rejected"}}, "refused": []},
        {**evaluation, "stage": "before"},
        {**evaluation, "stage": "after"},
    ]


def _ranked(count: int = 1) -> dict[str, list[RankedList]]:
    pixels = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3)
    entry = RankedList(pixels, np.stack([pixels, pixels]), np.array([True, False]), EVIL, ["g0", "g1"])
    return {EVIL: [entry] * count}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return write_report(_run(tmp_path_factory.mktemp("run"), _events()), _ranked())


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def _parse(path: Path) -> _Tags:
    parser = _Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def test_examples_in_the_docs():
    assert doctest.testmod(figures).failed == 0


def test_every_panel_is_there(full):
    text = full.read_text()
    for panel in PANELS:
        assert f"<b>{panel}</b>" in text or f"<h2>{panel}</h2>" in text, panel
    assert "FedKLPR on re-ID" in text and "seed 7" in text and "python run.py &#x27;--name=a b&#x27;" in text
    assert "After local fine-tuning" in text and "62.5" in text and "3.0 MB" in text and "25.0 %" in text
    assert text.count("bad &lt;b&gt;") == 1 and "round 0" in text


def test_panels_without_data_are_left_out(tmp_path):
    events = [{"event": "round", "round": 0, "clients": {"b": {"loss": 1.0}}, "refused": []}]
    path = write_report(_run(tmp_path, events, refused=[], notes=[], after=None, saving=None), {"b": []})
    write_json(tmp_path / "config.json", {})
    text = write_report(tmp_path, {}).read_text()
    assert path == tmp_path / "report.html"
    for panel in PANELS:
        assert (f"<b>{panel}</b>" in text or f"<h2>{panel}</h2>" in text) == (panel == "Training loss"), panel
    assert "After local" not in text and "saved against" not in text


def test_a_run_without_any_event(tmp_path):
    assert "Course of the run" not in write_report(_run(tmp_path, []), {}).read_text()


def test_nothing_is_loaded_from_elsewhere(full):
    parser = _parse(full)
    text = full.read_text()
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    loads = [value for _, attrs in parser.tags for key, value in attrs.items()
             if key in ("src", "srcset", "href", "data", "action", "xlink:href")]
    assert len(loads) == 2 * 6 + 3
    assert all(value.startswith("data:image/") for value in loads)
    assert not {tag for tag, _ in parser.tags} & {"script", "link", "iframe", "object", "embed"}
    assert any(attrs.get("content") == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
               for _, attrs in parser.tags)


def test_names_are_escaped_but_readable(full):
    parser = _parse(full)
    assert "<script" not in full.read_text()
    # table, legend, ranked list, refused, note, config
    assert parser.text.count(EVIL) >= 6
    assert any(attrs.get("title") == EVIL for tag, attrs in parser.tags if tag == "img")
    assert not any(key.startswith("on") for _, attrs in parser.tags for key in attrs)


def test_hits_and_misses_are_marked_by_more_than_colour(full):
    text = full.read_text()
    assert re.findall(r'<figure class="(\w+)"><img [^>]*><figcaption>([^<]*)<', text) == [
        ("query", "query"), ("hit", "✓ 1"), ("miss", "✗ 2")]


def test_equal_runs_give_equal_bytes(full, tmp_path):
    again = write_report(_run(tmp_path, _events()), _ranked())
    assert again.read_bytes() == full.read_bytes()


def test_figures_decode_and_themes_differ(full):
    uri = 'data:image/png;base64,([^"]*)"'
    found = re.findall(f'srcset="{uri}><img src="{uri}', full.read_text())
    assert len(found) == 6
    for dark, light in found:
        pictures = [Image.open(io.BytesIO(base64.b64decode(data))).convert("L") for data in (dark, light)]
        assert pictures[0].getpixel((1, 1)) < 60 and pictures[1].getpixel((1, 1)) > 240


def test_ranked_lists_stay_within_the_budget(tmp_path):
    path = write_report(_run(tmp_path, []), _ranked(500))
    text = path.read_text()
    assert text.count('class="query"') == 80 and "420 more queries were left out" in text


def test_a_client_keeps_its_colour_and_marker():
    styles = client_styles([f"c{number}" for number in range(40)])
    assert len(set(styles.values())) == 40
    plots = run_plots(_events(), client_styles(["b", EVIL]))
    seen = {curve.style for plot in plots for panel in plot.panels for curve in panel.curves if curve.style}
    assert seen == {client_styles(["b", EVIL])[EVIL]}


def test_values_and_units_of_the_curves():
    plots = {plot.title: plot for plot in run_plots(_events(), client_styles([EVIL, "b"]))}
    megabytes = plots["Accuracy against bytes exchanged"]
    assert megabytes.xlabel == "MB exchanged"
    assert [(curve.x, curve.y, curve.label) for curve in megabytes.panels[0].curves] == [
        ([1.0], [50.0], "Rank-1"), ([1.0], [25.0], "mAP")]
    assert plots["Density"].decisions == {EVIL: {0: "accepted", 1: "rejected"}, "b": {}}
    assert [panel.ylabel for panel in plots["Aggregation weights"].panels] == ["KLAW a (nat)", "PRAW b", "final weight"]
    # A null (a loss that was no number) is no point.
    assert len(plots["Training loss"].panels[0].curves) == 1


def test_decision_rows_take_any_name(recwarn):
    panel = Panel("y", [Curve([0], [1.0])])
    names = [EVIL, "$\\frac{$", "行人", "_hidden", ""]
    for count in (1, 60):
        rows = {f"{name}{number}": {0: "halted"} for number in range(count) for name in names}
        image = Image.open(io.BytesIO(draw(Plot("t", "c", [panel], "x", rows), LIGHT)))
        assert image.width == 960 and image.height < 3000
    assert not recwarn.list


def test_broken_run_directories_are_named(tmp_path):
    with pytest.raises(InputError, match="config.json: no such file"):
        write_report(tmp_path, {})
    _run(tmp_path, [])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="summary.json: is not JSON"):
        write_report(tmp_path, {})
    (tmp_path / "summary.json").write_text(json.dumps([]))
    with pytest.raises(InputError, match="summary.json: holds no JSON object"):
        write_report(tmp_path, {})


def test_ranked_list_refuses_what_does_not_fit():
    pixels = np.zeros((8, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="uint8"):
        RankedList(pixels.astype(float), pixels[None], np.array([True]), "q", ["g"])
    with pytest.raises(ValueError, match=r"\[h, w, 3\]"):
        RankedList(pixels, pixels, np.array([True]), "q", ["g"])
    with pytest.raises(ValueError, match="2 names"):
        RankedList(pixels, pixels[None], np.array([True]), "q", ["g", "h"])
