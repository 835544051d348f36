from __future__ import annotations

import base64
import doctest
import io
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedklpr_jax import figures, panels, plots, report_sections
from fedklpr_jax.errors import InputError
from fedklpr_jax.figures import LIGHT, Bars, Curve, Panel, Plot, client_styles, draw
from fedklpr_jax.metrics import MetricsLog, write_json
from fedklpr_jax.plots import idle_epochs, run_plots
from fedklpr_jax.report import write_report
from fedklpr_jax.report_pictures import ClassifiedPictures, RankedList

EVIL = "<script>alert('$x^$')</script>"
PANELS = ["Accuracy per round", "Accuracy against bytes exchanged", "Density", "Aggregation weights",
          "Validation scores", "Training loss", "Ranked lists", "Refused", "Notes", "Run it again"]
UNSUPERVISED_PANELS = ["From start to end", "Pseudo labels", "Time per round", "Epochs without a cluster"]


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


def _has(text: str, panel: str) -> bool:
    return f"<b>{panel}</b>" in text or f"<h2>{panel}</h2>" in text


def _unsupervised_events() -> list[dict]:
    """Two rounds of two epochs; `EVIL` finds no cluster in round 0, epoch 1, `b` none at all in round 1."""
    nothing = {"clusters": [0, 0], "clustered": [0.0, 0.0], "purity": [None, None], "steps": 0, "loss": None}
    first = {"clusters": [20, 0], "clustered": [0.9, 0.0], "purity": [0.8, None], "steps": 5, "loss": 2.0}
    then = {"clusters": [24, 25], "clustered": [0.95, 1.0], "purity": [0.85, 0.9], "steps": 9, "loss": 1.5}
    split = {"embedding": 2.0, "clustering": 1.0, "training": 6.0, "pruning": 0.5, "aggregation": 0.25, "wire": 0.25}
    return [
        {"event": "round", "round": 0, "clients": {EVIL: first, "b": then}, "refused": [],
         "split": {**split, "training": 90.0}},
        {"event": "round", "round": 1, "clients": {EVIL: then, "b": nothing}, "refused": [], "split": split},
    ]


def _unsupervised_run(directory: Path, events: list[dict], **summary: object) -> Path:
    start = {"clients": {EVIL: {"rank1": 0.4, "map": 0.2}, "b": {"rank1": 0.3, "map": 0.15}},
             "mean": {"rank1": 0.35, "map": 0.175}}
    validation = {"clients": {EVIL: 0.3, "b": 0.1}, "mean": 0.2}
    return _run(directory, events, **{"after": None, "start": start, "before_last_round": None, "failures": [],
                                      "validation": validation, **summary})


def test_examples_in_the_docs():
    for module in (figures, panels, plots, report_sections):
        assert doctest.testmod(module).failed == 0


def test_every_panel_is_there(full):
    text = full.read_text()
    for panel in PANELS:
        assert _has(text, panel), panel
    assert "FedKLPR on re-ID" in text and "seed 7" in text and "python run.py &#x27;--name=a b&#x27;" in text
    assert "After local fine-tuning" in text and "62.5" in text and "3.0 MB" in text and "25.0 %" in text
    assert text.count("bad &lt;b&gt;") == 1 and "round 0" in text


def test_panels_without_data_are_left_out(tmp_path):
    events = [{"event": "round", "round": 0, "clients": {"b": {"loss": 1.0}}, "refused": []}]
    path = write_report(_run(tmp_path, events, refused=[], notes=[], after=None, saving=None), {"b": []})
    write_json(tmp_path / "config.json", {})
    text = write_report(tmp_path, {}).read_text()
    assert path == tmp_path / "report.html"
    for panel in PANELS + UNSUPERVISED_PANELS:
        assert _has(text, panel) == (panel == "Training loss"), panel
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


def test_equal_runs_give_equal_bytes_and_empty_entries_change_none(full, tmp_path):
    empty = {"start": None, "before_last_round": None, "failures": [], "validation": None}
    again = write_report(_run(tmp_path, _events(), **empty), _ranked())
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
    assert plots["Density"].marks == {EVIL: {0: "accepted", 1: "rejected"}, "b": {}}
    assert [panel.ylabel for panel in plots["Aggregation weights"].panels] == ["KLAW a (nat)", "PRAW b", "final weight"]
    # A null (a loss that was no number) is no point.
    assert len(plots["Training loss"].panels[0].curves) == 1


