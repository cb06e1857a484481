"""What becomes of an opened model in a forked child."""

import ctypes
import os
import weakref

_parts: "weakref.WeakSet[object]" = weakref.WeakSet()


def keep_in_child(*parts: object) -> None:
    """Parts that a forked child must never free: it has none of the threads that an engine library waits for then."""
    _parts.update(parts)


def _keep() -> None:
    for part in _parts:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))  # nobody gives this reference back


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep)
