"""The parts of a report that are text and tables, as HTML; each is empty for a run without its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedklpr_jax.metrics import METRIC_TITLES, MOST_ROWS, accuracy_note, headline_metric, known_metrics, mean, show
from fedklpr_jax.plots import idle_epochs


def failures(summary: Mapping[str, Any]) -> str:
    """A banner with what the run fell short of.

    Args:
        summary: what `summary.json` holds.
    """
    items = "".join(f"<li>{escape(str(text))}</li>" for text in summary.get("failures") or [])
    return f'<div class="card failed" role="alert"><b>✗ This run failed</b><ul>{items}</ul></div>' if items else ""


def tiles(summary: Mapping[str, Any]) -> str:
    """The numbers to see first: accuracy over all images and over clients (mAP with the one it started from), density,
    megabytes.

    Args:
        summary: what `summary.json` holds.
    """
    result, sent = summary["mean"], summary["bytes"]
    after = _stage(summary, "after")[1]
    shown = []
    for key, label in (
        ("pooled", "accuracy over all clients' test images"), ("accuracy", "mean accuracy over clients"),
        ("rank1", "mean Rank-1"), ("map", "mean mAP"),
    ):
        if result.get(key) is not None:
            start = _stage(summary, "start")[1].get("map") if key == "map" else None
            if start is not None:
                label = f"mean mAP: start {show(start, 100)} % → {show(result['map'], 100)} %"
            if key in ("pooled", "accuracy") and after.get(key) is not None:
                label += f"; {show(after[key], 100)} % after local fine-tuning"
            shown.append((f"{show(result[key], 100)} %", label, key == "pooled"))
    if result.get("density") is not None:
        shown.append((show(result["density"], digits=3), "mean density", False))
    if sent["total"]:
        directions = f"sent ({show(sent['down'], 1e-6)} down, {show(sent['up'], 1e-6)} up)"
        shown.append((f"{show(sent['total'], 1e-6)} MB", directions, False))
        shown.append((f"{show(sent['dense_total'], 1e-6)} MB", "the same messages, dense", False))
    else:
        shown.append(("nothing", "sent", False))
    if summary.get("saving") is not None:
        shown.append((f"{show(summary['saving'], 100)} %", "saved against dense", False))
    return '<div class="tiles">' + "".join(
        f'<div class="tile{" big" if big else ""}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label, big in shown
    ) + "</div>"


_Stage = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Any]]


def _stage(summary: Mapping[str, Any], key: str) -> _Stage:
    """Results per client and their mean of an entry of the summary; empty for none."""
    entry = summary.get(key) or {}
    return entry.get("clients") or {}, entry.get("mean") or {}


_Groups = Sequence[tuple[str, Sequence[str]]]
_Rows = Sequence[tuple[str, Sequence[Sequence[str]]]]


def _html_table(groups: _Groups, rows: _Rows, head: str = "Client", means: int = 1) -> str:
    """Groups of columns (title, title of each column) over rows (name, cells of each group); the last are means."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        # A line marks where a group of columns begins.
        return "".join(f'<{tag} class="first">{text}</{tag}>' if place == 0 else f"<{tag}>{text}</{tag}>"
                       for place, text in enumerate(texts))

    top = "".join(f'<th colspan="{len(titles)}" class="group first">{title}</th>' for title, titles in groups)
    lines = [
        f'<tr><td title="{escape(name)}">{escape(name)}</td>{"".join(cells("td", texts) for texts in of)}</tr>'
        for name, of in rows
    ]
    body = len(lines) - means
    return (
        f'<div class="card scroll"><table><thead><tr><td></td>{top}</tr>'
        f'<tr><th>{head}</th>{"".join(cells("th", titles) for _, titles in groups)}</tr></thead>'
        f"<tbody>{''.join(lines[:body])}</tbody><tfoot>{''.join(lines[body:])}</tfoot></table></div>"
    )