def test_sections_of_a_supervised_run_stay_as_they_were(full):
    text = full.read_text()
    assert re.findall("<h2>([^<]*)</h2>", text) == [
        "Course of the run", "Ranked lists", "Refused", "Notes", "Run it again", "Configuration"]
    assert re.findall("<figcaption><b>([^<]*)</b>", text) == PANELS[:6]
    assert 'role="alert"' not in text and "start" not in text.split("<body>")[1]


def test_an_unsupervised_run_has_its_panels(tmp_path):
    text = write_report(_unsupervised_run(tmp_path, _unsupervised_events()), {}).read_text()
    for panel in UNSUPERVISED_PANELS:
        assert _has(text, panel), panel
    assert "mean mAP: start 17.5 % → 25.0 %" in text
    assert "<script" not in text and "Before the last round" not in text and 'role="alert"' not in text
    listed = re.search("<h2>Epochs without a cluster</h2>.*?</ul>", text).group()
    assert re.findall("<li>(.*?)</li>", listed) == [
        "&lt;script&gt;alert(&#x27;$x^$&#x27;)&lt;/script&gt;: round 0, epoch 1", "b: round 1, epochs 0, 1"]


def _stage_cells(text: str) -> list[list[str]]:
    section = re.search("<h2>From start to end</h2>.*?</table>", text).group()
    return [re.findall("<t[dh][^>]*>([^<]*)<", line) for line in re.findall("<tr>.*?</tr>", section)]


def test_start_end_and_held_out_images_by_hand(tmp_path):
    cells = _stage_cells(write_report(_unsupervised_run(tmp_path, []), {}).read_text())
    assert cells == [
        ["", "Start (%)", "End (%)", "Change", "Held-out training images"],
        ["Client", "Rank-1", "mAP", "Rank-1", "mAP", "mAP (points)", "mAP (%)"],
        [escape(EVIL), "40.0", "20.0", "50.0", "25.0", "+5.0", "30.0"],
        ["b", "30.0", "15.0", "50.0", "25.0", "+10.0", "10.0"],
        ["mean", "35.0", "17.5", "50.0", "25.0", "+7.5", "20.0"],
    ]


def test_result_before_the_last_round_and_missing_numbers(tmp_path):
    before = {"clients": {"b": {"map": 0.5}}, "mean": {"map": 0.5}}
    cells = _stage_cells(write_report(_unsupervised_run(
        tmp_path, [], before_last_round=before, validation=None, start={"clients": {}, "mean": {"map": 0.5}},
    ), {}).read_text())
    assert cells[0] == ["", "Start (%)", "Before the last round (%)", "End (%)", "Change"]
    assert cells[2] == [escape(EVIL), "-", "-", "-", "-", "50.0", "25.0", "-"]
    assert cells[4] == ["mean", "-", "50.0", "-", "50.0", "50.0", "25.0", "-25.0"]


def test_failures_stand_above_all_numbers(tmp_path):
    failures = ["fewer than half of the images clustered at the end (0.41)", "mAP <b>31.0 %</b> is no better"]
    body = write_report(_unsupervised_run(tmp_path, [], failures=failures), {}).read_text().split("<body>")[1]
    banner = re.search('<div class="card failed" role="alert">.*?</div>', body)
    assert banner.end() < body.index('class="tiles"')
    assert re.findall("<li>(.*?)</li>", banner.group()) == [escape(text) for text in failures]


