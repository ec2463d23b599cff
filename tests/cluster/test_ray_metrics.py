"""Gauges in a real Ray, read where Prometheus would read them."""

import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from halo_cluster import ray_metrics
from halo_cluster.ray_metrics import RayGauges, Sample, published_in_ray

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_metrics_report_interval_ms": "1000",
}
IN_RAY = """
import sys, time, urllib.request
import ray
from halo_cluster.ray_metrics import Sample, published_in_ray

ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], logging_level="ERROR")
(node,) = ray.nodes()
address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

def lines():
    try:
        content = urllib.request.urlopen(address, timeout=10).read().decode()
    except OSError:  # the agent is still starting
        return []
    return [line for line in content.splitlines() if line.startswith("ray_halo_")]

def wait_for(condition):
    deadline = time.monotonic() + 90
    while not condition(lines()):
        assert time.monotonic() < deadline, lines()
        time.sleep(0.5)

samples = [Sample("halo_step", {"stage": stage}, 7.0) for stage in ("align", "distill")]
with published_in_ray(lambda: samples):
    wait_for(lambda seen: sum(line.endswith(" 7.0") for line in seen) == 2)
    samples = [Sample("halo_step", {"stage": "distill"}, 8.0)]
    wait_for(lambda seen: len(seen) == 1 and 'stage="distill"' in seen[0] and seen[0].endswith(" 8.0"))
    samples = [Sample("halo_step", {"stage": "distill"}, 9.0)]
wait_for(lambda seen: len(seen) == 1 and seen[0].endswith(" 9.0"))
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """For Ray's own files, whose sockets allow no long path."""
    if importlib.util.find_spec("ray") is None:
        assert os.environ.get("CI") != "true", "CI runs this test, and Ray is not installed"
        pytest.skip("needs Ray: pip install '.[ray]'")
    with tempfile.TemporaryDirectory(prefix="halo-ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_gauges_come_change_and_go_in_ray(ray_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_RAY, str(ray_folder)],
        env={**os.environ, **RAY_SETTINGS, "RAY_AUTH_TOKEN": secrets.token_hex()},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_outside_ray_nothing_happens() -> None:
    """Ray is not even imported."""
    probe = (
        "import sys; from halo_cluster.ray_metrics import *; RayGauges().publish([Sample('x', {}, 1.0)]); "
        "print('ray' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_readings_that_fail_once_are_published_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while reading neither ends the work that is watched nor the watching."""
    published: list[list[Sample]] = []
    readings: Iterator[list[Sample]] = iter([[Sample("halo_step", {}, 1.0)], [Sample("halo_step", {}, 2.0)]])
    failures = iter([True, False])
    monkeypatch.setattr(ray_metrics, "PUBLISH_SECONDS", 0.01)
    monkeypatch.setattr(RayGauges, "publish", lambda self, samples: published.append(list(samples)))

    def read() -> list[Sample]:
        if next(failures, False):
            raise OSError("the disk is away")
        return next(readings, [])

    with published_in_ray(read):
        deadline = time.monotonic() + 30
        while len(published) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        during = len(published)
    assert [sample.value for samples in published[:2] for sample in samples] == [1.0, 2.0]
    assert len(published) > during, "once more at the end"
