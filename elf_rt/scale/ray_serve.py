"""A Ray Serve application: ``serve run elf_rt.scale.ray_serve:app bundle=/models/name.elfrt``.

A replica is the application of ``elf-rt serve``, with the same API: one model, whose engine batches. Serve hands it
more requests than fit in a call, and does no batching of its own.
"""

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

import elf_rt
from elf_rt.serve.app import create_app
from elf_rt.serve.boundary import log_to_stderr
from elf_rt.serve.job import Service


class Settings(BaseModel):
    """How the application runs. max_rows: the largest network call; twice as many requests are given to a replica.
    max_waiting: requests beyond those, which wait; more are refused with status 503. cores: of a replica, without GPU.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    backend: str = "auto"
    precision: str = "auto"
    replicas: int = 1
    gpus: float = 0
    cores: int = 1
    max_rows: int = 16
    max_waiting: int = 256


def app(settings: Settings) -> serve.Application:
    """The application, as ``serve run`` and Serve's configuration files make it."""
    deployment = serve.deployment(
        num_replicas=settings.replicas,
        ray_actor_options={"num_gpus": settings.gpus} if settings.gpus else {"num_cpus": settings.cores},
        max_ongoing_requests=2 * settings.max_rows,
        max_queued_requests=settings.max_waiting,
    )

    def build() -> FastAPI:
        """Called in the process of the replica."""
        return _server(settings)

    return deployment(serve.ingress(build)(Writer)).bind()


class Writer:
    """A replica. app: what ``serve.ingress`` gives it."""

    app: FastAPI

    def check_health(self) -> None:
        """Serve asks, and replaces a replica of which this fails: an engine that has stopped takes no programs."""
        self.app.state.model.run([])


def _server(settings: Settings) -> FastAPI:
    """The application of a server that is ready."""
    model = elf_rt.load(
        settings.bundle,
        settings.backend,
        precision=settings.precision,
        threads=None if settings.gpus else settings.cores,
        max_rows=settings.max_rows,
    )
    service = Service(model, max_waiting=settings.max_waiting, log_prompts=False)
    model.warm_up()
    service.gate.ready = True
    log_to_stderr(as_json=False)
    server = create_app(service)
    server.state.model = model
    return server
