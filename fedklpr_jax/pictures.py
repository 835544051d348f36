"""Which pictures of the tests a report shows."""

from __future__ import annotations

import numpy as np

from fedklpr_jax.assembly import Federation
from fedklpr_jax.evaluation.accuracy import Classified
from fedklpr_jax.evaluation.features import Evaluation
from fedklpr_jax.metrics import best_first
from fedklpr_jax.report_pictures import ClassifiedPictures, RankedList
from fedklpr_jax.simulation import Evaluations

SHOWN_QUERIES = 3
SHOWN_CLIENTS = 6
SHOWN_PICTURES = 20


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` places, evenly spread from the first to the last.

    >>> spread(9, 3).tolist(), spread(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    return np.linspace(0, count - 1, min(most, count)).astype(int)


def ranked_lists(federation: Federation, evaluations: Evaluations) -> dict[str, list[RankedList]]:
    """A few ranked lists a re-ID test, evenly spread over its valid queries."""
    sites = {site.name: site for site in federation.exams}
    lists: dict[str, list[RankedList]] = {}
    for name, result in evaluations.items():
        if not isinstance(result, Evaluation):
            continue
        site = sites[name]
        valid = np.flatnonzero(~np.isnan(result.average_precisions))
        shown = valid[spread(len(valid), SHOWN_QUERIES)]
        lists[name] = []
        for q in shown:
            rows = result.top[q][result.top[q] >= 0]
            lists[name].append(
                RankedList(
                    query=np.asarray(site.query.pixels[q]),
                    gallery=np.asarray(site.gallery.pixels[rows]),
                    hits=site.gallery.ids[rows] == site.query.ids[q],
                    query_name=site.query.names[q],
                    gallery_names=tuple(site.gallery.names[int(row)] for row in rows),
                )
            )
    return lists


def classified_pictures(federation: Federation, evaluations: Evaluations) -> dict[str, ClassifiedPictures]:
    """A few test pictures of a few clients of a classification run, evenly spread: the clients from the best to the
    worst, the pictures over a client's test."""
    if federation.dealt is None:
        return {}
    data, shares = federation.dealt
    numbers = {test.name: number for number, test in enumerate(federation.task.examined)}
    results = {name: result for name, result in evaluations.items() if isinstance(result, Classified)}
    names = best_first({name: result.metrics for name, result in results.items()}, "accuracy")
    strips = {}
    for place in spread(len(names), SHOWN_CLIENTS):
        name = names[place]
        result, rows = results[name], shares[numbers[name]].test
        shown = spread(len(rows), SHOWN_PICTURES)
        pixels = data.pixels[rows[shown]]
        strips[name] = ClassifiedPictures(
            # Grey pictures have one channel.
            np.broadcast_to(pixels, (*pixels.shape[:3], 3)),
            [data.classes[label] for label in result.predicted[shown]],
            [data.classes[label] for label in result.labels[shown]],
        )
    return strips
