"""Who is let in: a bounded number of texts, deadlines that will be met, and what is told to the others."""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from elf_rt.model import Model, Text
from elf_rt.sampling.driver import MAX_SLOTS
from elf_rt.sampling.outlook import Load
from elf_rt.serve.errors import ApiError
from elf_rt.serve.metrics import Metrics

RECENT = 32  # texts that were over last, which say whether others follow them


class Gate:
    """Counts the texts that are let in and not over. ready: warmed up; draining: nobody is let in any more.

    A prediction runs the driver ahead: the texts in flight, those that wait, these, and others that follow those that
    are over, in the share in which they did so lately, since they will take turns too.
    """

    def __init__(self, model: Model, max_waiting: int, metrics: Metrics) -> None:
        self._model, self._limit, self._metrics = model, MAX_SLOTS + max_waiting, metrics
        self._lock = threading.Lock()
        self._came: deque[tuple[float, Load]] = deque(maxlen=4 * RECENT)  # when
        self._over: deque[float] = deque(maxlen=RECENT)
        self._accepted: dict[object, list[Load]] = {}  # and not submitted yet: their prompts are being encoded
        self.open = 0
        self.ready = False
        self.draining = False

    def enter(self, texts: int) -> None:
        """Let texts in, for each of which ``leave`` is called once.

        Raises:
            ApiError: 503 while not ready or draining, 429 where there is no room, with the seconds until there is.
        """
        if self.draining or not self.ready:
            state = "is shutting down" if self.draining else "is warming up"
            raise self._refusal(texts, 503, f"the server {state}: try again", "not_ready", 1)
        if self.open + texts > self._limit:
            over = self.open + texts - self._limit
            wait = self._seconds_until_room(over)
            message = f"{self.open} texts are on their way, of at most {self._limit}: try again in {wait} s"
            raise self._refusal(texts, 429, message, "queue_full", wait)
        self.open += texts

    def leave(self, texts: int) -> None:
        self.open -= texts

    def predict(
        self, texts: Sequence[Text], drafts_every: int, deadline_ms: int | None, asked_by: object
    ) -> list[float | None]:
        """Milliseconds until each text is written if it is submitted now; None while no call of its length was
        made. They count as there from now on, so ``submitted`` is to be called. May be called from any thread.

        Raises:
            InputError: a text is not possible. ApiError: a text would miss the deadline, or nobody can tell.
        """
        outlook, loads = self._model.outlook(texts, drafts_every)
        predicted: list[float | None] = [None] * len(loads)
        with self._lock:
            accepted = list(chain.from_iterable(self._accepted.values()))
            outlook = replace(outlook, texts=[*outlook.texts, *accepted])
            if outlook.known(loads):
                following = [load for _, load in self._came] or loads
                predicted = [1e3 * seconds for seconds in outlook.finishes(loads, self._followed(), following)]
            if deadline_ms is not None:
                self._refuse_late(predicted, deadline_ms)
            self._came.extend((time.monotonic(), load) for load in loads)
            self._accepted[asked_by] = loads
        return predicted

    def submitted(self, asked_by: object) -> None:
        """These texts are known to the model now, or will not come."""
        with self._lock:
            self._accepted.pop(asked_by, None)

    def written(self) -> None:
        """A text is over that was let in."""
        with self._lock:
            self._over.append(time.monotonic())

    def _followed(self) -> float:
        """Texts that came for each that was over lately; 1 while none was."""
        if not self._over:
            return 1.0
        return min(1.0, sum(at > self._over[0] for at, _ in self._came) / len(self._over))

    def _refuse_late(self, predicted: Sequence[float | None], deadline_ms: int) -> None:
        if None in predicted:
            raise self._refusal(len(predicted), 503, "no text of this length was written yet", "no_prediction", 1)
        longest = max(ms for ms in predicted if ms is not None)
        if longest > deadline_ms:
            message = f"this would take {math.ceil(longest)} ms, more than deadline_ms {deadline_ms}"
            raise self._refusal(len(predicted), 504, message, "deadline")

    def _seconds_until_room(self, texts: int) -> int:
        outlook, _ = self._model.outlook()
        if not outlook.known() or not outlook.texts:
            return 1
        finishes = sorted(outlook.finishes())
        return max(1, math.ceil(finishes[min(texts, len(finishes)) - 1]))

    def _refusal(self, texts: int, status: int, message: str, code: str, retry_after: int | None = None) -> ApiError:
        self._metrics.rejected.labels(code).inc(texts)
        return ApiError(status, message, code=code, retry_after=retry_after)
