"""The results of kernels.py compared with the requirements, as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYER = (2.2, 3.0)
WIDE = {"forward": (6, 9), "forward+backward": (5, 8)}
DECODE = {"1": (2, 2.8), "32": (2, 3), "256": (1.7, 2)}
PASSES = ("forward", "forward+backward")


def rows(
    results: dict[str, Any], shapes: dict[Any, Any]
) -> list[tuple[str, float, float, float, float, float]]:
    """(name, our ms, their ms, speed-up, required and intended speed-up)."""
    found = []
    for (name, result), (musts, aims) in zip(results["lightning"].items(), shapes.values(), strict=True):
        for which, must, aim in zip(PASSES, musts, aims, strict=True):
            mine, theirs = result["ms"][f"ours {which}"], result["ms"][f"fla {which}"]
            found.append((f"{name} {which}, fla bf16", mine, theirs, theirs / mine, must, aim))
    longest = results["lightning"]["[1,131072,16]"]["ms"]
    for which, (must, aim) in WIDE.items():
        mine, theirs = longest[f"ours {which}"], longest[f"fla on fp32 copies {which}"]
        found.append((f"[1,131072,16] {which}, fla on fp32 copies", mine, theirs, theirs / mine, must, aim))
    for which in PASSES:
        mine, theirs = results["layer"][f"ours {which}"], results["layer"][f"reference {which}"]
        found.append((f"RNN layer [1,16384] {which}", mine, theirs, theirs / mine, *LAYER))
    for batch, (must, aim) in DECODE.items():
        times = results["decode_ms"][batch]
        mine = min(times["ours in place"], times["ours deferred"])
        found.append((f"decode, batch {batch}", mine, times["fla"], times["fla"] / mine, must, aim))
    return found


def print_table(results: dict[str, Any], shapes: dict[Any, Any]) -> None:
    print(f"\n{'':50}{'ours ms':>9}{'theirs':>9}{'ratio':>7}{'must':>6}{'aim':>6}")
    for what, mine, theirs, ratio, must, aim in rows(results, shapes):
        verdict = "aim" if ratio >= aim else "must" if ratio >= must else "MISSED"
        print(f"{what:50}{mine:9.4f}{theirs:9.4f}{ratio:7.2f}{must:6}{aim:6}  {verdict}")
    for name, result in results["lightning"].items():
        floor, times, errors = result["floor_ms"], result["ms"], result["errors"]["ours"]
        over = {which: round(times[f"ours {which}"] / floor[which], 2) for which in PASSES}
        print(
            f"{name} times the memory floor: {over}; worst head's error {max(e[1] for e in errors.values()):.1e}"
        )
        mine, theirs = (times[f"{who} forward+backward, one thread"] for who in ("ours", "fla"))
        print(
            f"{name} forward+backward on one thread: {mine:.4f} against {theirs:.4f} ms, {theirs / mine:.2f}"
        )
    memory = results["memory_gib"]
    print(
        f"peak extra GiB [1,131072,16]: ours {memory['ours']:.2f}, fla {memory['fla']:.2f} (must 2.2, aim 1.6)"
    )
    print(f"KL [8192 tokens, 151936]: {results['kl']} (must < 1 GiB)")
    print(f"layer {results['layer']}\ndecode {results['decode_ms']}")


def plot(results: dict[str, Any], path: Path) -> None:
    """One bar per comparison: the speed-up."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = rows(results, dict.fromkeys(results["lightning"], ((0, 0), (0, 0))))
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(table) + 1.2))
    labels = [what for what, *_ in table]
    ratios = [ratio for _, _, _, ratio, _, _ in table]
    bars = axes.barh(labels, ratios, color="#3b6ea5")
    axes.bar_label(
        bars, [f"{ratio:.1f}x  ({mine:.3g} ms)" for _, mine, _, ratio, _, _ in table], padding=3, fontsize=8
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ratios) * 1.25)
    axes.set_xlabel(f"times faster than the peer on one {results['environment']['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
