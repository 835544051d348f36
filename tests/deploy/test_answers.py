"""What the server keeps of what a site tells, however false or strange."""

import pytest

from fedklpr_jax.deploy.answers import add_results, counts, entry_of, number
from fedklpr_jax.simulation import Examination

STRANGE = [None, True, "1", [], {}, [1], float("nan"), float("inf"), -float("inf"), 10**400]


@pytest.mark.parametrize("value", STRANGE)
def test_only_finite_numbers_are_numbers(value):
    assert number(value) is None
    assert entry_of({"loss": value, "seconds": 2}) == {"seconds": 2}


@pytest.mark.parametrize("told", [*STRANGE, {"images": 1.0}, {"images": True}, {"images": -1}, {"images": 1 << 24}])
def test_sizes_are_small_whole_numbers(told):
    assert counts(told) == ({} if told == {} else None)


def test_a_rounds_entry_keeps_what_the_log_and_the_report_can_show():
    told = {"loss": 1.5, "decision": "accepted", "clusters": [7, 6], "clustered": [0.5, 1], "purity": [None, 0.25]}
    assert entry_of(told) == told
    for key, value in [
        ("decision", "sold"), ("decision", 3), ("decision", ["accepted"]), ("clusters", []), ("clusters", [None]),
        ("clusters", 7), ("clustered", [[1]]), ("purity", ["much"]), ("loss", [1.0]), ("loss", "low"),
    ]:  # fmt: skip
        assert entry_of(told | {key: value}) == {name: kept for name, kept in told.items() if name != key}
    for nothing in STRANGE:
        assert entry_of(nothing) == {}


GOOD = {"map": 0.5, "rank1": 0.75}


@pytest.mark.parametrize(
    "results",
    [
        *STRANGE,
        {"before": 3},
        {"before": {"ward": 3}},
        {"before": {"ward": {"map": 0.5}}},
        {"before": {"ward": GOOD | {"map": "high"}}},
        {"before": {"viper": GOOD}},
    ],
)
def test_results_that_are_not_whole_are_left_out(results):
    found = Examination.of(["before", "validation"])
    add_results(found, "ward", {"results": results, "validation": results}, False)
    assert found.results["before"] == {} and found.validation == {}


def test_whole_results_are_taken():
    found = Examination.of(["before", "validation"])
    answer = {"results": {"before": {"ward": GOOD | {"minp": None}}}, "validation": {"ward": 0.25}}
    add_results(found, "ward", answer, False)
    assert found.results["before"]["ward"].metrics == GOOD and found.validation == {"ward": 0.25}
    # In classification the mean over tests is weighted by their images.
    for told, taken in [({"accuracy": 0.5, "images": 4}, True), ({"accuracy": 0.5, "images": 0}, False), (GOOD, False)]:
        found = Examination.of(["before"])
        add_results(found, "c0", {"results": {"before": {"c0": told}}}, True)
        assert ("c0" in found.results["before"]) == taken