def test_epochs_are_points_of_their_rounds_and_gaps_stay_gaps():
    found = {plot.title: plot for plot in run_plots(_unsupervised_events(), client_styles([EVIL, "b", "absent"]))}
    purity, clusters, clustered = found["Pseudo labels"].panels
    curves = [(list(curve.x), [round(value, 6) for value in curve.y], curve.style.colour) for curve in purity.curves]
    one, two = figures.COLOURS[:2]
    assert curves == [([0.0], [80.0], one), ([1.0, 1.5], [85.0, 90.0], one), ([0.0, 0.5], [85.0, 90.0], two)]
    assert [(list(curve.x), list(curve.y)) for curve in clusters.curves] == [
        ([0.0, 0.5, 1.0, 1.5], [20, 0, 24, 25]), ([0.0, 0.5, 1.0, 1.5], [24, 25, 0, 0])]
    assert [list(curve.y) for curve in clustered.curves] == [[90.0, 0.0, 95.0, 100.0], [95.0, 100.0, 0.0, 0.0]]
    assert found["Pseudo labels"].marks == {
        EVIL: {0.5: "no cluster"}, "b": {1.0: "no cluster", 1.5: "no cluster"}, "absent": {}}
    # Entries per epoch are no numbers of the round; those beside them still are.
    assert [list(curve.y) for curve in found["Training loss"].panels[0].curves] == [[2.0, 1.5], [1.5]]
    assert idle_epochs(_unsupervised_events()) == [(EVIL, 0, 1), ("b", 1, 0), ("b", 1, 1)]


def test_no_rows_of_marks_without_an_idle_epoch_and_none_of_a_list_is_left_out():
    rounds = [{"event": "round", "round": 0, "clients": {"b": {"clusters": [3], "purity": None}}}]
    (plot,) = run_plots(rounds, client_styles(["b"]))
    assert not plot.marks and [panel.ylabel for panel in plot.panels] == ["clusters"]


def test_time_split_is_stacked_and_its_mean_leaves_out_compilation():
    found = {plot.title: plot for plot in run_plots(_unsupervised_events(), client_styles([EVIL, "b"]))}
    plot = found["Time per round"]
    assert [(bars.label, list(bars.y)) for bars in plot.panels[0].bars] == [
        ("embedding", [2.0, 2.0]), ("clustering", [1.0, 1.0]), ("training", [90.0, 6.0]), ("pruning", [0.5, 0.5]),
        ("aggregation", [0.25, 0.25]), ("wire", [0.25, 0.25])]
    assert plot.caption == (
        "Mean without the first round, which compiles: embedding 2.0 s (20 %), clustering 1.0 s (10 %), "
        "training 6.0 s (60 %), pruning 0.5 s (5 %), aggregation 0.2 s (2 %), wire 0.2 s (2 %).")
    assert len({bars.colour for bars in plot.panels[0].bars}) == 6


def test_phases_a_round_lacks_count_as_no_time():
    rounds = [
        {"event": "round", "round": 2, "split": {"training": 3.0, "wire": 1.0, "pruning": 2.0}, "clients": {}},
        {"event": "round", "round": 1, "split": {"training": 1.0}, "clients": {}},
        {"event": "round", "round": 0, "split": {"training": 9.0, "wire": None}, "clients": {}},
        {"event": "round", "round": 3, "clients": {}},
    ]
    (plot,) = run_plots(rounds, {})
    assert [(bars.label, list(bars.x), list(bars.y)) for bars in plot.panels[0].bars] == [
        ("training", [0, 1, 2], [9.0, 1.0, 3.0]), ("pruning", [0, 1, 2], [0.0, 0.0, 2.0]),
        ("wire", [0, 1, 2], [0.0, 0.0, 1.0])]
    assert "training 2.0 s (57 %), pruning 1.0 s (29 %), wire 0.5 s (14 %)" in plot.caption
    (alone,) = run_plots(rounds[1:2], {})
    assert alone.caption == "Mean: training 1.0 s (100 %)."


def test_bars_are_drawn_in_their_colours_one_on_the_other():
    layers = [Bars([0, 1], [1.0, 1.0], "#0072B2", "below"), Bars([0, 1], [1.0, 1.0], "#E69F00", "above")]
    image = Image.open(io.BytesIO(draw(Plot("t", "c", [Panel("s", bars=layers)], "x"), LIGHT))).convert("RGB")
    pixels = np.asarray(image).astype(int)
    below, above = (np.argwhere(np.abs(pixels - colour).sum(-1) < 30) for colour in ((0, 114, 178), (230, 159, 0)))
    # The legend shows each colour once, above the axes: medians are of the bars.
    assert len(below) > 5000 and len(above) > 5000 and np.median(above[:, 0]) < np.median(below[:, 0])


def test_rows_of_marks_take_any_name(recwarn):
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


