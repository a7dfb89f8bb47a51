"""MLflow; a database beside the run unless MLFLOW_TRACKING_URI says otherwise."""

import os
import time
from collections.abc import Mapping
from typing import Any

from fedasr.training.trackers.place import PROJECT, Place, flattened

_LONGEST, _TOGETHER = 500, 100  # characters of a parameter, parameters in a call


class _Run:
    def __init__(self, place: Place) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        database = f"sqlite:///{place.folder.resolve()}/mlflow.db"
        self._client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or database)
        if place.id:
            self._id = place.id
            self._client.update_run(self._id, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(project)
        where = found.experiment_id if found else self._client.create_experiment(project)
        self._id = self._client.create_run(where, run_name=place.name).info.run_id
        told = [Param(k, str(v)[:_LONGEST]) for k, v in flattened(place.config).items()]
        for start in range(0, len(told), _TOGETHER):
            self._client.log_batch(self._id, params=told[start : start + _TOGETHER])

    @property
    def id(self) -> str:
        return self._id

    def write(self, phase: str, number: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        told = [Metric(f"{phase}/{k}", float(v), now, number) for k, v in values.items()]
        self._client.log_batch(self._id, metrics=told)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def open_tracker(place: Place) -> _Run:
    """See `Tracker`."""
    return _Run(place)
