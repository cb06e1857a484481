"""The Python models of a Triton repository, which ``elf-rt triton`` writes. Triton's Python backend imports this."""

import asyncio
import json
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

import elf_rt
from elf_rt.errors import ElfError, InputError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
DRAFTS_EVERY = 4


class _Loaded:
    """Loads the bundle that config.pbtxt names, and reads requests."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        bundle, backend, precision, threads, max_queue = (
            parameters[name]["string_value"] for name in ("bundle", "backend", "precision", "threads", "max_queue")
        )
        self.model = elf_rt.load(bundle, backend, precision=precision, threads=int(threads) if threads else None)
        self.max_queue = int(max_queue)
        self.model.warm_up()

    def finalize(self) -> None:
        self.model.close()

    def read(self, request: Any) -> list[elf_rt.Text]:
        """The texts of a request, one for each prompt or seed."""
        prompts, seeds = _values(request, "PROMPT"), _values(request, "SEED")
        steps, scales = _values(request, "STEPS"), _values(request, "GUIDANCE_SCALE")
        texts = []
        for k in range(len(prompts or seeds)):
            prompt = _decoded(prompts[k]) if prompts else None
            params = self.model.params(steps=steps[k] if steps else None, guidance_scale=scales[k] if scales else None)
            texts.append(elf_rt.Text(prompt, seed=seeds[k] if seeds else secrets.randbits(32), params=params))
        return texts


class Batched(_Loaded):
    """``elf``: the requests that Triton has batched, answered together when the last of their texts is written."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self._answer, requests))

    def _answer(self, request: Any) -> Any:
        try:
            results = self.model.write(self.read(request))
        except ElfError as error:
            return _failed(error)
        return _response(
            TEXT=np.array([[(result.text or "").encode()] for result in results], object),
            SEED=np.array([[result.seed] for result in results], np.uint64),
            IDS=np.stack([result.ids for result in results]),
        )


class Streamed(_Loaded):
    """``elf_stream``: one text a request, with drafts. Triton goes on with other requests while these are awaited, and
    the engine batches them. The text itself is the answer of which DRAFT is false."""

    async def execute(self, requests: Sequence[Any]) -> None:
        await asyncio.gather(*(self._answer(request, request.get_response_sender()) for request in requests))

    async def _answer(self, request: Any, sender: Any) -> None:
        if self.model.stats().waiting >= self.max_queue:
            told = f"{self.max_queue} texts are waiting: try again"
            sender.send(_error(told, pb_utils.TritonError.UNAVAILABLE), FINAL)
            return
        try:
            (text,) = self.read(request)
            (every,) = _values(request, "DRAFTS_EVERY") or [DRAFTS_EVERY]
            pending = self.model.submit(text, drafts_every=every)
            async for draft in pending:
                if sender.is_cancelled():
                    pending.cancel()
                elif draft.texts is not None:
                    sender.send(_piece(text, draft.texts[0], draft.step))
            result = await pending
        except asyncio.CancelledError:
            sender.send(flags=FINAL)
        except ElfError as error:
            sender.send(_failed(error), FINAL)
        else:
            sender.send(_piece(text, result.text), FINAL)


def _piece(text: elf_rt.Text, written: str | None, draft: int | None = None) -> Any:
    """A draft after so many steps, or the whole text."""
    assert text.params is not None
    steps = text.params.steps
    return _response(
        TEXT=np.array([(written or "").encode()], object),
        SEED=np.array([text.seed], np.uint64),
        DRAFT=np.array([draft is not None]),
        STEP=np.array([steps if draft is None else draft], np.int32),
        STEPS=np.array([steps], np.int32),
    )


def _response(**columns: np.ndarray) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, column) for name, column in columns.items()])


def _failed(error: ElfError) -> Any:
    code = pb_utils.TritonError.INVALID_ARG if isinstance(error, InputError) else pb_utils.TritonError.INTERNAL
    return _error(str(error), code)


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _values(request: Any, name: str) -> list[Any]:
    """An input as a list; empty where the request leaves it out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def _decoded(prompt: bytes) -> str:
    try:
        return prompt.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"PROMPT is not UTF-8 (byte {error.start})") from error