def _client_table(groups: _Groups, rows: _Rows) -> str:
    """A table whose last row is the mean; of many clients only this row, and all of them folded away below it."""
    whole = _html_table(groups, rows)
    if len(rows) - 1 <= MOST_ROWS:
        return whole
    title = f"All {len(rows) - 1} clients"
    return f"{_html_table(groups, rows[-1:])}<details><summary>{title}</summary>{whole}</details>"


def table(summary: Mapping[str, Any]) -> str:
    """The result: a row per client and their mean, with accuracy, density and megabytes.

    Args:
        summary: what `summary.json` holds.
    """
    clients, sent = summary["clients"], summary["bytes"].get("per_client") or {}
    of_end = (clients, summary["mean"])
    stages = {"Before local fine-tuning": of_end, "After local fine-tuning": _stage(summary, "after")}
    shown = [(title, of, keys) for title, of in stages.items() if (keys := known_metrics(of[0], {"": of[1]}))]
    with_density = any(row.get("density") is not None for row in clients.values())
    ways = ("down", "up") if sent else ()

    def row(
        name: str, results: Sequence[Mapping[str, Any]], density: float | None, sizes: Mapping[str, float | None]
    ) -> tuple[str, list[list[str]]]:
        cells = [[show(result.get(key), 100) for key in keys]
                 for (_, _, keys), result in zip(shown, results, strict=True)]
        size = [*([show(density, digits=3)] if with_density else []), *(show(sizes.get(way), 1e-6) for way in ways)]
        return name, [*cells, *([size] if size else [])]

    groups = [(f"{title} (%)", [METRIC_TITLES[key] for key in keys]) for title, _, keys in shown]
    titles = [*(["Density"] if with_density else []), *(f"MB {way}" for way in ways)]
    rows = [
        row(name, [of[0].get(name, {}) for _, of, _ in shown], result.get("density"), sent.get(name, {}))
        for name, result in clients.items()
    ]
    means = {way: mean([counts[way] for counts in sent.values()]) for way in ways}
    rows.append(row("mean", [of[1] for _, of, _ in shown], summary["mean"].get("density"), means))
    notes = [f"{title}: {note}." for title, of in stages.items() if (note := accuracy_note(of[1]))]
    below = f'<p class="soft">{" ".join(notes)}</p>' if notes else ""
    return _client_table([*groups, *([("Size", titles)] if titles else [])], rows) + below


def unseen(summary: Mapping[str, Any]) -> str:
    """The server's model on sites of no client; empty for none.

    Args:
        summary: what `summary.json` holds.
    """
    clients, result = _stage(summary, "unseen")
    if not clients:
        return ""
    keys = known_metrics(clients, {"": result})
    rows = [(name, [[show(row.get(key), 100) for key in keys]]) for name, row in [*clients.items(), ("mean", result)]]
    table = _html_table([("The server's model (%)", [METRIC_TITLES[key] for key in keys])], rows, "Site")
    return f"<h2>Sites nobody trained on</h2>{table}"


def best(summary: Mapping[str, Any]) -> str:
    """The last round beside the maximum over the tests of the run, for classification; empty for other runs.

    Args:
        summary: what `summary.json` holds.
    """
    maxima = summary.get("best") or {}
    last = {"before": summary["mean"], "after": _stage(summary, "after")[1]}
    keys = ("pooled", "accuracy")
    rows = [
        (f"{stage} local fine-tuning", [[show(row.get(key), 100) for key in keys] for row in (end, maxima[stage])])
        for stage, end in last.items() if accuracy_note(maxima.get(stage, {}))
    ]
    if not rows:
        return ""
    titles = ["over all images", "mean over clients"]
    groups = [("Last round (%)", titles), ("Maximum over the tests (%)", titles)]
    note = ("Maximum over the tests: the papers' convention, which chooses the round on test data; here for each "
            "number alone.")
    return f'<h2>Last round and best test</h2>{_html_table(groups, rows, "Accuracy", 0)}<p class="soft">{note}</p>'


