"""A merged model carries what its parents' users were charged, and the search's own users."""

import math

import dp_accounting as dp

from fedasr.fusion.recognisers import Parents, fused_ledger
from fedasr.privacy import ledger
from fedasr.privacy.ledger import Entry, Users


def entry(run, rounds, users):
    event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(4.0), rounds)
    return Entry(run, "rounds", rounds, event, "REPLACE_SPECIAL", "", users)


def carried(*entries, known=True):
    return {"known": known, "earlier": [], "own": ledger.to_data(entries)}


def test_a_merged_model_has_all_entries_once_and_the_search():
    a, b = Users.of(["a", "x"]), Users.of(["b", "x"])
    parents = Parents(None, None, {}, None, [carried(entry("1", 3, a)), carried(entry("2", 2, b))])
    found = fused_ledger(parents, 50, ["s"])
    entries = ledger.from_data([*found["earlier"], *found["own"]])
    assert found["known"] and [e.stage for e in entries] == ["rounds", "rounds", "search"]
    later = entry("3", 1, Users.of(["x"]))
    both = ledger.total([*entries, later], 1e-6)
    six = ledger.total([entry("1", 6, later.users)], 1e-6)
    assert abs(both.epsilon - six.epsilon) < 2e-3 * six.epsilon
    assert ledger.total([*entries, entry("3", 1, Users.of(["s"]))], 1e-6).epsilon == math.inf

    twice = Parents(None, None, {}, None, [carried(entry("1", 3, a)), carried(entry("1", 5, a))])
    (one,) = ledger.from_data(fused_ledger(twice, 50, [])["earlier"])
    assert one.rounds == 5
    unknown = Parents(None, None, {}, None, [carried(entry("1", 3, a)), None])
    assert fused_ledger(unknown, 50, [])["known"] is False
    unsure = parents._replace(ledgers=[carried(known=False)] * 2)
    assert fused_ledger(unsure, 1, [])["known"] is False
