from __future__ import annotations

import io
from pathlib import Path

from fedklpr_jax.console import Console


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_and_its_estimate():
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock)
    with console.progress(5, done=1) as bar:
        for seconds in (100, 10, 20):
            clock.now += seconds
            bar.advance("loss [red]1.5")
    # 100 s compiles: three rounds of it are left at first; then 10 s, then (10 + 20) / 2 s a round.
    assert out.getvalue().splitlines() == [
        "round 2/5  40% | 0:01:40 | 0:05:00 left | loss [red]1.5",
        "round 3/5  60% | 0:01:50 | 0:00:20 left | loss [red]1.5",
        "round 4/5  80% | 0:02:10 | 0:00:15 left | loss [red]1.5",
    ]


def test_live_progress_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with Console(out).progress(4) as bar:
        bar.advance("loss 1.5 " + "and much more text " * 9)
    last = out.getvalue()
    assert "\x1b[" in last and "1/4" in last and " 25 %" in last and "left" in last and "loss 1.5" in last


def _summary() -> dict:
    row = {"rank1": 0.7, "rank5": 1.0, "rank10": 1.0, "map": 0.5, "minp": 0.25, "density": 0.5}
    return {
        "clients": {"a [bold]name that is far too long for a table": row, "b": {**row, "map": None}},
        "mean": row,
        "after": {"clients": {}, "mean": {"map": 0.55}},
        "bytes": {
            "down": 1, "up": 2, "total": 12_345_678_901, "dense_total": 20_000_000_000,
            "per_client": {
                "a [bold]name that is far too long for a table": {"down": 12_345_600_000, "up": 4_000_000_000},
                "b": {"down": 0, "up": 200_000},
            },
        },
        "saving": 0.383,
    }


def test_table_fits_80_columns_and_crops_only_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    Console(out).table(_summary(), [Path("run/report.html")])
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert rows[0] == ["Client", *"Rank-1 Rank-5 Rank-10 mAP mINP Density MB down MB up".split()]
    assert rows[2][-8:] == ["70.0", "100.0", "100.0", "50.0", "25.0", "0.500", "12345.6", "4000.0"]
    assert "a [bold]name" in text and "…" in text
    assert rows[3] == ["b", "70.0", "100.0", "100.0", "-", "25.0", "0.500", "0.0", "0.2"]
    assert rows[4][-2:] == ["6172.8", "2000.1"]
    assert "mAP mean: 50.0 % before, 55.0 % after" in text
    assert "12345.7 MB; dense: 20000.0 MB; saving 38.3 %" in text
    assert "wrote run/report.html" in text


def test_table_tells_start_and_failures():
    out = io.StringIO()
    start = {"clients": {"b": {"map": 0.1}}, "mean": {"map": 0.4123}}
    failures = ["fewer than half of the images clustered at the end (0.41)", "mAP [red]31.0 % is no better"]
    Console(out).table({**_summary(), "start": start, "before_last_round": None, "failures": failures}, [Path("x")])
    lines = out.getvalue().splitlines()
    assert "mAP mean: 41.2 % at the start, 50.0 % at the end" in lines
    assert lines[-2:] == [f"failed: {text}" for text in failures]
    out = io.StringIO()
    Console(out).table({**_summary(), "start": start, "before_last_round": {"clients": {}, "mean": {"map": 0.45}}})
    assert "mAP mean: 41.2 % at the start, 45.0 % before the last round, 50.0 % at the end\n" in out.getvalue()


def test_table_of_a_supervised_run_is_as_before():
    outs = [io.StringIO(), io.StringIO()]
    empty = {"start": None, "before_last_round": None, "failures": [], "validation": None}
    for out, more in zip(outs, ({}, empty), strict=True):
        Console(out).table({**_summary(), **more})
    assert outs[0].getvalue() == outs[1].getvalue()
    assert "start" not in outs[0].getvalue() and "failed" not in outs[0].getvalue()


def test_table_of_a_run_that_sent_nothing():
    summary = {**_summary(), "after": None, "saving": None, "clients": {"b": {"rank1": 0.5}}, "mean": {"rank1": 0.5},
               "bytes": {"total": 0, "dense_total": 0, "per_client": {}}}
    out = io.StringIO()
    Console(out).table(summary)
    assert "saving" not in out.getvalue() and "before" not in out.getvalue() and "mINP" not in out.getvalue()


def _classification(count: int, **summary: object) -> dict:
    """`count` clients, the k-th with an accuracy of k %, and the mean over all their images."""
    clients = {f"c{k:02d}": {"accuracy": k / 100, "images": 10, "density": 1.0} for k in range(count)}
    return {"clients": clients, "mean": {"accuracy": 0.8394, "pooled": 0.8451, "density": 1.0}, "after": None,
            "saving": None, "bytes": {"down": 0, "up": 0, "total": 0, "dense_total": 0, "per_client": {}}, **summary}


def _printed(summary: dict) -> list[str]:
    out = io.StringIO()
    Console(out).table(summary)
    return out.getvalue().splitlines()


def test_pooled_accuracy_is_no_column_and_stands_beside_the_mean():
    after = {"clients": {}, "mean": {"accuracy": 0.9, "pooled": 0.91}}
    best = {"before": {"accuracy": 0.85, "pooled": 0.86}, "after": {"accuracy": 0.92, "pooled": 0.93}}
    start = {"clients": {}, "mean": {"accuracy": 0.1, "pooled": 0.11}}
    lines = _printed(_classification(2, after=after, best=best, start=start))
    assert lines[1].split() == ["Client", "Accuracy", "Density"]
    assert "before local fine-tuning: 83.9 % mean accuracy over clients, 84.5 % over all their images" in lines
    assert "after local fine-tuning: 90.0 % mean accuracy over clients, 91.0 % over all their images" in lines
    assert "accuracy over all images: 11.0 % at the start, 84.5 % at the end" in lines
    assert ("accuracy over all images, maximum over the tests (chooses the round on test data): 86.0 % before, "
            "93.0 % after") in lines


def test_the_maximum_over_the_tests_of_a_re_id_run_is_not_told():
    best = {"before": {"rank1": 0.9, "map": 0.8}, "after": {"map": 0.9}}
    assert not any("maximum" in line for line in _printed({**_summary(), "best": best}))


def test_of_many_clients_the_best_and_the_worst_are_shown():
    lines = _printed(_classification(40))
    rows = [line.split() for line in lines if line.startswith(" c") or line.startswith(" mean")]
    assert [row[0] for row in rows] == ["c39", "c38", "c37", "c02", "c01", "c00", "mean"]
    assert "34 are left out here" in "".join(lines)
    few = _printed(_classification(20))
    assert len([line for line in few if line.startswith(" c")]) == 20 and "left out" not in "".join(few)


def test_sites_nobody_trained_on_have_a_table_of_their_own():
    row = {"rank1": 0.25, "map": 0.125, "density": 1.0}
    lines = _printed({**_summary(), "unseen": {"clients": {"viper": row}, "mean": row}})
    below = lines[lines.index("sites nobody trained on, the server's model:"):]
    assert below[2].split() == ["Client", "Rank-1", "mAP", "Density"]
    assert [line.split() for line in below if "viper" in line] == [["viper", "25.0", "12.5", "1.000"]]
    assert not any("nobody" in line for line in _printed({**_summary(), "unseen": None}))


def test_a_run_that_sent_nothing_has_no_columns_of_bytes():
    lines = _printed(_classification(3))
    assert lines[1].split() == ["Client", "Accuracy", "Density"] and "sent: nothing" in lines
