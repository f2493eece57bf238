"""The tables of the GPU benchmark: predictions beside results, every figure with the ceiling of its machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.bench.gpu_predictions import MADE_ON, PREDICTIONS
from tests.bench.gpu_rivals import BY_NAME, RIVALS, SAFETENSORS, UNVERIFIED, VERIFIED, WINDOWS

BETTER_BY = 1.05
"""How much faster windows have to be, in each place, to become the default: less is noise."""

Results = dict[str, Any]


def report(results: Results) -> str:
    """Everything as Markdown."""
    return "\n".join(_lines(results))


def decision(results: Results) -> str:
    """What the default of `transfer=` should be, and why."""
    if results["fake"]:
        return "Default transfer: not decided. A fake device says nothing about it."
    ratios = []
    for place in ("memory", "disk"):
        if not (rate := _rates(results, "E3", place)).keys() >= {VERIFIED, WINDOWS}:
            return "Default transfer: `ring`. E3 has not measured both ways in both places."
        if any(run.get("transfer") != "register" for run in _runs(results, "E3", place, WINDOWS)):
            return f"Default transfer: `ring`. Windows were refused in the place '{place}'; see the fallbacks in the JSON."
        ratios.append(rate[WINDOWS] / rate[VERIFIED])
    name = "register" if min(ratios) >= BETTER_BY else "ring"
    figures = " and ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"Default transfer: `{name}`. Windows are {figures} times as fast as the ring (memory, disk); {BETTER_BY} would do."


def figures_of(results: Results) -> dict[tuple[str, str], float]:
    """What there are predictions of, by experiment and name."""
    found: dict[tuple[str, str], float] = {}
    for key, result in results["tasks"].items():
        experiment, _, name, _ = key.split("/")
        if not name or experiment == "E7":
            # Of two places the better one; of two ways to flip a bit, both have to be caught.
            better: Callable[[float, float], float] = min if experiment == "E7" else max
            for figure, value in result.items():
                if isinstance(value, int | float):
                    before = found.get((experiment, figure), value)
                    found[experiment, figure] = better(before, value)
    memory = {experiment: _rates(results, experiment, "memory") for experiment in ("E3", "E4", "E5")}
    if memory["E3"].keys() >= {VERIFIED, WINDOWS}:
        found["E3", "register_over_ring"] = memory["E3"][WINDOWS] / memory["E3"][VERIFIED]
    if memory["E4"].keys() >= {VERIFIED, UNVERIFIED}:
        found["E4", "verified_over_unverified"] = memory["E4"][UNVERIFIED] / memory["E4"][VERIFIED]
        found["E4", "verified_gb_s"] = memory["E4"][VERIFIED]
        if ceiling := found.get(("E0", "h2d_gb_s")):
            found["E4", "verified_of_ceiling"] = memory["E4"][VERIFIED] / ceiling
    if memory["E5"].keys() >= {VERIFIED, SAFETENSORS}:
        found["E5", "over_safetensors"] = memory["E5"][VERIFIED] / memory["E5"][SAFETENSORS]
        fastest = max(rate for name, rate in memory["E5"].items() if name in {rival.name for rival in RIVALS})
        found["E5", "over_fastest"] = memory["E5"][VERIFIED] / fastest
    cold = _rates(results, "E6", "disk", "first_s")
    if cold.keys() >= {"ours, verified, direct", "ours, verified, preadv"}:
        found["E6", "direct_over_preadv"] = cold["ours, verified, direct"] / cold["ours, verified, preadv"]
    return found


def _lines(results: Results) -> Iterator[str]:
    machine, found = results["machine"], figures_of(results)
    if results["fake"]:
        yield "**FAKE: the tests' device at tiny sizes. These figures show that the script runs, and nothing else.**\n"
    yield " · ".join(f"{key} {value}" for key, value in machine.items() if key != "versions")
    yield " · ".join(f"{name} {number}" for name, number in machine["versions"].items())
    if results["absent"]:
        yield "\nNot measured: " + "; ".join(f"{name} ({why})" for name, why in results["absent"].items()) + "."
    yield "Not built: a Triton kernel (E1), a kernel that reads host memory, hashes and writes in one pass (E7).\n"
    yield f"## Predictions of {MADE_ON}, before any run\n"
    yield "| Experiment | What | Predicted | Found | |\n|---|---|---|---|---|"
    for one in PREDICTIONS:
        value = found.get((one.experiment, one.figure))
        said = f"{one.low:g} to {one.high:g} {one.unit}"
        judged = "as predicted" if value is not None and one.low <= value <= one.high else "**not as predicted**"
        judged = "fake" if results["fake"] else "" if value is None else judged
        yield f"| {one.experiment} | {one.what} | {said} | {'not measured' if value is None else f'{value:.3g}'} | {judged} |"
    for experiment in ("E0", "E1", "E2", "E3"):
        yield from _probes(results, experiment)
    for experiment in ("E3", "E4", "E5", "E6"):
        yield from _loads(results, experiment, found.get(("E0", "h2d_gb_s")))
    yield "\n" + decision(results)


def _probes(results: Results, experiment: str) -> Iterator[str]:
    for key, result in results["tasks"].items():
        if not key.startswith(f"{experiment}/") or key.split("/")[2]:
            continue
        yield f"\n## {experiment}, {key.split('/')[1]}\n"
        if "error" in result:
            yield f"failed: {result['error']}"
            continue
        yield ", ".join(f"{name} {_shown(value)}" for name, value in result.items() if name != "rows") + "\n"
        columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
        yield _row(columns) + "\n" + _row(["---"] * len(columns))
        yield from (_row([_shown(row.get(name, "")) for name in columns]) for row in result["rows"])


def _loads(results: Results, experiment: str, ceiling: float | None) -> Iterator[str]:
    for place in ("memory", "disk"):
        names = list(dict.fromkeys(key.split("/")[2] for key in results["tasks"] if key.startswith(f"{experiment}/{place}/")))
        names = [name for name in names if name]
        if not names:
            continue
        yield f"\n## {experiment}, whole loads, {place}\n"
        kind = "cold" if experiment == "E6" else "steady"
        head = ["", "verified", f"{kind} s: median", "min", "max", "GB/s", "of the ceiling", "first s", "CPU s"]
        head += ["GiB: RSS", "torch on the device", "device at the end", "page-locked", "runs", "equal"]
        yield _row(head) + "\n" + _row(["---"] * len(head))
        for name in names:
            every = _runs(results, experiment, place, name, counted=False)
            runs = _runs(results, experiment, place, name)
            if errors := [run["error"] for run in every if "error" in run]:
                yield _row([name, f"failed: {errors[0]}", *[""] * (len(head) - 2)])
            if runs:
                is_verified = "yes" if BY_NAME[name].is_verified else "no"
                is_equal = "yes" if any(run.get("is_equal") for run in every) else "not compared"
                yield _row([name, is_verified, *_figures(runs, ceiling), is_equal])


def _figures(runs: Sequence[Results], ceiling: float | None) -> Iterator[str]:
    # A cold load has no second one.
    kind = "steady" if "steady_s" in runs[0] else "first"
    seconds = [run[f"{kind}_s"] for run in runs]
    median = statistics.median(seconds)
    rate = runs[0]["bytes"] / median / 1e9
    yield from (f"{median:.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}", f"{rate:.2f}")
    yield f"{100 * rate / ceiling:.0f} %" if ceiling else "E0 not run"
    yield f"{statistics.median(run['first_s'] for run in runs):.3f}"
    yield f"{statistics.median(run[f'{kind}_cpu_s'] for run in runs):.2f}"
    for name in ("peak_rss", "peak_device", "device_used", "peak_pinned"):
        # Of ours it is known without torch's count, which is not in every version.
        other = "ring_bytes" if name == "peak_pinned" else name
        values = [run[key] for run in runs for key in (name, other) if run.get(key) is not None]
        yield f"{max(values) / 2**30:.2f}" if values else "not known"
    yield str(len(runs))


def _rates(results: Results, experiment: str, place: str, kind: str = "steady_s") -> dict[str, float]:
    """GB/s of each contestant, by the median."""
    names = {key.split("/")[2] for key in results["tasks"] if key.startswith(f"{experiment}/{place}/")}
    runs = {name: _runs(results, experiment, place, name) for name in names if name}
    return {
        name: of_name[0]["bytes"] / statistics.median(run[kind] for run in of_name) / 1e9
        for name, of_name in runs.items()
        if of_name
    }


def _runs(results: Results, experiment: str, place: str, name: str, *, counted: bool = True) -> list[Results]:
    """Results of one contestant; `counted`: without the warm-up and without what failed."""
    begin = f"{experiment}/{place}/{name}/"
    found = [(key, result) for key, result in results["tasks"].items() if key.startswith(begin)]
    return [run for key, run in found if not counted or (key != f"{begin}0" and "error" not in run)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