# ------------------------------------------------------------------------------------- classification, many clients
def _labelled_run(directory: Path, count: int, events: list[dict] | None = None, **summary: object) -> Path:
    """`count` clients, the k-th with an accuracy of k % before and 50 + k / 2 % after local fine-tuning."""
    names = [f"c{k:03d}" for k in range(count)]
    before = {name: {"accuracy": k / 100, "images": 10 + k, "density": 1.0} for k, name in enumerate(names)}
    after = {name: {"accuracy": 0.5 + k / 200} for k, name in enumerate(names)}
    start = {"clients": {name: {"accuracy": 0.0} for name in names}, "mean": {"accuracy": 0.0, "pooled": 0.01}}
    return _run(directory, events or [], **{
        "task": "classification", "clients": before, "mean": {"accuracy": 0.4, "pooled": 0.45, "density": 1.0},
        "after": {"clients": after, "mean": {"accuracy": 0.6, "pooled": 0.65}}, "start": start, **summary})


def _tiles(text: str) -> list[tuple[str, str, str]]:
    return re.findall('<div class="tile( big)?"><b>([^<]*)</b><span>([^<]*)</span>', text)


def test_the_big_tile_of_classification_is_the_accuracy_over_all_images(tmp_path):
    text = write_report(_labelled_run(tmp_path, 3), {}).read_text()
    assert _tiles(text)[:2] == [
        (" big", "45.0 %", escape("accuracy over all clients' test images; 65.0 % after local fine-tuning")),
        ("", "40.0 %", "mean accuracy over clients; 60.0 % after local fine-tuning")]
    assert [big for big, *_ in _tiles(text)].count(" big") == 1


def test_pooled_accuracy_is_a_note_and_no_column(tmp_path):
    text = write_report(_labelled_run(tmp_path, 3), {}).read_text()
    assert "<th>Accuracy (pooled)" not in text and ">Accuracy (pooled)<" not in text
    assert "Before local fine-tuning: 40.0 % mean accuracy over clients, 45.0 % over all their images." in text
    assert "After local fine-tuning: 60.0 % mean accuracy over clients, 65.0 % over all their images." in text


def test_the_change_of_a_classification_run_is_in_accuracy(tmp_path):
    cells = _stage_cells(write_report(_labelled_run(tmp_path, 3), {}).read_text())
    assert cells[0] == ["", "Start (%)", "End (%)", "Change"]
    assert cells[1] == ["Client", "Accuracy", "Accuracy", "Accuracy (points)"]
    assert cells[3:] == [["c001", "0.0", "1.0", "+1.0"], ["c002", "0.0", "2.0", "+2.0"],
                         ["mean", "0.0", "40.0", "+40.0"]]


def test_many_rows_fold_away_behind_their_mean_and_a_distribution(tmp_path):
    few = write_report(_labelled_run(tmp_path, 20), {}).read_text()
    assert "<details><summary>All" not in few and "Accuracy of the clients" not in few
    (tmp_path / "many").mkdir()
    many = write_report(_labelled_run(tmp_path / "many", 100), {}).read_text()
    assert many.count("<details><summary>All 100 clients</summary>") == 2
    outside = re.sub("<details>.*?</details>", "", many)
    assert "c001" not in outside and 'title="mean"' in outside
    assert many.count('<td title="c099">') == 2 and _has(many, "Accuracy of the clients")


def test_the_legend_of_many_clients_names_none(tmp_path):
    def losses(count: int) -> list[dict]:
        return [{"event": "round", "round": 0, "clients": {f"c{k}": {"loss": float(k)} for k in range(count)}}]

    text = write_report(_run(tmp_path, losses(40)), {}).read_text()
    assert "<ol" not in text and 'class="legend card soft"' in text
    (tmp_path / "few").mkdir()
    assert write_report(_run(tmp_path / "few", losses(8)), {}).read_text().count("<li><svg") == 8 + 2


