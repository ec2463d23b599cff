"""Looking at a run that trains: status, logs, and its metrics in a real Prometheus behind the shipped dashboard."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from prometheus_client.utils import floatToGoString

from halo_cluster import RunFolder, StageRecord
from halo_reports.monitoring.exporter import MetricsServer, exposition, read_or_make_token
from halo_reports.monitoring.families import ALL_METRICS
from halo_reports.monitoring.readings import last_metrics, read_run
from halo_training.progress import peak_memory
from tests.support.halo import halo, halo_command

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "watching.md"
DASHBOARD = ROOT / "halo_jobs" / "assets" / "grafana" / "halo.json"
STEPS = 100_000
SAVED = 25  # training saves twice in `checkpoint_every` steps


@pytest.fixture(scope="module")
def training_run(tmp_path_factory, pipeline_recipe_content) -> Iterator[Path]:
    """A run whose finetune has no end for as long as the tests look at it; it has saved, and select is done."""
    folder = tmp_path_factory.mktemp("watched")
    recipe = folder / "tiny.yaml"
    finetune = {**pipeline_recipe_content["finetune"], "steps": STEPS, "checkpoint_every": 2 * SAVED}
    select = {"context_length": 128, "items": 4}
    recipe.write_text(yaml.safe_dump({**pipeline_recipe_content, "finetune": finetune, "select": select}))
    with open(folder / "out.txt", "w") as out:
        process = subprocess.Popen(halo_command("run", recipe, "--runs", folder / "runs"), stdout=out, stderr=out)
    run = folder / "runs" / "tiny"
    try:
        while not any(run.glob("finetune.hybrid/*/checkpoints/step-????????")):
            assert process.poll() is None, (folder / "out.txt").read_text()
            time.sleep(0.1)
        yield run
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 75, (folder / "out.txt").read_text()


def test_status_while_it_trains(training_run):
    seen = halo("status", training_run, "--json")
    assert seen.returncode == 0, seen.stderr
    stages = {stage["stage"]: stage for stage in json.loads(seen.stdout)["stages"]}
    finetune, select, init = (stages[name] for name in ("finetune.hybrid", "select", "init"))
    assert finetune["state"] == "running" and finetune["node"] == socket.gethostname()
    assert finetune["steps"] == STEPS and SAVED <= finetune["step"] < STEPS
    assert finetune["progress"] == finetune["step"] / STEPS
    speed = finetune["tokens_per_second"] / (4 * 128)
    assert finetune["seconds_left"] == pytest.approx((STEPS - finetune["step"]) / speed)
    assert finetune["checkpoint_step"] % SAVED == 0 and finetune["checkpoint_age_seconds"] >= 0
    assert finetune["host_memory_bytes"] > 10**7
    assert select["state"] == "done" and select["tasks_done"] == select["tasks"] > 1
    assert init["progress"] == 1.0 and init["step"] is None and init["seconds_left"] is None
    table = halo("status", training_run).stdout
    (row,) = (line for line in table.splitlines() if "finetune.hybrid" in line)
    assert re.search(rf"running +1 +░+ +[\d,]+/{STEPS:,} .*{socket.gethostname()}", row)


def test_logs_of_a_stage(training_run):
    shown = halo("logs", training_run, "align")
    assert shown.returncode == 0, shown.stderr
    assert f"== attempt 1 on {socket.gethostname()}: log.txt" in shown.stdout
    assert re.search(r"align: 6/6  loss .* tokens/s", shown.stdout)
    assert shown.stdout.splitlines()[-1] == "== align done"
    absent = halo("logs", training_run, "alin")
    assert absent.returncode == 2
    assert "has not started 'alin'; started are: tokenize, " in absent.stderr


def test_last_metrics_of_a_long_file_that_was_cut_short(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5001, "lo')
    assert last_metrics(tmp_path) == {"step": 5000, "loss": 1.0}


def test_damaged_files_cost_their_numbers_only(training_run, tmp_path):
    run = tmp_path / "copy"
    for stage in ("align", "select"):
        shutil.copytree(training_run / stage, run / stage)
    shutil.copy(training_run / "plan.json", run)
    (run / "recipe.yaml").write_bytes(b"\xff\xfe: [")
    for name, content in (("align/*/metrics.jsonl", "NaN and more\n"), ("select/*/progress.json", "[")):
        next(run.glob(name)).write_text(content)
    align, select = read_run(run)
    assert (align.state, align.step, align.steps, align.loss) == ("done", None, None, None)
    assert (select.state, select.tasks) == ("done", None)


def test_gpu_memory_is_shown_where_there_is_a_gpu(training_run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 << 30)
    host, gpu = peak_memory()
    shutil.copytree(training_run / "finetune.hybrid", tmp_path / "finetune.hybrid")
    for name in ("recipe.yaml", "plan.json"):
        shutil.copy(training_run / name, tmp_path)
    (metrics,) = tmp_path.glob("finetune.hybrid/*/metrics.jsonl")
    line = {**last_metrics(metrics.parent), "gpu_memory_bytes": gpu, "host_memory_bytes": host}
    metrics.write_text(json.dumps(line) + "\n")
    content = exposition(tmp_path)
    labels = f'run="{tmp_path.name}",stage="finetune.hybrid"'
    assert f"halo_gpu_memory_bytes{{{labels}}} {floatToGoString(3 << 30)}" in content
    assert f"halo_host_memory_bytes{{{labels}}}" in content
    assert "halo_gpu_memory_bytes{" not in exposition(training_run)


def _get(url: str, token: str | None = None) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _served(run: Path, token_file: Path) -> tuple[subprocess.Popen[str], int]:
    """`halo metrics`, running, and the port that it printed."""
    server = subprocess.Popen(
        halo_command("metrics", run, "--port", 0, "--token-file", token_file),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    line = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/metrics serves (.*); runs found: 1\n", server.stdout.readline())
    assert line and line[2] == str(run)
    assert str(token_file) in server.stdout.readline()
    return server, int(line[1])


def test_metrics_are_for_those_who_have_the_token(training_run, tmp_path):
    token_file = tmp_path / "configuration" / "token"
    server, port = _served(training_run.parent, token_file)
    try:
        assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
        token, url = token_file.read_text().strip(), f"http://127.0.0.1:{port}/metrics"
        assert len(token) >= 40
        for wrong in (None, "", token[:-1], token + "x"):
            status, content = _get(url, wrong)
            assert status == 401 and "halo_" not in content
        assert _get(url.replace("metrics", "other"), token)[0] == 404
        status, content = _get(url, token)
        assert status == 200 and 'halo_step{run="tiny",stage="finetune.hybrid"}' in content
        listening = [
            c.laddr for c in psutil.Process(server.pid).net_connections("tcp") if c.status == "LISTEN"
        ]
        assert listening == [("127.0.0.1", port)]
        taken = halo("metrics", training_run, "--port", port, "--token-file", token_file)
        assert taken.returncode == 2 and "choose another with --port, or 0" in taken.stderr
    finally:
        server.terminate()
        server.wait(20)
    token_file.chmod(0o640)
    refused = halo("metrics", training_run, "--token-file", token_file)
    assert refused.returncode == 2 and f"run `chmod 600 {token_file}`" in refused.stderr


def test_runs_come_and_go_under_a_server(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "recipe.yaml").write_text("name: one\n")
    with MetricsServer(tmp_path, read_or_make_token(tmp_path / "token"), 0):
        assert exposition(tmp_path).count("halo_run_readable{") == 1
        record = StageRecord(tmp_path / "two" / "align" / "0123456789ab")
        record.begin_attempt()
        RunFolder(tmp_path / "two").write_plan("name: two\nalign: {steps: 10}\n", {"align": "0123456789ab"})
        content = exposition(tmp_path)
        assert 'halo_stage_state{run="two",stage="align",state="running"} 1.0' in content
        assert 'halo_steps{run="two",stage="align"} 10.0' in content
        (record.folder / "attempt.1" / "started.json").write_text("{")
        content = exposition(tmp_path)
        assert 'halo_run_readable{run="two"} 0.0' in content and 'halo_run_readable{run="one"} 1.0' in content


def test_the_page_lists_the_metrics():
    rows = re.findall(r"^\| `(halo_\w+)` \| ([\w, ]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    expected = [
        (metric.name, ", ".join(metric.labels), metric.help)
        for metric in ALL_METRICS
    ]
    assert rows == expected


def _prometheus_program(folder: Path) -> str:
    """Debian's Prometheus: installed, or taken out of its package into `folder`, which changes nothing here."""
    installed = shutil.which("prometheus")
    if installed:
        return installed
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, check=False)
        for package in folder.glob("prometheus_*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
            return str(folder / "usr" / "bin" / "prometheus")
    assert os.environ.get("CI") != "true", "CI runs this test as root on Debian, and could not get Prometheus"
    pytest.skip("needs Prometheus: `apt-get install prometheus`, or run the tests as root on Debian")


def _query(port: int, path: str, **parameters: object) -> list:
    answer = _get(f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
    content = json.loads(answer[1])
    assert content["status"] == "success", (parameters, content)
    data = content["data"]
    return data["result"] if isinstance(data, dict) else data


def _configurations() -> dict[str, dict]:
    """What the page has people tell Prometheus, by the name of the job."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    contents = [yaml.safe_load(block) for block in blocks]
    return {content["scrape_configs"][0]["job_name"]: content for content in contents}


@pytest.fixture(scope="module")
def prometheus(training_run, tmp_path_factory) -> Iterator[int]:
    """A real Prometheus that scrapes the run as the page says, every second; its port."""
    folder = tmp_path_factory.mktemp("prometheus")
    program = _prometheus_program(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own_port = probe.getsockname()[1]
    token_file = folder / "token"
    exporter, port = _served(training_run, token_file)
    content = _configurations()["halo"]
    (job,) = content["scrape_configs"]
    job["authorization"]["credentials_file"] = str(token_file)
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    job["scrape_interval"] = job["scrape_timeout"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(content))
    options = [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{own_port}",
    ]
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen([program, *options], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not _has_scraped(own_port):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.2)
        yield own_port
    finally:
        for process in (server, exporter):
            process.terminate()
            process.wait(30)


def _has_scraped(port: int) -> bool:
    try:
        return bool(_query(port, "query", query="count_over_time(halo_loss[1m]) >= 3"))
    except (OSError, ValueError):
        return False


def _targets() -> list[tuple[str, str, bool]]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        (panel["title"], target["expr"], target.get("instant", False))
        for panel in panels
        for target in panel["targets"]
    ]


@pytest.mark.parametrize(("title", "expression", "instant"), _targets())
def test_every_panel_of_the_dashboard_has_data(prometheus, title, expression, instant):
    query = expression.replace("$run", ".*")
    now = time.time()
    window = {"start": now - 60, "end": now, "step": 1}
    found = (
        _query(prometheus, "query", query=query)
        if instant
        else _query(prometheus, "query_range", query=query, **window)
    )
    assert found, f"panel {title!r} has no data"
    assert {series["metric"]["run"] for series in found} == {"tiny"}
    assert not _query(prometheus, "query", query=expression.replace("$run", "another"))


def test_dashboard_chooses_among_runs(prometheus):
    content = json.loads(DASHBOARD.read_text())
    (variable,) = (entry for entry in content["templating"]["list"] if entry["name"] == "run")
    match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert match
    assert _query(prometheus, f"label/{match[2]}/values", **{"match[]": match[1]}) == ["tiny"]


def test_prometheus_objects_to_nothing(training_run, tmp_path):
    """promtool, where Debian's Prometheus brought it: to names, types and help, and to the page's configuration."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool, which `apt-get install prometheus` brings")
    shown = subprocess.run(
        [tool, "check", "metrics"],
        input=exposition(training_run),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    (tmp_path / "ray.yml").write_text(yaml.safe_dump(_configurations()["ray"]))
    checked = subprocess.run(
        [tool, "check", "config", tmp_path / "ray.yml"], capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