def stages(summary: Mapping[str, Any]) -> str:
    """How far the run came from its starting weights: their test result, the one before the last round, the end's.

    Args:
        summary: what `summary.json` holds.
    """
    end = (summary["clients"], summary["mean"])
    earlier = {"Start (%)": _stage(summary, "start"), "Before the last round (%)": _stage(summary, "before_last_round")}
    held_out = summary.get("validation") or {}
    shown = {title: of for title, of in earlier.items() if of[0] or of[1]}
    if not shown and not held_out:
        return ""
    shown["End (%)"] = end
    keys = [key for key in ("rank1", "map", "accuracy")
            if key in known_metrics(*(of[0] for of in shown.values()), *({"": of[1]} for of in shown.values()))]
    groups = [(title, [METRIC_TITLES[key] for key in keys]) for title in shown]
    with_change, main = "Start (%)" in shown, headline_metric(end[1])
    if with_change:
        groups.append(("Change", [f"{METRIC_TITLES[main]} (points)"]))
    if held_out:
        groups.append(("Held-out training images", ["mAP (%)"]))

    def row(
        name: str, results: Sequence[Mapping[str, Any]], validation: float | None
    ) -> tuple[str, list[list[str]]]:
        cells = [[show(result.get(key), 100) for key in keys] for result in results]
        if with_change:
            first, last = results[0].get(main), results[-1].get(main)
            cells.append(["-" if first is None or last is None else f"{100 * (last - first):+.1f}"])
        if held_out:
            cells.append([show(validation, 100)])
        return name, cells

    validations = held_out.get("clients") or {}
    rows = [row(name, [of[0].get(name, {}) for of in shown.values()], validations.get(name)) for name in end[0]]
    rows.append(row("mean", [of[1] for of in shown.values()], held_out.get("mean")))
    notes = [f"{title.removesuffix(' (%)')}: {note}." for title, of in shown.items() if (note := accuracy_note(of[1]))]
    notes.insert(0, "End: before local fine-tuning.")
    if held_out:
        notes.append("Held-out training images: by their true identities, which nothing but this table reads.")
    return f'<h2>From start to end</h2>{_client_table(groups, rows)}<p class="soft">{" ".join(notes)}</p>'


def listed(title: str, lines: Sequence[str]) -> str:
    """A list under a heading; empty for no lines.

    >>> listed("Notes", ["a < b"])
    '<h2>Notes</h2><div class="card long"><ul><li>a &lt; b</li></ul></div>'
    """
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>{title}</h2><div class="card long"><ul>{items}</ul></div>' if lines else ""


def idle(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Client, round and epochs (from 0) in which clustering found no cluster, a line per client and round.

    >>> idle([{"event": "round", "round": 3, "clients": {"a": {"clusters": [0, 7, 0]}}}])
    ['a: round 3, epochs 0, 2']
    """
    found: dict[tuple[str, int], list[int]] = {}
    for client, round_, epoch in idle_epochs([event for event in events if event.get("event") == "round"]):
        found.setdefault((client, round_), []).append(epoch)
    return [
        f"{client}: round {round_}, epoch{'s' if len(epochs) > 1 else ''} {', '.join(map(str, epochs))}"
        for (client, round_), epochs in found.items()
    ]


def refused(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was refused, with its round where the log knows it, each once.

    Args:
        summary: what `summary.json` holds.
        events: of `metrics.jsonl`.
    """
    lines, seen = [], set()
    logged = [{**entry, "round": event["round"]} for event in events for entry in event.get("refused", [])]
    for entry in [*logged, *summary.get("refused", [])]:
        if not isinstance(entry, Mapping):
            entry = {"reason": entry}
        what = (entry.get("client"), str(entry.get("reason")))
        if "round" not in entry and what in seen:
            continue
        seen.add(what)
        where = [f"round {entry['round']}"] if "round" in entry else []
        line = ", ".join([*where, *([str(what[0])] if what[0] is not None else [])])
        lines.append(f"{line}: {what[1]}" if line else what[1])
    return list(dict.fromkeys(lines))
