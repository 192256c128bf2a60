"""docs/reproduce.md: the figures of the results file beside what the papers say. The command writes it, nobody else."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.reproduce import plan, words
from bench.reproduce.claims import AGAINST, CLAIMS, CLEAR, MISSING, NOISE, verdict
from bench.reproduce.pictures import draw, ranked
from bench.reproduce.plan import CORRELATIONS, STUDIES, SYNTHETICS, TABLE, Setting
from bench.reproduce.summary import MEAN, Difference, Summary

# AdaTT, table 5: 6 experts a level in all, hidden (128, 64), tower 32. The paper calls the columns task 1 to 3 and
# counts income first; by their levels education is.
PAPER = {
    "AdaTT-sp": {"education": 0.8766, "income": 0.9202, "never_married": 0.9783},
    "ML-MMoE": {"education": 0.8729, "income": 0.9178, "never_married": 0.9731},
    "PLE": {"education": 0.8683, "income": 0.9164, "never_married": 0.9697},
}
TASKS = ("income", "never_married", "education", MEAN)


def write(summary: Summary, page: Path) -> None:
    """The page, and its pictures beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = {path.stem: path.name for path in draw(summary, page.parent)}
    page.write_text("\n".join(_page(summary, pictures)).rstrip() + "\n")


def _filled(text: str, **values: Any) -> str:
    """A text with its values, wrapped anew; blank lines part paragraphs, and a heading is one."""
    paragraphs = text.format(**values).rstrip().split("\n\n")
    return "\n\n".join(textwrap.fill(each, 120, break_on_hyphens=False) for each in paragraphs) + "\n"


def _page(summary: Summary, pictures: dict[str, str]) -> Iterator[str]:
    yield words.TITLE
    yield from _missing(summary)
    yield from _verdicts(summary)
    yield from _how(summary)
    yield from _table(summary)
    yield from _picture(pictures, "reproduce-table", "Test AUC of every architecture")
    yield from _claims(summary)
    yield "## AdaTT's studies\n"
    yield from _picture(pictures, "reproduce-studies", "AdaTT's studies")
    for study, text in words.STUDIES.items():
        yield text
        yield from _settings(summary, STUDIES[study], TASKS)
    yield words.FUNNEL
    yield from _settings(summary, STUDIES["funnel"], ("education", "and income", MEAN))
    yield "## MMoE's synthetic study\n"
    yield from _picture(pictures, "reproduce-synthetic", "Training loss of the synthetic study")
    yield from _synthetic(summary)


def _picture(pictures: dict[str, str], name: str, title: str) -> Iterator[str]:
    if name in pictures:
        yield f"![{title}]({pictures[name]})\n"


def _missing(summary: Summary) -> Iterator[str]:
    short, seen = {}, []
    for study, settings in STUDIES.items():
        fresh = [setting for setting in settings.values() if setting not in seen]
        seen += fresh
        wanted = [(1 if setting.network == plan.LOGISTIC else setting.budget.seeds, setting) for setting in fresh]
        short[study] = sum(max(0, count - len(summary.tests(setting))) for count, setting in wanted)
    if any(short.values()):
        found = ", ".join(f"{study} {count}" for study, count in short.items() if count)
        yield _filled("**Not complete.** Runs that are missing: {found}. The same command goes on.", found=found)
    for line in summary.failed():
        yield f"**A run failed.** {line['name']}, seed {line['seed']}, rate {line['lr']}: {line['failed']}\n"


def _verdicts(summary: Summary) -> Iterator[str]:
    found = [(claim, verdict(claim.difference(summary))) for claim in CLAIMS]
    counts = Counter(each for _, each in found)
    signs = sum(each == NOISE and claim.difference(summary).mean > 0 for claim, each in found)
    missing = f", {counts[MISSING]} were not run" if counts[MISSING] else ""
    numbers = {"clear": counts[CLEAR], "noise": counts[NOISE], "signs": signs, "against": counts[AGAINST]}
    yield _filled(words.COMES_OUT, total=len(found), missing=missing, **numbers)
    for result, head in ((AGAINST, "The other way round"), (NOISE, "Within the noise"), (CLEAR, "As in the paper")):
        names = [claim.ordering for claim, each in found if each == result]
        if names:
            yield textwrap.fill(f"* {head}: {'; '.join(names)}.", 120, subsequent_indent="  ")
    yield ""
    parts = []
    for name in ("AdaTT-sp", "AdaTT", "MMoE"):
        difference = summary.difference(TABLE[name], TABLE["SharedBottom"])
        if difference is not None:
            parts.append(f"{name} {_signed(difference)}")
    if parts:
        yield (
            "Beside SharedBottom, in test AUC, mean over the tasks, in units of 0.0001 ± half of the 95 % interval:\n"
            f"{', '.join(parts)}.\n"
        )


