"""Letters as Flower's messages, and which nodes the server takes for its sites."""

import pytest

from fedklpr_jax.deploy.messages import Letter
from fedklpr_jax.errors import InputError
from tests.deploy.fleets import quiet

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedklpr_jax[flower]'")
from flwr.app import ConfigRecord, RecordDict  # noqa: E402

from fedklpr_jax.deploy.apps import FlowerFleet, as_content, as_letter  # noqa: E402


@pytest.mark.parametrize("letter", [Letter("{}"), Letter('{"kind": "train"}', bytes(range(256)))])
def test_a_letter_arrives_as_it_was_sent(letter):
    assert as_letter(as_content(letter)) == letter


def test_messages_of_other_programs_are_no_letters():
    for content in [
        RecordDict(),
        RecordDict({"letter": ConfigRecord({"text": 3})}),
        RecordDict({"letter": ConfigRecord({"words": "{}"})}),
        RecordDict({"config": ConfigRecord({"text": "{}"})}),
    ]:
        with pytest.raises(InputError, match="a message of another program"):
            as_letter(content)


def test_a_node_is_a_site_only_if_name_and_sizes_are_those_of_one():
    fleet = FlowerFleet(None, Letter(""), ["ward", "viper"], frozenset({"images", "held"}), quiet())
    sizes = {"images": 10, "held": 2}
    assert fleet._objection("", "ward", sizes) == fleet._objection("ward", "ward", sizes) == ""
    for registered, name, told, words in [
        ("", "mall", sizes, "no client of this run; there are ward, viper"),
        ("", None, sizes, "no client of this run"),
        ("", ["ward"], sizes, "no client of this run"),
        ("viper", "ward", sizes, "is registered as 'viper'"),
        ("", "ward", None, "other sizes"),
        ("", "ward", {}, "other sizes"),
        ("", "ward", {"images": 10}, "other sizes"),
        ("", "ward", sizes | {"more": 1}, "other sizes"),
    ]:
        assert words in fleet._objection(registered, name, told)
    fleet._sizes["ward"] = dict(sizes)
    assert "has other pictures" in fleet._objection("", "ward", {"images": 11, "held": 2})
    assert fleet._objection("", "ward", sizes) == ""
