"""Engines on the nodes of a Ray cluster: an actor holds an engine, and each shard is one task of that actor.

Actors are used instead of plain tasks because an engine takes a minute to start and serves many shards.
``executors.run`` does the retries: if a node or an engine dies, its shards use up one retry. Model folders must have
the same path on every node, and tso-fast must be installed there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tso_fast.errors import EngineError, InputError
from tso_fast.executors import Answer
from tso_fast.generators import Engine, EngineSpec, Request, open_engine

CONNECT_S, CLOSE_S = 10.0, 20.0
INSTALL = "ray is not installed; pip install 'tso-fast[ray]'"


def check_available() -> None:
    """Raises InputError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"executor: {INSTALL}")


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports unless the user asks for them
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(f"executor: {INSTALL}") from error
    return ray


@dataclass(eq=False)
class Place:
    num_gpus: int
    is_client: bool


def _check_reachable(address: str) -> None:
    """Fails early if nothing listens at the address; Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


class RayExecutor:
    """``Executor`` on a Ray cluster.

    Args:
        address: address of the cluster; None: that in RAY_ADDRESS, else this machine's cluster, else a new one here.
        num_engines: maximum number of engines at once; 0: as many as all GPUs allow, or one per node without GPUs.

    Raises:
        InputError: ray is not installed, or no cluster answers at the address.
    """

    def __init__(self, address: str | None, num_engines: int) -> None:
        self.ray = _import_ray()
        self.num_engines = num_engines
        self.running: list[Place] = []
        self.engines: weakref.WeakSet[RayEngine] = weakref.WeakSet()
        self.is_owner = not self.ray.is_initialized()
        if self.is_owner:
            given = address or os.environ.get("RAY_ADDRESS")
            options = {} if given else {"include_dashboard": False}
            try:
                _check_reachable(given or "")
                self.ray.init(address=address, log_to_driver=False, logging_level="warning", **options)
            except (OSError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"ray_address: no Ray cluster can be joined at {address or 'the default address'}: {error}"
                ) from error

    def acquire(self, spec: EngineSpec) -> Place | None:
        place = Place(spec.num_gpus, spec.is_client)
        if not place.is_client:
            nodes = [node for node in self.ray.nodes() if node["Alive"]]
            gpus = [int(node["Resources"].get("GPU", 0)) for node in nodes]
            engines = [p for p in self.running if not p.is_client]
            has_room = len(engines) < (self.num_engines or (sum(gpus) if spec.num_gpus else len(nodes)))
            used = sum(p.num_gpus for p in engines)
            fits = used + spec.num_gpus <= sum(gpus) and max(gpus, default=0) >= spec.num_gpus
            # The first engine may wait for a node, since clusters grow.
            if engines and not (has_room and (fits or not spec.num_gpus)):
                return None
        self.running.append(place)
        return place

    def release(self, place: Place) -> None:
        self.running.remove(place)

    def open(self, spec: EngineSpec, place: Place) -> Engine:
        return open_engine(spec) if place.is_client else RayEngine(self.ray, spec, self.engines)

    def stop(self) -> None:
        for engine in list(self.engines):
            engine.kill()

    def close(self) -> None:
        if self.is_owner:
            self.ray.shutdown()


class EngineHost:
    """The actor: an engine in its own process, shared by shards."""

    def __init__(self, spec: EngineSpec) -> None:
        self.engine = open_engine(spec, own_process=True)
        self.lock = threading.Lock()
        self.answers: dict[bytes, Answer] = {}

    def ping(self) -> None:
        pass

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers of a shard. Several calls run at once; the one that holds the lock collects for all."""
        with self.lock:
            self.engine.submit(requests)
        while True:
            with self.lock:
                if all(request.key in self.answers for request in requests):
                    return [self.answers.pop(request.key) for request in requests]
                self.answers.update((answer.key, answer) for answer in self.engine.collect())

    def close(self) -> None:
        self.engine.close()


class RayEngine:
    """``Engine`` on a node that Ray chooses; it joins ``others`` before it has started."""

    def __init__(self, ray: Any, spec: EngineSpec, others: weakref.WeakSet[RayEngine]) -> None:
        self.ray = ray
        self.spec = spec
        self.tasks: list[Any] = []
        options = {
            "num_gpus": spec.num_gpus,
            "num_cpus": 1,
            "max_restarts": 0,
            "max_concurrency": 8,
            "scheduling_strategy": "SPREAD",
        }
        self.actor = ray.remote(EngineHost).options(**options).remote(spec)
        others.add(self)
        try:
            self._get(self.actor.ping.remote(), spec.start_timeout_s, "it did not start")
        except BaseException:
            self.kill()
            raise

    def _get(self, task: Any, timeout_s: float, what: str) -> Any:
        """The result of a task; Ray's errors become the errors that a local engine would raise."""
        exceptions = self.ray.exceptions
        cells = self.spec.names
        try:
            return self.ray.get(task, timeout=timeout_s)
        except exceptions.GetTimeoutError as error:
            raise EngineError(
                f"the {self.spec.kind} engine of {cells} on Ray: {what} in {timeout_s:g} s; free in the "
                f"cluster: {self.ray.available_resources()}"
            ) from error
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError | EngineError):
                raise type(error.cause)(str(error.cause)) from None
            raise EngineError(f"the {self.spec.kind} engine of {cells} on Ray failed: {error}") from error
        except exceptions.RayActorError as error:
            if isinstance(cause := getattr(error, "cause", None) or error.__cause__, InputError | EngineError):
                raise type(cause)(str(cause)) from None
            raise EngineError(f"the {self.spec.kind} engine of {cells} on Ray died: {error}") from error
        except exceptions.RayError as error:
            raise EngineError(f"the {self.spec.kind} engine of {cells} on Ray failed: {error}") from error

    def submit(self, requests: Sequence[Request]) -> None:
        if requests:
            self.tasks.append(self.actor.run.remote(list(requests)))

    def collect(self) -> list[Answer]:
        while True:
            done, _ = self.ray.wait(self.tasks, num_returns=1, timeout=self.spec.timeout_s)
            if done:
                self.tasks.remove(done[0])
                answers: list[Answer] = self._get(done[0], self.spec.timeout_s, "its answers did not arrive")
                return answers
            # EngineHost watches the engine; this watches the node.
            self._get(self.actor.ping.remote(), self.spec.timeout_s, "its node was silent")

    def close(self) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.get(self.actor.close.remote(), timeout=CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """Ends the actor at once; its engine sees the connection close, and goes too."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(self.actor)
