"""The cores that a process may use, and how long torch's threads spin beside other processes."""

import os
import sys
from pathlib import Path

import pytest

from minicpmv_finetune import cores as module
from minicpmv_finetune.cores import cores, share_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads files of Linux")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores without a container's limit, on which nothing else runs."""
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    monkeypatch.setattr(module, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    (tmp_path / "loadavg").write_text("7.31 1.21 1.18 1/79 3976\n")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_a_containers_limit_counts(machine: Path, limit: str, expected: int) -> None:
    (machine / "cpu.max").write_text(f"{limit}\n")
    assert cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3)])
def test_a_limit_of_version_1_counts(machine: Path, quota: str, expected: int) -> None:
    (machine / "cpu").mkdir()
    (machine / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (machine / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores() == expected


def test_threads_of_a_free_machine_spin_longer() -> None:
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    assert "OMP_NUM_THREADS" not in os.environ


def test_threads_beside_another_process_sleep_soon(machine: Path) -> None:
    (machine / "loadavg").write_text("0.00 0.00 0.00 2/79 3976\n")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_threads_sleep_soon_where_the_load_is_not_known(machine: Path) -> None:
    (machine / "loadavg").unlink()
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_a_process_bound_to_few_cores_may_spin_beside_others(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    (machine / "loadavg").write_text("0.00 0.00 0.00 7/79 3976\n")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


def test_a_limited_container_has_as_many_threads_as_cores(machine: Path) -> None:
    (machine / "cpu.max").write_text("400000 100000\n")
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_what_a_user_set_stays(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "cpu.max").write_text("400000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    share_cores()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["GOMP_SPINCOUNT"]) == ("3", "5")
