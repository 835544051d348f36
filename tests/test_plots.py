"""Figures of many clients, of classification and of what single methods log; test_report.py has the others."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fedklpr_jax import figures
from fedklpr_jax.figures import LIGHT, client_styles, draw
from fedklpr_jax.panels import MANY
from fedklpr_jax.plots import distribution, run_plots


def test_the_distribution_by_hand():
    clients = {f"c{k}": {"accuracy": k / 20} for k in range(21)}
    after = {"clients": {name: {"accuracy": 0.99} for name in clients}}
    (plot,) = distribution({"clients": clients, "mean": {"accuracy": 0.5}, "after": after})
    before, later = (panel.bars[0] for panel in plot.panels)
    # Every bar holds its lower edge and the last one 100 % too.
    assert before.x[0] == 2.5 and before.y == [1] * 19 + [2] and later.y == [0] * 19 + [21]
    assert "before local fine-tuning 0.0 to 100.0 %, median 50.0 %" in plot.caption
    people = {f"c{k}": {"map": 0.5} for k in range(21)}
    (plot,) = distribution({"clients": people, "mean": {"map": 0.5}})
    assert plot.title == "mAP of the clients" and len(plot.panels) == 1
    assert not distribution({"clients": dict(list(people.items())[:20]), "mean": {"map": 0.5}})


def _many_rounds(count: int = 40, rounds: int = 2) -> tuple[list[dict], dict[str, figures.Style]]:
    """Client k has a loss of k and was pruned in every round where k is even, halted where it is odd."""
    clients = {
        f"c{k}": {"loss": float(k), "weight": 1 / count, "density": 0.5, "decision": "halted" if k % 2 else "accepted"}
        for k in range(count)
    }
    events = [{"event": "round", "round": number, "clients": clients} for number in range(rounds)]
    return events, client_styles(list(clients))


def test_many_clients_are_bands_with_a_thick_mean():
    events, styles = _many_rounds(41)
    found = {plot.title: plot for plot in run_plots(events, styles)}
    (panel,) = found["Training loss"].panels
    assert [(band.label, list(band.low), list(band.high), band.strong) for band in panel.bands] == [
        ("all clients", [0.0, 0.0], [40.0, 40.0], False), ("middle half", [10.0, 10.0], [30.0, 30.0], True)]
    assert [(curve.label, curve.style, list(curve.y)) for curve in panel.curves] == [("mean", None, [20.0, 20.0])]
    assert found["Aggregation weights"].panels[0].bands
    events, styles = _many_rounds(MANY)
    (loss,) = (plot for plot in run_plots(events, styles) if plot.title == "Training loss")
    assert not loss.panels[0].bands and len(loss.panels[0].curves) == MANY


def test_decisions_of_many_clients_are_counted():
    events, styles = _many_rounds(41)
    (density,) = (plot for plot in run_plots(events, styles) if plot.title == "Density")
    assert not density.marks and density.panels[1].ylabel == "clients"
    assert [(bars.label, list(bars.x), list(bars.y)) for bars in density.panels[1].bars] == [
        ("accepted", [0, 1], [21, 21]), ("halted", [0, 1], [20, 20])]


def test_bands_are_drawn_also_over_one_round(recwarn):
    for rounds in (1, 3):
        events, styles = _many_rounds(30, rounds)
        (plot,) = (plot for plot in run_plots(events, styles) if plot.title == "Training loss")
        image = Image.open(io.BytesIO(draw(plot, LIGHT))).convert("RGB")
        pixels = np.asarray(image).astype(int)
        shades = [(pixels[..., 2] - pixels[..., 0] > least).sum() for least in (30, 90)]
        assert shades[0] > shades[1] > 500, rounds
    assert not recwarn.list


def test_accuracy_of_all_images_is_the_thick_curve():
    row = {"c0": {"accuracy": 0.25}, "c1": {"accuracy": 0.75}}
    mean = {"accuracy": 0.5, "pooled": 0.625}
    event = {"event": "eval", "round": 2, "clients": row, "mean": mean, "bytes_total": 2e6}
    found = {plot.title: plot for plot in run_plots(
        [{**event, "stage": "before"}, {**event, "stage": "after"}], client_styles(["c0", "c1"]))}
    curves = found["Accuracy per round"].panels[0].curves
    assert [(curve.label, list(curve.y)) for curve in curves if curve.style is None] == [
        ("all images before", [62.5]), ("all images after", [62.5])]
    assert [list(curve.y) for curve in found["Accuracy against bytes exchanged"].panels[0].curves] == [[62.5]]


def _round_facts(**facts: list[object]) -> list[dict]:
    """A round a position; the entries of `facts` are (of client a, of client b)."""
    length = len(next(iter(facts.values())))
    return [
        {"event": "round", "round": number,
         "clients": {name: {key: values[number][place] for key, values in facts.items()}
                     for place, name in enumerate("ab")}}
        for number in range(length)
    ]


def test_facts_of_single_methods_have_panels():
    events = _round_facts(personal=[(0.0, 0.25), (0.5, 0.75)], cdw=[(0.1, 0.2), (0.3, 0.4)], weight=[(0.5, 0.5)] * 2)
    found = {plot.title: plot for plot in run_plots(events, client_styles(["a", "b"]))}
    assert [list(curve.y) for curve in found["Own elements"].panels[0].curves] == [[0.0, 50.0], [25.0, 75.0]]
    distances, weights = found["Aggregation weights"].panels
    assert distances.ylabel == "CDW d (1 - cos)" and [list(curve.y) for curve in distances.curves] == [
        [0.1, 0.3], [0.2, 0.4]]
    assert weights.ylabel == "final weight"


def test_clusters_of_clients_are_marks_or_counts():
    events = _round_facts(cluster=[(0.0, 1.0), (0.0, 0.0), (0.0, -1.0)])
    (plot,) = run_plots(events, client_styles(["a", "b"]))
    assert plot.title == "Clusters of clients" and list(plot.panels[0].curves[0].y) == [2, 1, 1]
    assert plot.marks == {"a": {0: "cluster 1", 1: "cluster 1", 2: "cluster 1"}, "b": {0: "cluster 2", 1: "cluster 1"}}
    assert all(mark in figures.MARKS for row in plot.marks.values() for mark in row.values())
    draw(plot, LIGHT)
    of_many = {f"c{k}": {"cluster": 0.0 if k < 10 else float(k // 10)} for k in range(40)}
    (plot,) = run_plots([{"event": "round", "round": 0, "clients": of_many}], client_styles(list(of_many)))
    assert not plot.marks and [list(panel.curves[0].y) for panel in plot.panels] == [[4], [25.0]]


def test_training_seconds_by_capacity_leave_out_compilation():
    seconds = [(90.0, 80.0), (4.0, 2.0), (6.0, 2.0)]
    (plot,) = run_plots(_round_facts(train_seconds=seconds), client_styles(["a", "b"]))
    assert [(list(curve.x), list(curve.y)) for curve in plot.panels[0].curves] == [
        ([1, 2], [4.0, 6.0]), ([1, 2], [2.0, 2.0])]
    events = _round_facts(train_seconds=seconds, capacity=[(1.0, 0.5)] * 3)
    (plot,) = run_plots(events, client_styles(["a", "b"]))
    assert [(curve.label, list(curve.y)) for curve in plot.panels[0].curves] == [
        ("capacity 1", [4.0, 6.0]), ("capacity 0.5", [2.0, 2.0])]
    assert plot.caption.endswith(": 1 5.00 s, 0.5 2.00 s.")
