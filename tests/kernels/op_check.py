# SPDX-License-Identifier: Apache-2.0
"""torch's own check of an op, on its own feet."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

_EXCLUDED = torch._C.DispatchKey.Python


def python_dispatch_is_off() -> bool:
    """Whether this thread is as inside of torch's no_dispatch, where nothing can be traced."""
    return bool(torch._C._dispatch_tls_local_exclude_set().has(_EXCLUDED))


def turn_python_dispatch_on() -> None:
    """Ends that, and says so. Seen once in some twenty thousand checks, between two of opcheck's
    own steps, and not explained: every test that traced after it failed."""
    warnings.warn("torch had left its Python dispatch off", stacklevel=2)
    torch._C._dispatch_tls_set_dispatch_key_excluded(_EXCLUDED, False)


def opcheck(op: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
    """Schema, aliasing, fake against real, dynamic shapes. Once more where torch's state, and not
    the op, has made it fail."""
    try:
        torch.library.opcheck(op, tuple(args), kwargs)
    except Exception:
        if not python_dispatch_is_off():
            raise
        turn_python_dispatch_on()
        torch.library.opcheck(op, tuple(args), kwargs)
    finally:
        if python_dispatch_is_off():
            turn_python_dispatch_on()
