"""The GPU benchmark runs to its end on the fake, so that it does not rot between two days with a GPU. No figure counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import gpu_data, gpu_load
from tests.bench.gpu_bed import FAKE, MIB, Bed
from tests.bench.gpu_predictions import PREDICTIONS
from tests.bench.gpu_report import decision, figures_of, report
from tests.bench.gpu_rivals import BY_NAME, UNVERIFIED, VERIFIED, WINDOWS

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path: Path) -> Path:
    gpu_data.build(tmp_path, 5 * MIB, 1, MIB, Bed("cuda:0", True).torch_device)
    return tmp_path


def test_everything_runs_and_is_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "fake.json"
    places = ["--memory", str(tmp_path / "memory"), "--disk", str(tmp_path / "disk"), "--json", str(place)]
    gpu_load.main(["--fake", "--inline", "--report", str(tmp_path / "fake.md"), *places])
    results = json.loads(place.read_text())
    text = (tmp_path / "fake.md").read_text()
    assert results["fake"]
    assert "FAKE" in text
    assert "not decided" in text
    assert not any("error" in result for result in results["tasks"].values())
    assert {key.split("/")[0] for key in results["tasks"]} == set(gpu_load.EXPERIMENTS)
    assert {(one.experiment, one.figure) for one in PREDICTIONS} <= figures_of(results).keys()
    assert "instanttensor" in results["absent"]
    # What was measured is not measured again.
    capsys.readouterr()
    gpu_load.main(["--fake", "--inline", *places])
    assert not [line for line in capsys.readouterr().err.splitlines() if "/" in line]


def test_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_load.main(["--fake", "--only", "E7", "--json", str(tmp_path / "fake.json")])
    results = json.loads((tmp_path / "fake.json").read_text())
    assert [result["caught"] for result in results["tasks"].values()] == [1, 1]
    assert results["tasks"].keys() == {"E7/memory/ring/1", "E7/memory/register/1"}
    with pytest.raises(SystemExit, match="a fake run"):
        gpu_load.main(["--inline", "--json", str(tmp_path / "fake.json"), "--memory", str(tmp_path), "--disk", str(tmp_path)])


def test_a_contestant_that_gives_other_bytes_is_found(small: Path) -> None:
    bed = Bed("cuda:0", True)
    loaded = dict(BY_NAME[VERIFIED].load(small, bed, {}))
    gpu_load.check_equal(loaded, small, bed)
    name = next(iter(loaded))
    flipped = loaded[name].clone()
    flipped.view(-1)[7] = -flipped.view(-1)[7]
    for wrong in ({**loaded, name: flipped}, {**loaded, "more": flipped}, {n: t for n, t in loaded.items() if n != name}):
        with pytest.raises(SystemExit):
            gpu_load.check_equal(wrong, small, bed)


def test_a_process_that_fails_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    settings = gpu_load.Settings("cuda:0", True, {"memory": str(tmp_path), "disk": str(tmp_path)}, FAKE)
    task = gpu_load.Task("E4", "memory", VERIFIED, 1)
    failed = gpu_load.spawned(task, settings, 60)
    assert "NotFoundError" in failed["error"]
    results = {"fake": False, "machine": {"versions": {}}, "absent": {}, "tasks": {task.key: failed}}
    assert f"| {VERIFIED} | failed: " in report(results)


def run_of(seconds: float, transfer: str = "ring") -> dict[str, object]:
    return {"steady_s": seconds, "first_s": seconds, "steady_cpu_s": seconds, "bytes": 10**9, "transfer": transfer}


def results_of(ring_s: float, windows_s: float, transfer: str = "register") -> dict[str, object]:
    tasks = {}
    for place in gpu_load.PLACES:
        for number in range(3):
            # The first round does not count.
            tasks[f"E3/{place}/{VERIFIED}/{number}"] = run_of(ring_s if number else 100.0)
            tasks[f"E3/{place}/{WINDOWS}/{number}"] = run_of(windows_s if number else 0.001, transfer)
    return {"fake": False, "machine": {"versions": {}}, "absent": {}, "tasks": tasks}


@pytest.mark.parametrize(
    ("results", "name"),
    [
        (results_of(1.0, 0.5), "`register`"),
        (results_of(1.0, 0.97), "`ring`"),
        (results_of(1.0, 2.0), "`ring`"),
        (results_of(1.0, 0.5, "ring"), "`ring`. Windows were refused"),
        ({**results_of(1.0, 0.5), "tasks": {}}, "`ring`. E3 has not"),
    ],
    ids=["twice as fast", "within the noise", "slower", "refused", "not measured"],
)
def test_the_default_is_decided_by_what_was_measured(results: dict[str, object], name: str) -> None:
    assert f"Default transfer: {name}" in decision(results)


def test_figures_beside_their_ceiling() -> None:
    tasks: dict[str, object] = {"E0/memory//1": {"h2d_gb_s": 50.0, "rows": []}}
    for number in range(3):
        tasks[f"E4/memory/{VERIFIED}/{number}"] = run_of(0.04)
        tasks[f"E4/memory/{UNVERIFIED}/{number}"] = run_of(0.02)
    found = figures_of({"fake": False, "tasks": tasks})
    assert found["E4", "verified_of_ceiling"] == 0.5
    assert found["E4", "verified_over_unverified"] == 2.0
    text = report({"fake": False, "machine": {"versions": {}}, "absent": {}, "tasks": tasks})
    assert "| 50 % |" in text
    assert "| ours, verified | yes | 0.040 |" in text