def test_one_client_for_all_tests(tmp_path):
    """Centralised training: the rounds know one client, the tests have the names of the sites."""
    sent = {"down": 0, "up": 0, "total": 0, "dense_total": 0, "raw_total": 0, "per_client": {}}
    rounds = [{"event": "round", "round": number, "clients": {"all": {"loss": 1.0, "weight": 1.0}}}
              for number in range(2)]
    for count, listed in ((3, 1), (40, 0)):
        directory = tmp_path / str(count)
        directory.mkdir()
        text = write_report(_labelled_run(directory, count, rounds, bytes=sent, saving=None), {}).read_text()
        assert f"1 client, {count} tests" in text and text.count("</svg> all</li>") == listed
        assert _has(text, "Training loss") and not _has(text, "Aggregation weights")
        assert ">MB " not in text and not any("MB" in value for _, value, _ in _tiles(text))
        assert ("", "nothing", "sent") in _tiles(text)
        styles = client_styles([*(f"c{k:03d}" for k in range(count)), "all"])
        (loss,) = run_plots(rounds, styles)
        assert [(curve.style, curve.label) for curve in loss.panels[0].curves] == [
            (styles["all"], "" if listed else "all")]


def test_sites_nobody_trained_on_have_their_table(tmp_path):
    row = {"rank1": 0.25, "map": 0.125, "density": 1.0}
    text = write_report(_run(tmp_path, [], unseen={"clients": {EVIL: row}, "mean": row}), {}).read_text()
    section = re.search("<h2>Sites nobody trained on</h2>.*?</table>", text).group()
    assert [re.findall("<t[dh][^>]*>([^<]*)<", line) for line in re.findall("<tr>.*?</tr>", section)] == [
        ["", escape("The server's model (%)", quote=False)], ["Site", "Rank-1", "mAP"],
        [escape(EVIL), "25.0", "12.5"], ["mean", "25.0", "12.5"]]


def test_the_maximum_over_the_tests_stands_beside_the_last_round_of_classification_only(tmp_path):
    best = {"before": {"accuracy": 0.5, "pooled": 0.55}, "after": {"accuracy": 0.7, "pooled": 0.75}}
    text = write_report(_labelled_run(tmp_path, 3, best=best), {}).read_text()
    section = re.search("<h2>Last round and best test</h2>.*?</p>", text).group()
    rows = [re.findall("<td[^>]*>([^<]*)<", line) for line in re.findall("<tr>.*?</tr>", section)][2:]
    assert rows == [["before local fine-tuning", "45.0", "40.0", "55.0", "50.0"],
                    ["after local fine-tuning", "65.0", "60.0", "75.0", "70.0"]]
    assert "Maximum over the tests (%)" in section and "chooses the round on test data" in section
    assert "best test" not in write_report(
        _run(tmp_path, [], best={"before": {"rank1": 0.9, "map": 0.8}, "after": {}}), {}).read_text()


# ------------------------------------------------------------------------------------------------ pictures
def test_classified_pictures_tell_hit_and_miss_with_both_classes(tmp_path):
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    strips = {"c001": ClassifiedPictures(pixels, ["disc", EVIL], ["disc", "ring"])}
    text = write_report(_labelled_run(tmp_path, 3), {}, strips).read_text()
    section = text[text.index("<h2>Test pictures"):text.index("<h2>Run it again")]
    assert re.findall(r'<figure class="(\w+)"><img [^>]* title="([^"]*)"[^>]*><figcaption>([^<]*)<', section) == [
        ("hit", "predicted disc, is disc", "✓ disc"),
        ("miss", f"predicted {escape(EVIL)}, is ring", f"✗ {escape(EVIL)}\nis ring")]
    assert "1.0 % of its test pictures right" in section and section.count("data:image/png") == 2
    assert "Test pictures" not in write_report(tmp_path, {}, {}).read_text()


def test_classified_pictures_stay_within_the_budget(tmp_path):
    names = ["disc"] * 100
    strip = ClassifiedPictures(np.zeros((100, 8, 8, 3), np.uint8), names, names)
    text = write_report(_run(tmp_path, []), {}, {f"c{k}": strip for k in range(7)}).read_text()
    assert text.count('<figure class="hit">') == 240 // 7 * 7
    with pytest.raises(ValueError, match="uint8"):
        ClassifiedPictures(np.zeros((1, 8, 8, 1), np.uint8), ["disc"], ["disc"])
    with pytest.raises(ValueError, match="2 predicted and 1 right"):
        ClassifiedPictures(np.zeros((1, 8, 8, 3), np.uint8), ["disc", "disc"], ["disc"])
