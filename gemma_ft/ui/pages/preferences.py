"""What a run that learns from preferences did to rewards, lengths and its distance from the reference, as pictures."""

from __future__ import annotations

from gemma_ft.system.row_kind import RowKind
from gemma_ft.ui.pages.blocks import Block, Note, Picture, Pictures
from gemma_ft.ui.pages.curves import SMALL, Curve, Panel, curve_picture
from gemma_ft.ui.pages.facts import RunFacts

LENGTHS = "Lengths are of the rows, in trained tokens: a margin that grows with them alone is one of length."


def preference_blocks(run: RunFacts) -> list[Block]:
    """Rewards of both sides and their margin, and beside them accuracy, margin per token, KL, entropy, lengths and
    log-probabilities, as far as the objective has them; nothing for other runs.
    """
    if run.rows == "answers":
        return []
    wide = curve_picture(rewards_panel(run, run.rows))
    panels = [
        _followed(run, "Accuracy of rewards", "rewards/accuracies"),
        _followed(run, "Margin", "rewards/margins"),
        _followed(run, "Margin per token", "rewards/margins_per_token"),
        _sides(run, "Length of answers", "lengths", run.rows),
        _sides(run, "Log-probability of answers", "logps", run.rows),
        _followed(run, "KL to the reference", "kl"),
        _followed(run, "Entropy of a token", "entropy"),
    ]
    drawn = [(curve_picture(one, width=SMALL, height=2.3), f"{one.title} by step") for one in panels]
    small = [Picture(uri, alt) for uri, alt in drawn if uri is not None]
    blocks: list[Block] = [Picture(wide, "Rewards by step")] if wide is not None else []
    if small:
        blocks += [Pictures(small), Note(LENGTHS)]
    return blocks


def rewards_panel(run: RunFacts, rows: RowKind) -> Panel:
    """Rewards of both sides, and of pairs their margin."""
    curves = list(_sides(run, "", "rewards", rows).curves)
    return Panel("Rewards", [*curves, Curve("margin", run.curves["rewards/margins"], colour=2)])


def _sides(run: RunFacts, title: str, name: str, rows: RowKind) -> Panel:
    """A figure of both sides in one picture."""
    words = ("chosen", "rejected") if rows == "pairs" else ("good", "bad")
    sides = zip(words, ("chosen", "rejected"), (0, 1), strict=True)
    return Panel(title, [Curve(word, run.curves[f"{name}/{side}"], colour=colour) for word, side, colour in sides])


def _followed(run: RunFacts, title: str, name: str) -> Panel:
    """A figure of training, and of held-out rows."""
    points = Curve("held-out", run.evals[f"eval_{name}"], "points", 1)
    return Panel(title, [Curve("training", run.curves[name]), points])
