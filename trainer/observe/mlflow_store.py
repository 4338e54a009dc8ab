"""Journal entries -> one MLflow run, so that sending an entry twice changes nothing.

MLflow keeps (run, key, timestamp, step, value) of a metric as its primary key, accepts an equal parameter again and
overwrites tags, status and artifacts. mlflow is imported in `MlflowStore.__init__`: 1.7 s that belong to the sender's
thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TOKEN_TAG = "twinflow.token"
_METRICS_PER_CALL, _OTHERS_PER_CALL = 1000, 100  # MLflow's limits
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender tries again by itself, and can be stopped
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class RunGone(Exception):
    """The MLflow run no longer exists or was deleted."""


class Refused(Exception):
    """The server will never accept this entry; its message says why."""


def reach(uri: str) -> str:
    """Ask the tracking server, or look at the place of the sqlite file, without making anything; what it says.

    Raises whatever MLflow raises where it does not answer or refuses; OSError where the file cannot be written.
    """
    file = _sqlite_file(uri)
    if file is not None and not file.exists():
        place = next(folder for folder in file.parents if folder.exists())
        if not os.access(place, os.W_OK):
            raise PermissionError(f"cannot write to {place}")
        return "a new database"
    if file is not None and not os.access(file, os.W_OK):
        raise PermissionError(f"cannot write to {file}")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=_local_path_made(uri)).search_experiments(max_results=1)
    return f"{len(found) or 'no'} experiment{'s' * (len(found) != 1)} seen"


class MlflowStore:
    """An open MLflow run: that of `run_id` if it still exists, else the one that carries `token`, else a new one."""

    def __init__(self, uri: str, experiment: str, run_name: str, token: str, run_id: str | None) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for name in ("alembic", "mlflow"):  # a new database reports every step at INFO; importing mlflow sets the level
            logging.getLogger(name).setLevel(logging.WARNING)
        self._error: type[Exception] = MlflowException
        self._client = MlflowClient(tracking_uri=_local_path_made(uri))
        self._artifacts = _artifact_location(uri)
        if run_id is not None and self._alive(run_id):
            self.run_id = run_id
        else:
            self.run_id = self._find_or_create(experiment, run_name, token)

    def check(self) -> None:
        """Raise RunGone unless the run can be written to."""
        if not self._alive(self.run_id):
            raise RunGone(f"MLflow run {self.run_id} is gone")

    def log(self, entries: Sequence[dict[str, Any]]) -> None:
        """Send entries of kind metrics, params, changes. Raises Refused; anything else may be tried again."""
        from mlflow.entities import Metric, Param, RunTag

        metrics, params, tags = [], [], []
        for entry in entries:
            values = entry["values"].items()
            if entry["kind"] == "metrics":
                metrics += [Metric(key, float(value), entry["time"], entry["step"]) for key, value in values]
            elif entry["kind"] == "params":
                params += [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in values]
            else:
                tags += [RunTag(f"changed.{key}", str(value)[:_TAG_LENGTH]) for key, value in values]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self._call(self._client.log_batch, self.run_id, metrics=metrics[start : start + _METRICS_PER_CALL])
        for start in range(0, max(len(params), len(tags)), _OTHERS_PER_CALL):
            part = slice(start, start + _OTHERS_PER_CALL)
            self._call(self._client.log_batch, self.run_id, params=params[part], tags=tags[part])

    def status(self, status: str, time: int) -> None:
        """RUNNING, or the end (FINISHED, FAILED, KILLED) at `time` [ms]."""
        if status == "RUNNING":
            self._call(self._client.update_run, self.run_id, status=status)
        else:
            self._call(self._client.set_terminated, self.run_id, status=status, end_time=time)

    def artifact(self, path: Path, folder: str | None) -> None:
        """Upload a file; the same name is overwritten."""
        if not path.is_file():
            raise Refused(f"{path} does not exist any more")
        self._call(self._client.log_artifact, self.run_id, str(path), artifact_path=folder)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except self._error as error:
            code = getattr(error, "error_code", "")
            if code == "RESOURCE_DOES_NOT_EXIST":
                self.check()
            if code in _REFUSALS:
                self.check()  # a deleted run refuses everything; that is not the entry's fault
                raise Refused(str(error)) from error
            raise

    def _alive(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except self._error as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _find_or_create(self, experiment: str, run_name: str, token: str) -> str:
        # A process may die between creating the run and noting its id; the token finds that run again.
        experiment_id = self._experiment(experiment)
        found = self._client.search_runs([experiment_id], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
        run = found[0] if found else self._client.create_run(experiment_id, tags={TOKEN_TAG: token}, run_name=run_name)
        return str(run.info.run_id)

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=self._artifacts))
            except self._error as error:
                if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                    raise
                known = self._client.get_experiment_by_name(name)  # another run was faster
        if known is None or known.lifecycle_stage != "active":
            raise RuntimeError(
                f"MLflow experiment {name!r} is deleted; restore it or set tracking.experiment to another name"
            )
        return str(known.experiment_id)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _local_path_made(uri: str) -> str:
    """sqlite URIs with an absolute path whose folder exists; others as they are."""
    path = _sqlite_file(uri)
    if path is None:
        return uri
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


def _artifact_location(uri: str) -> str | None:
    """Beside a sqlite file (MLflow's default would be ./mlruns, wherever that is); a server knows its own place."""
    path = _sqlite_file(uri)
    return None if path is None else (path.parent / "mlflow-artifacts").as_uri()


def without_password(uri: str) -> str:
    """The URI as it may be shown and stored: user name and password removed."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
