"""Draws what `sweep=informed` measured: PSNR, and how often the right image was named, by noise.

    python -m fedsec.run sweep=informed out=outputs/informed
    python benchmarks/informed.py outputs/informed docs/informed.png

Prints the table that the figure shows. Needs matplotlib (the extra `paper`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedsec import records, stats
from fedsec.privacy import Mechanism, naming_bounds

HEAD = ("noise", "bound", "named", "inverting dB", "best null dB")


def measured(folder: Path) -> list[dict]:
    """A line for each noise multiplier, by rising noise."""
    lines: dict[float, dict] = {}
    for path in records.find([folder]):
        run = records.read(path)
        privacy = (run.run or {}).get("privacy", {})
        if not privacy.get("measured"):
            continue
        noise, found = privacy["mechanism"]["noise_multiplier"], privacy["measured"][0]
        line = lines.setdefault(noise, {"noise": noise, "pool": int(found["name"].split()[-1])})
        if run.rows[0].attack == "candidates":
            line["named"] = tuple(found[key] for key in ("value", "low", "high"))
        else:
            images = [row.image for row in run.rows]
            for key in ("psnr", "null_psnr"):
                line[key] = stats.bootstrap([getattr(row, key) for row in run.rows], images)
    return [lines[noise] for noise in sorted(lines)]


def bound(noise: float, pool: int) -> float:
    return naming_bounds(Mechanism(noise, 1.0, 1), (pool,))[pool]


def draw(lines: Sequence[dict], path: Path) -> None:
    import matplotlib  # type: ignore[import-not-found]
    import numpy as np

    matplotlib.use("agg")
    from matplotlib import pyplot  # type: ignore[import-not-found]

    noises, pool = [line["noise"] for line in lines], lines[0]["pool"]
    fine = np.geomspace(noises[0], noises[-1], 100)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    for key, colour, label in (("psnr", "#b3261e", "inverting"), ("null_psnr", "#777777", "null")):
        mean, low, high = zip(*(line[key] for line in lines), strict=True)
        left.plot(noises, mean, color=colour, label=label, marker="." if key == "psnr" else "")
        left.fill_between(noises, low, high, color=colour, alpha=0.15, linewidth=0)
    left.set(xscale="log", xlabel="noise multiplier", ylabel="PSNR, dB")
    shares = zip(*(line["named"] for line in lines), strict=True)
    share, low, high = (100 * np.array(part) for part in shares)
    right.plot(fine, [100 * bound(s, pool) for s in fine], "k--", label="proven: at most")
    ends = np.maximum([share - low, high - share], 0)
    right.errorbar(noises, share, ends, color="#1a5fb4", marker=".", label="candidates")
    right.set(xscale="log", xlabel="noise multiplier", ylabel=f"named of {pool:,}, %")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(words: Sequence[str]) -> int:
    if len(words) != 2:
        print(__doc__, file=sys.stderr)
        return 1
    lines = measured(Path(words[0]))
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for line in lines:
        share, low, high = (100 * value for value in line["named"])
        most = 100 * bound(line["noise"], line["pool"])
        psnr, null = ("{:.1f} [{:.1f}, {:.1f}]".format(*line[k]) for k in ("psnr", "null_psnr"))
        named = f"{share:.0f} % [{low:.0f}, {high:.0f}]"
        print(f"| {line['noise']:g} | {most:.3g} % | {named} | {psnr} | {null} |")
    draw(lines, Path(words[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
