"""Whether stores fit on the disk beside what is written already."""

from dataclasses import replace

from shards.plan import Plan, shortage

PLAN = Plan(
    {"train": 90, "heldout": 10},
    True,
    bytes_per_row=10.0,
    fixed_bytes=0,
    written_bytes=0,
    free_bytes=1500,
    measured=True,
)


def test_stores_side_by_side_share_the_free_space() -> None:
    assert shortage([PLAN]) is None
    assert shortage([PLAN, PLAN]) == "needs 2 kB more, 1.5 kB are free"


def test_what_every_layer_has_written_already_is_not_asked_for_again() -> None:
    resumed = replace(PLAN, written_bytes=300)
    assert shortage([resumed, resumed]) is None
    assert shortage([resumed, PLAN]) == "needs 1.7 kB more, 1.5 kB are free"


def test_more_written_than_planned_leaves_nothing_to_come() -> None:
    assert replace(PLAN, written_bytes=5000).to_come == 0
