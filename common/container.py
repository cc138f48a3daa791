"""What a container (its control group, version 1 or 2) leaves this process of the machine. Linux only."""

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def memory_left() -> int | None:
    """Bytes below the tightest limit; none where there is no limit. Files in the page cache count as free."""
    left = []
    for group in _groups("memory"):
        for limit, used, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            most, now = _read(group / limit), _read(group / used)
            if most.isdecimal() and now.isdecimal():  # "max": no limit
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                left.append(max(0, int(most) - max(0, int(now) - files)))
    return min(left, default=None)


def cores_allowed() -> int | None:
    """Whole cores that the tightest quota pays for, at least one; none where there is no quota."""
    allowed = []
    for group in _groups("cpu"):
        one = " ".join(_read(group / f"cpu.cfs_{part}_us") for part in ("quota", "period"))
        for text in (_read(group / "cpu.max"), one):
            quota, _, period = text.partition(" ")
            if quota.isdecimal() and period.isdecimal() and int(period):  # "max" and -1: no limit
                allowed.append(max(1, math.ceil(int(quota) / int(period))))
    return min(allowed, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """The process's own group of a controller and every group around it, as far as they are seen from here."""
    for line in _read(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounted = ROOT / "sys/fs/cgroup" / controllers
        own = mounted / path.lstrip("/")
        for group in (own, *own.parents):
            yield group  # a container often sees its own group as the root: the others are not there
            if group == mounted:
                break


def _read(file: Path) -> str:
    """A file's text; nothing where there is no such file."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
