"""A model inside your own FastAPI application: requests share network calls.

BUNDLE=model.elfrt uvicorn fastapi_app:app
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request

import elf_rt


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with elf_rt.load(os.environ["BUNDLE"]) as app.state.model:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/write")
async def write(prompt: str, request: Request, seed: int = 0, steps: int = 8) -> dict[str, str | None]:
    model = request.app.state.model
    text = elf_rt.Text(prompt, seed, params=model.params(steps=steps))
    pending = await asyncio.to_thread(model.submit, text)  # it encodes the prompt
    return {"text": (await pending).text}
