"""Output of the demo: timed steps, a table of answers, and the experts each skill used, in numbers and as a picture."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float

from examples.skills.answers import Answers

SHADES = " ░▒▓█"
SHADE_STEP = 0.08
"""Share of assignments per shade; every shade but the last is this wide."""


def show(text: str = "") -> None:
    print(text, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print `title`, and when the block is done how long it took."""
    show(f"\n● {title}")
    begun = time.perf_counter()
    yield
    show(f"  {time.perf_counter() - begun:.0f} s")


def answers_table(backbone: Mapping[str, Answers], adapted: Mapping[str, Answers]) -> str:
    """One example of every skill, answered by both, and the exact match of both over all its held-out prompts."""
    head = ("skill", "held-out prompt", "backbone", "adapted", "exact match: backbone", "adapted")
    rows: list[tuple[str, ...]] = [head]
    for skill, before in backbone.items():
        after = adapted[skill]
        prompt = before.cases[0].prompt
        matches = f"{before.exact_match:.0%}", f"{after.exact_match:.0%}"
        rows.append((skill, prompt, _visible(before.texts[0]), _visible(after.texts[0]), *matches))
    overall = (f"{mean_exact_match(answers):.0%}" for answers in (backbone, adapted))
    rows.append(("all", "", "", "", *overall))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  " + "  ".join(left + right))
    rule = "  " + "─" * (len(lines[0]) - 2)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def mean_exact_match(answers: Mapping[str, Answers]) -> float:
    """Mean over the skills, all of which have as many prompts."""
    return float(np.mean([a.exact_match for a in answers.values()]))


def expert_shares(adapted: Mapping[str, Answers]) -> Float[np.ndarray, "skills E"]:
    """Share of every expert in the assignments of each skill's answers; rows add up to 1."""
    counts = np.array([a.experts for a in adapted.values()], float)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def expert_table(skills: list[str], shares: Float[np.ndarray, "skills E"]) -> str:
    width = max(len(name) for name in (*skills, "expert")) + 1
    lines = ["  " + "expert".ljust(width) + "".join(f"{e:>7} " for e in range(shares.shape[1]))]
    for skill, row in zip(skills, shares, strict=True):
        cells = (f"{SHADES[min(int(x / SHADE_STEP), len(SHADES) - 1)] * 2} {x:>4.0%} " for x in row)
        lines.append("  " + skill.ljust(width) + "".join(cells))
    return "\n".join(lines)


def plot_expert_use(skills: list[str], shares: Float[np.ndarray, "skills E"], picture: Path) -> None:
    """Heat map, skills down, experts across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.6 + 0.85 * shares.shape[1], 1.6 + 0.55 * len(skills)), layout="constrained")
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(shares.shape[1]))
    axes.set_yticks(range(len(skills)), skills)
    axes.set_xlabel("expert")
    axes.set_ylabel("skill")
    axes.set_title("Which experts read the answers of each skill")
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.6 * shares.max() else "black"
        axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, label="share of the skill's assignments (%)")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _visible(answer: str) -> str:
    """The answer on one line, shortened if it is long."""
    text = answer.replace("\n", "⏎") or "(nothing)"
    text = "".join(c if c.isprintable() else "·" for c in text)
    return text if len(text) <= 16 else text[:15] + "…"
