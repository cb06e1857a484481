"""The process: warm up, listen, and on SIGTERM write what was accepted before it ends."""

import asyncio
import socket
from types import FrameType

import uvicorn
from anyio import to_thread
from fastapi import FastAPI

from elf_rt.console import note
from elf_rt.errors import ElfError, InputError
from elf_rt.model import Model
from elf_rt.serve.admission import Gate


class Server(uvicorn.Server):
    """uvicorn, which goes on listening while it drains, so that new requests are told to go elsewhere."""

    def __init__(self, app: FastAPI, gate: Gate, model: Model, root_path: str = "") -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", root_path=root_path))
        self._gate, self._model = gate, model

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the address once connections to it are taken, so that a script can wait for the line."""
        await super().startup(sockets)
        for bound in sockets or ():
            host, port = bound.getsockname()[:2]
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            root = self.config.root_path
            note(f"http://{where}{root}/  (OpenAI's API under /v1, metrics under /metrics; Ctrl-C ends)")

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        warming = asyncio.create_task(self._warm_up())
        await super().serve(sockets)
        if warming.done():
            warming.result()  # raises what ended the warm-up, and with it the server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one stops."""
        if self._gate.draining:
            self.should_exit = self.force_exit = True
        self._gate.draining = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or (self._gate.draining and not self._gate.open)
        return await super().on_tick(counter)

    async def _warm_up(self) -> None:
        try:
            await to_thread.run_sync(self._model.warm_up)
        except ElfError:
            self.should_exit = True
            raise
        self._gate.ready = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before the model is ready, so that a taken port is told at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return bound


def run(app: FastAPI, gate: Gate, model: Model, bound: socket.socket, root_path: str) -> None:
    """Serve until a signal comes and all texts are written."""
    note(f"{model.bundle.name} by {model.backend_reason}")
    Server(app, gate, model, root_path).run(sockets=[bound])
