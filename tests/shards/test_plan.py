"""Whether stores fit on the disk beside what is written already."""

import shutil
from dataclasses import replace
from pathlib import Path

from shards.plan import Plan, passes, room, shortage

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


def test_the_groups_of_layers_that_a_disk_holds() -> None:
    """Each layer takes 1,000 bytes, 100 + 90 * 2 of which stay."""
    plans = dict.fromkeys(range(5), PLAN)
    assert (PLAN.bytes, PLAN.kept) == (1000, 280)
    found = passes(plans, 2000)
    assert (found.groups, found.left, found.kept) == ([[0, 1], [2], [3]], [4], 1120)
    found = passes(plans, 2120)
    assert (found.groups, found.left, found.kept) == ([[0, 1], [2], [3], [4]], [], 1400)
    assert passes(plans, 5000).groups == [[0, 1, 2, 3, 4]]
    assert passes(plans, 999).groups == []


def test_room_is_what_was_allowed_or_what_is_free(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    free = shutil.disk_usage(tmp_path).free
    most = room(None, [tmp_path])
    assert abs(most - 0.95 * free - 1000) < 0.02 * free
    assert room(500, [tmp_path]) == 500
    assert room(10**18, [tmp_path]) < free
