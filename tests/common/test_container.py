"""What a container leaves of the machine: control groups of both versions, as files."""

from pathlib import Path

import pytest
import torch

from common import container, device
from train.plan import memory

GIB = 2**30
V2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/job/memory.current": f"{5 * GIB}\n",
    "sys/fs/cgroup/job/memory.stat": f"anon {3 * GIB}\nactive_file {GIB}\ninactive_file {GIB // 2}\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": f"{5 * GIB}\n",
    "sys/fs/cgroup/job/step/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/job/cpu.max": "max 100000\n",
}
V2_OWN_ROOT = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory.current": f"{GIB}\n",
    "sys/fs/cgroup/cpu.max": "50000 100000\n",
}
V1 = {  # docker: the path is the host's, what is mounted is the container's own
    "proc/self/cgroup": "9:memory:/docker/4f\n3:cpu,cpuacct:/docker/4f\n1:name=systemd:/docker/4f\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"active_file 1\ntotal_active_file {GIB // 2}\ntotal_inactive_file 0\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}
UNLIMITED = {
    "proc/self/cgroup": "3:cpu:/\n2:memory:/\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "left", "cores"),
    [
        (V2, 8 * GIB - 7 * GIB // 2, 2),
        (V2_OWN_ROOT, 3 * GIB, 1),
        (V1, 3 * GIB // 2, 3),
        (UNLIMITED, None, None),
        ({}, None, None),
    ],
)
def test_the_tightest_limit_of_every_group(
    files: dict[str, str],
    left: int | None,
    cores: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(container, "ROOT", tmp_path)
    assert container.memory_left() == left
    assert container.cores_allowed() == cores
    assert device.cores() <= (cores or 10**6)
    free = memory.available(torch.device("cpu"))
    assert free is None or free <= (left or 2**62)
    if left is not None:
        monkeypatch.setattr(container, "memory_left", lambda: 5)
        assert memory.available(torch.device("cpu")) == 5
