"""Pictures out: one HTML file per run that needs nothing else (no network, no scripts), in light and dark."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedklpr_jax.errors import InputError
from fedklpr_jax.figures import DARK, LIGHT, MARKERS, Plot, Style, client_styles, draw
from fedklpr_jax.metrics import duration, heading, privacy_note, read_metrics, write_atomically
from fedklpr_jax.panels import MANY
from fedklpr_jax.plots import distribution, run_plots
from fedklpr_jax.report_pictures import ClassifiedPictures, RankedList, classified_pictures, data_uri, ranked_lists
from fedklpr_jax.report_sections import best, failures, idle, listed, refused, stages, table, tiles, unseen

_STYLE = """
:root{color-scheme:light dark;--face:%(light.face)s;--ink:%(light.ink)s;--faint:%(light.faint)s;--page:#f3f5f7;
--soft:#59626c;
--hit:#1a7f37;--miss:#cf222e}
@media(prefers-color-scheme:dark){:root{--face:%(dark.face)s;--ink:%(dark.ink)s;--faint:%(dark.faint)s;
--page:#121518;--soft:#a5adb6;
--hit:#3fb950;--miss:#ff6b63}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:1120px;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{margin:0;font-size:1.7rem;line-height:1.25}h2{margin:2.2rem 0 .7rem;font-size:1.2rem}
h3{margin:1rem 0 .4rem;font-size:1rem}
.lead,figcaption,.soft{color:var(--soft)}.lead{margin:.3rem 0 1.2rem}
.card,.tile,figure.plot{background:var(--face);border:1px solid var(--faint);border-radius:8px}
.card{padding:.8rem 1rem}.tiles{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));
margin-bottom:1rem}
.tile{padding:.6rem .9rem}.tile b{display:block;font-size:1.3rem;line-height:1.35;white-space:nowrap}
.tile.big b{font-size:1.9rem;line-height:1.2}
.tile span{color:var(--soft);font-size:.87rem}
.failed{margin:0 0 1rem;border:2px solid var(--miss);border-left-width:.6rem}.failed b{color:var(--miss)}
.failed ul{margin:.2rem 0 0;padding-left:1.1rem}
.scroll{overflow-x:auto;padding:0}table{border-collapse:collapse;width:100%%;font-variant-numeric:tabular-nums;
font-size:.86rem}
th,td{padding:.38rem .5rem;text-align:right;white-space:nowrap}thead th{font-weight:600;color:var(--soft)}
thead tr:last-child th{border-bottom:1px solid var(--faint)}th.group{text-align:center}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--face);max-width:12rem;
overflow:hidden;text-overflow:ellipsis}
tfoot td{border-top:1px solid var(--faint);font-weight:600}.first{border-left:1px solid var(--faint)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:0 0 .8rem;padding:.5rem 1rem;list-style-position:inside}
.legend svg{width:30px;height:14px;vertical-align:-1px}
.plots{display:grid;gap:1rem;margin-bottom:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%%,420px),1fr));align-items:start}
figure{margin:0}figure.plot{padding:.7rem}figure.plot img{display:block;width:100%%;height:auto}
figure.plot figcaption{font-size:.9rem;margin-bottom:.4rem}
figure.plot figcaption b{display:block;color:var(--ink);font-size:1rem}
.lists{display:grid;column-gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%%,500px),1fr))}
.ranked{display:flex;flex-wrap:wrap;gap:.3rem;margin-bottom:1rem}.ranked figure{text-align:center}
.ranked img{display:block;height:68px;width:auto;border:3px solid var(--soft);border-radius:3px}
.ranked figcaption{font-size:.85rem}.ranked .query{margin-right:.3rem}
.hit img{border-color:var(--hit)}.miss img{border-color:var(--miss);border-style:dashed}
.ranked .hit figcaption{color:var(--hit);font-weight:600}.ranked .miss figcaption{color:var(--miss);font-weight:600}
.classes figure{width:5.4rem}.classes img{margin:auto}.classes figcaption{white-space:pre-line;line-height:1.25}
.long{max-height:16rem;overflow:auto}.long ul{margin:0;padding-left:1.1rem}
pre{margin:.6rem 0 0;overflow-x:auto;font-size:.87rem;white-space:pre-wrap}summary{cursor:pointer;font-weight:600}
.card+details{margin:.5rem 0}details .scroll{margin-top:.5rem;max-height:32rem;overflow:auto}
"""


def _read(path: Path) -> dict[str, Any]:
    try:
        obj = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the directory of a finished run") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); write it anew") from None
    if not isinstance(obj, dict):
        raise InputError(f"{path}: holds no JSON object; write it anew")
    return obj


def _legend(styles: Mapping[str, Style]) -> str:
    if len(styles) > MANY:
        text = ("Thick line: the mean over the clients, or what its legend says. Dark band: the middle half of those "
                "with a value in the round; light band: from the least to the greatest.")
        return f'<p class="legend card soft">{text}</p>'
    items = "".join(
        f'<li><svg viewBox="0 0 22 10" aria-hidden="true">'
        f'<path d="M0 5h22" stroke="{style.colour}" stroke-width="1.5"/>'
        f'<path d="{MARKERS[style.marker]}" fill="{style.colour}"/></svg> {escape(name)}</li>'
        for name, style in styles.items()
    )
    return f'<ol class="legend card">{items}</ol>'


def _figures(plots: Sequence[Plot]) -> str:
    parts = []
    for plot in plots:
        light, dark = (data_uri("png", draw(plot, theme)) for theme in (LIGHT, DARK))
        title, caption = escape(plot.title), escape(plot.caption)
        parts.append(
            f'<figure class="plot"><figcaption><b>{title}</b>{caption}</figcaption><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{title}: {caption}"></picture></figure>'
        )
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def _course(plots: Sequence[Plot], styles: Mapping[str, Style]) -> str:
    return f"<h2>Course of the run</h2>{_legend(styles)}{_figures(plots)}" if plots else ""


def _clients(tested: Mapping[str, Any], logged: Sequence[str]) -> str:
    """How many clients there were; where one trains for all, the tests are not the clients."""
    together = set(logged) - set(tested)
    return f"{len(together)} client, {len(tested)} tests" if together else f"{len(tested)} clients"


def write_report(
    directory: Path,
    ranked: Mapping[str, Sequence[RankedList]],
    classified: Mapping[str, ClassifiedPictures] = MappingProxyType({}),
) -> Path:
    """Writes `report.html` from `config.json`, `metrics.jsonl` and `summary.json`; panels without data are left out.

    Args:
        directory: of the run.
        ranked: ranked lists per client; may be empty.
        classified: classified test pictures per client; may be empty.

    Returns:
        The path of the report.

    Raises:
        InputError: one of the three files is missing or broken.
    """
    config, summary = _read(directory / "config.json"), _read(directory / "summary.json")
    events = read_metrics(directory / "metrics.jsonl")
    rounds = [event for event in events if event.get("event") in ("round", "eval")]
    logged = [name for event in rounds for name in event.get("clients", {})]
    tested = summary["clients"]
    styles = client_styles(list(dict.fromkeys([*tested, *logged])))
    notes = [*(event["text"] for event in events if event.get("event") == "note"), *summary.get("notes", [])]
    title = heading(summary["method"], summary["task"])
    lead = [f"seed {summary['seed']}", f"{summary['rounds']} rounds", _clients(tested, logged)]
    if summary.get("seconds") is not None:
        lead.append(duration(summary["seconds"]))
    command = config.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    colours = {f"{name}.{key}": value for name, theme in (("light", LIGHT), ("dark", DARK))
               for key, value in dataclasses.asdict(theme).items()}
    # The policy makes the browser itself refuse scripts and anything from outside this file.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    body = [
        f'<h1>{escape(title)}</h1><p class="lead">{escape(" · ".join(lead))}</p>',
        failures(summary),
        tiles(summary),
        _figures(distribution(summary)),
        table(summary),
        unseen(summary),
        best(summary),
        stages(summary),
        _course(run_plots(events, styles), styles),
        ranked_lists(ranked),
        classified_pictures(classified, tested),
        listed("Epochs without a cluster", idle(events)),
        listed("Refused", refused(summary, events)),
        listed("Privacy", [note] if (note := privacy_note(summary.get("privacy"))) else []),
        listed("Notes", list(dict.fromkeys(map(str, notes)))),
        f'<h2>Run it again</h2><div class="card"><pre>{escape(str(command))}</pre></div>' if command else "",
        "<h2>Configuration</h2><div class=\"card\"><details><summary>config.json</summary><pre>"
        f"{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details></div>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE % colours}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )
    path = directory / "report.html"
    # File names may hold bytes that are no UTF-8; they must not stop the report.
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path