def _how(summary: Summary) -> Iterator[str]:
    census, synthetic = plan.CENSUS, plan.SYNTHETIC
    yield _filled(
        words.HOW,
        experts=plan.EXPERTS,
        batch=census.batch,
        epochs=census.epochs,
        rates=" and ".join(f"{lr:g}" for lr in census.rates),
        seeds=census.seeds,
        synthetic_rows=plan.SYNTHETIC_ROWS[0],
        synthetic_batch=synthetic.batch,
        synthetic_epochs=synthetic.epochs,
        synthetic_seeds=synthetic.seeds,
        synthetic_rates=", ".join(f"{lr:g}" for lr in synthetic.rates),
    )
    rates = {name: summary.lr(setting) for name, setting in TABLE.items()}
    slow = [name for name, lr in rates.items() if lr is not None and lr < max(census.rates)]
    if any(rates.values()):
        yield _filled(words.RATES, slow=", ".join(slow) or "no network")
    made = Counter(
        f"torch {line['torch']}, {line['cpu']}, {line['threads']} thread{'s' if line['threads'] > 1 else ''}"
        for line in summary.lines
    )
    if made:
        minutes = sum(line["cpu_seconds"] for line in summary.lines) / 60
        what = f"{'; '.join(made)}: {len(summary.lines)} runs, {minutes:.0f} minutes of one core"
        yield _filled(words.MADE, what=what)


def _table(summary: Summary) -> Iterator[str]:
    yield words.TABLE
    heads = ["network", *(_name(task) for task in TASKS), "beside SharedBottom", "NE", "rate", "parameters"]
    yield from _head(heads)
    for name in ranked(summary):
        setting = TABLE[name]
        cells = [_spread(summary.column(setting, task)) for task in TASKS]
        beside = summary.difference(setting, TABLE["SharedBottom"])
        alone = name in ("SharedBottom", plan.LOGISTIC)
        cells += ["" if alone else _signed(beside), f"{statistics.fmean(summary.column(setting, metric='ne')):.4f}"]
        cells += [_rate(summary.lr(setting)), f"{summary.tests(setting)[0]['parameters']:,}"]
        yield _row([name, *cells])
    yield ""


def _claims(summary: Summary) -> Iterator[str]:
    yield words.PAPERS
    tasks = list(PAPER["PLE"])
    yield from _head(["network", *(f"{_name(task)}: {whose}" for task in tasks for whose in ("paper", "ours"))])
    for name, values in PAPER.items():
        pairs = ((f"{values[task]:.4f}", _spread(summary.column(TABLE[name], task))) for task in tasks)
        yield _row([name, *(cell for pair in pairs for cell in pair)])
    yield ""
    yield words.ORDERINGS
    yield from _head(["paper", "ordering", *(_name(task) for task in TASKS), "verdict on the mean"])
    for claim in CLAIMS:
        if claim.study not in SYNTHETICS:
            cells = [_signed(claim.difference(summary, task)) for task in TASKS]
            yield _row([claim.source, claim.ordering, *cells, verdict(claim.difference(summary))])
    yield ""


def _settings(summary: Summary, settings: dict[str, Setting], tasks: Iterable[str]) -> Iterator[str]:
    yield from _head(["", *(_name(task) for task in tasks), "rate", "parameters"])
    for name, setting in settings.items():
        lines = summary.tests(setting)
        if lines:
            cells = [_spread(summary.column(setting, task)) for task in tasks]
            yield _row([name, *cells, _rate(summary.lr(setting)), f"{lines[0]['parameters']:,}"])
    yield ""


def _synthetic(summary: Summary) -> Iterator[str]:
    yield words.SYNTHETIC
    yield from _head(["weights", "", *(f"correlation {p}" for p in CORRELATIONS), "rates", "parameters"])
    for study, scale in SYNTHETICS.items():
        for name in ("SharedBottom", "OMoE", "MMoE"):
            settings = [STUDIES[study][f"{name} {p}"] for p in CORRELATIONS]
            lines = [line for setting in settings for line in summary.tests(setting)]
            if lines:
                cells = [_middle(summary.column(setting, metric="mse")) for setting in settings]
                rates = ", ".join(_rate(summary.lr(setting)) for setting in settings)
                yield _row([str(scale), name, *cells, rates, f"{lines[0]['parameters']:,}"])
    yield ""
    yield words.SYNTHETIC_ORDERINGS
    yield from _head(["paper", "ordering", "difference", "verdict"])
    for claim in CLAIMS:
        if claim.study in SYNTHETICS:
            difference = claim.difference(summary)
            yield _row([claim.source, claim.ordering, _signed(difference, 100), verdict(difference)])
    yield ""


def _head(heads: list[str]) -> Iterator[str]:
    yield _row(heads)
    yield "|" + "---|" * len(heads)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(task: str) -> str:
    return task.replace("_", " ")


def _rate(lr: float | None) -> str:
    return "" if lr is None else f"{lr:g}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _middle(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})" if values else ""


def _signed(difference: Difference | None, scale: float = 1e4) -> str:
    if difference is None:
        return ""
    reach = f" ± {scale * difference.reach:.1f}" if difference.count > 1 else ""
    return f"{scale * difference.mean:+.1f}{reach}"
