"""The results of a sweep's tables as files, and what its search costs in privacy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedasr.cli.sweep.runs import read_json, read_outcomes
from fedasr.errors import UserError
from fedasr.privacy.accounting import epsilon_in_words
from fedasr.recipes import tables
from fedasr.recipes.tables import Table
from fedasr.training.logging import write_json_atomic


def write_results(table: Table, out: Path) -> dict[str, Any]:
    """Collects a table and writes it as Markdown, CSV, JSON and a picture.

    Returns:
      The results of `tables.collect`, and the paths by "markdown", "csv", "json" and "plot".
    """
    results = tables.collect(table, read_outcomes(table, out))
    if search := search_cost(table, out):
        results["search"] = search
    paths = {
        "markdown": out / f"{table.name}.md",
        "csv": out / f"{table.name}.csv",
        "json": out / f"{table.name}.json",
        "plot": out / f"{table.name}.png",
    }
    out.mkdir(parents=True, exist_ok=True)
    tables.write_plot(table, results, paths["plot"])
    markdown = tables.to_markdown(table, results, paths["plot"].name) + _search_in_words(search)
    paths["markdown"].write_text(markdown, encoding="utf-8")
    paths["csv"].write_text(tables.to_csv(table, results), encoding="utf-8")
    write_json_atomic(paths["json"], results)
    return results | {kind: str(path) for kind, path in paths.items()}


def search_cost(table: Table, out: Path) -> dict[str, Any]:
    """What trying all the private runs of a table costs their users; empty if there are none.

    See `fedasr.privacy.ledger.search_cost`. Delta is the largest of the runs'; with "deployed", the
    first deployment that all of them stand for.
    """
    from fedasr.privacy import ledger
    from fedasr.training.checkpoint import read_metadata

    entries, deltas = [], []
    for name, outcome in read_outcomes(table, out).items():
        privacy = outcome.summary.get("privacy") or {}
        if outcome.status == tables.UNFINISHED:  # it has spent what it has, too
            privacy = read_json(out / table.name / name / "config.json").get("privacy") or {}
        if not privacy.get("enabled"):
            continue
        try:
            kept = read_metadata(out / table.name / name).get("ledger")
        except UserError:  # its checkpoints are gone, or it had none yet
            if outcome.status == tables.UNFINISHED:
                continue
            kept = None
        if kept is None:
            return {"unknown": f"the run {name} has no ledger"}
        entries.append(ledger.from_data(kept["own"])[-1])
        deltas.append(privacy["delta"])
    if not entries:
        return {}
    delta = max(deltas)
    return {"delta": delta, **ledger.search_cost(entries, delta), **_deployed(entries, delta)}


def _deployed(entries: Sequence[Any], delta: float) -> dict[str, Any]:
    """{"deployed": what the search costs in the first deployment of all runs}; {} for none."""
    from fedasr.privacy import ledger

    said = [{tuple(case): (event, relation) for case, event, relation in e.deployed}
            for e in entries]  # fmt: skip
    common = [case for case in said[0] if all(case in one for one in said)]
    if not common:
        return {}
    epsilon, accountant = ledger.composed([one[common[0]] for one in said], delta)
    cohort, population = common[0]
    case = {"cohort": cohort, "population": population, "epsilon": epsilon}
    return {"deployed": case | {"accountant": accountant}}


def _search_in_words(search: Mapping[str, Any]) -> str:
    """A paragraph of Markdown."""
    if not search:
        return ""
    if "unknown" in search:
        return f"\nPrivacy of the search: unknown, {search['unknown']}.\n"
    text = (
        f"\nPrivacy of the search: choosing among {search['runs']} private runs by what they show "
        f"costs epsilon {epsilon_in_words(search['epsilon'])} at delta {search['delta']:g} (all "
        f"composed, {search['accountant']})"
    )
    if (selected := search["repeat_and_select"]) is not None:
        text += (
            f"; {epsilon_in_words(selected)} for the best alone, had their number been drawn from "
            "a Poisson distribution with that mean (arXiv 2110.03620)"
        )
    if case := search.get("deployed"):
        text += (
            f". As deployed with {case['cohort']:,} of {case['population']:,} users a round: "
            f"{epsilon_in_words(case['epsilon'])}"
        )
    return text + ".\n"
