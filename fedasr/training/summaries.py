"""The summary of a run: what `summary.json` holds."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.federated.server import ServerState
from fedasr.training import seeds
from fedasr.training.builders.devices import device_name
from fedasr.training.logging import to_json
from fedasr.training.session import Session
from fedasr.training.stored import has_checkpoint
from fedasr.training.trainers.central import seed_training
from fedasr.training.workdir import identity


def of_interrupted(session: Session) -> dict[str, Any]:
    """Of a run that was asked to stop."""
    return {
        "status": "interrupted",
        "wall_seconds": session.wall_seconds(),
        "history": session.history,
        "side_channel_failures": session.logger.failures,
    }


def of_run(session: Session, state: ServerState, seeded: bool) -> dict[str, Any]:
    """Of a run that got to its end.

    Args:
      session: of the run.
      state: at the end.
      seeded: whether the run trained a seed.
    """
    totals, parts, config = session.totals, session.parts, session.parts.config
    final = session.final or session.evaluate(state.params)
    planned = config.rounds if config.has_rounds else config.central.steps
    selected = session.selection.summary(int(state.round), planned)
    if selected is not None:
        session.message(
            f"kept: {selected['units']} of {selected['of']}, with the lowest error rate on "
            f"{selected['split']}"
        )
    session.message("after: " + wer_line(final))
    if problem := _problem(session, state, final):
        session.message(f"the result is worth nothing: {problem}")
    own = session.trainer.describe(session, state)
    seed_padding = seed_training(parts).padding(parts.seed_steps).fraction if seeded else None
    return to_json(
        {
            "status": "diverged" if problem else "completed",
            "problem": problem or None,
            "configuration": identity(config.tree()),
            "history": session.history,
            "side_channel_failures": session.logger.failures,
            "name": config.name,
            "run": session.name,
            "algorithm": config.algorithm,
            "rounds": own["rounds"],
            "central_steps": own["central_steps"],
            "cohort": own["cohort"],
            "population": len(parts.data.train.users),
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "wer": {split: rates["wer"] for split, rates in final.items()},
            "cer": {split: rates["cer"] for split, rates in final.items()},
            **_published(final),
            "initial_wer": {split: rates["wer"] for split, rates in session.initial.items()},
            "selection": selected,
            "warnings": session.watch.told if session.watch else [],
            "privacy": own["privacy"],
            "local": parts.store.summary() if parts.store is not None else None,
            "clients": own["clients"],
            "client_steps_per_second": totals.timed_steps / totals.timed_seconds
            if totals.timed_seconds
            else None,
            "padding_fraction": session.trainer.padding(totals).fraction,
            "seed_padding_fraction": seed_padding,
            "skipped_utterances": parts.data.skipped,
            "infeasible_utterances": totals.infeasible_utterances,
            "invalid_client_updates": totals.invalid_client_updates,
            "client_updates": own["client_updates"],
            "wall_seconds": session.wall_seconds(),
            "chunk": own["chunk"],
            "device": device_name(parts.devices),
            "device_changes": totals.device_changes,
        }
    )


def _published(final: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The rates as published, where the run asks for them."""
    name = "wer_published"
    found = {split: rates[name] for split, rates in final.items() if name in rates}
    return {name: found} if found else {}


def of_seed(session: Session, params: Any) -> dict[str, Any]:
    """Of a seed that was trained, or found, by itself: where it lies, and its error rates."""
    parts = session.parts
    folder = seeds.folder_of(session, session.workdir)
    if not has_checkpoint(folder):
        why = session.logger.failures.get("seed", "it is not there")
        raise UserError(f"--action=seed_only: no seed in {folder}: {why}")
    rates = session.evaluate(params, parts.config.evaluation.while_training)
    return to_json(
        {
            "status": "seed",
            "name": parts.config.name,
            "seed": str(folder),
            "steps": parts.seed_steps,
            "wer": {split: value["wer"] for split, value in rates.items()},
            "wall_seconds": session.wall_seconds(),
        }
    )


def _problem(session: Session, state: ServerState, final: Mapping[str, Mapping[str, float]]) -> str:
    """Why the run has not done what it should; "" if it has."""
    leaves = jax.tree.leaves(state.params)
    if not bool(jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))):
        return "parameters are not finite"
    if not all(math.isfinite(rates["loss"]) for rates in final.values()):
        return "the loss of the trained model is not finite"
    return session.totals.problem()


def wer_line(rates: Mapping[str, Mapping[str, float]]) -> str:
    """Error rates for people."""
    return ", ".join(f"{split} WER {value['wer']:.1f}%" for split, value in rates.items())
