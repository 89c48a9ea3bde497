# SPDX-License-Identifier: Apache-2.0
"""What a user may ask of quantization while loading, and where: vLLM's own --additional-config."""

from collections.abc import Mapping
from typing import Any

from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import (
    BLOCK_SIZES,
    MSE_WEIGHTS,
    ON_INDIVISIBLE,
    SCALES,
    SCHEMES,
    Options,
    parse_group_size,
)

KEY = "tm_online"
"""The key of --additional-config that the options are under."""

METHODS = {f"tm_{scheme.replace('-', '_')}": scheme for scheme in SCHEMES}
"""`--quantization` -> the converter's scheme."""

ROUNDINGS = ("rtn", "signed", "mse")
"""Methods of rounding that need nothing but the weights."""

LM_HEAD = "lm_head"
"""The option that needs no method: the output head's weights, of any checkpoint that has them in 16
bits."""

HEAD_SCHEMES = ("w8a16",)
"""What a head may be quantized to: the converter's schemes of these names."""

_HELP = {
    "group_size": 'a multiple of 8, or "channel"',
    "block_size": " or ".join(map(str, BLOCK_SIZES)),
    "symmetric": "true or false",
    "method": " or ".join(ROUNDINGS),
    "mse_weight": " or ".join(MSE_WEIGHTS),
    "scales": " or ".join(SCALES),
    "on_indivisible": " or ".join(ON_INDIVISIBLE),
    "ignore": "a list of modules' names, or regular expressions after re:",
    "targets": "a list of modules' names, or regular expressions after re:",
    LM_HEAD: " or ".join(HEAD_SCHEMES),
}
"""Option -> what is allowed."""


class OnlineError(ValueError):
    """The request cannot be carried out; the message has the option, its value and what may be."""


def parse(method: str, additional: object) -> Options:
    """The options of `--quantization method` in a VllmConfig's additional_config.

    Raises OnlineError for anything unknown, of a wrong type, or contradictory.
    """
    scheme = METHODS[method]
    given = options_in(additional)
    _refuse_unknown(given)
    values: dict[str, Any] = {name: _read(name, value) for name, value in given.items()}
    values.pop(LM_HEAD, None)
    if values.get("method", "rtn") not in ROUNDINGS:
        raise _wrong("method", given["method"])
    try:
        return Options(scheme, **values)
    except ConvertError as error:
        raise OnlineError(f"--quantization {method}: {KEY}: {error}") from None


def options_in(additional: object) -> dict[str, Any]:
    """What stands under KEY. Raises OnlineError where that is no object."""
    found = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
    if not isinstance(found, dict):
        raise OnlineError(
            f"--additional-config {KEY} is {found!r}; an object of options is allowed"
        )
    return found


def head_scheme(additional: object) -> str | None:
    """What the output head is to be quantized to, one of HEAD_SCHEMES; None to leave it.

    Raises OnlineError for anything else.
    """
    given = options_in(additional)
    if LM_HEAD not in given:
        return None
    return str(_read(LM_HEAD, given[LM_HEAD]))


def refuse_without_method(additional: object, quantization: str | None) -> None:
    """Raises OnlineError where options are given that nothing would act on, and for a wrong
    LM_HEAD, whatever it goes with."""
    given = options_in(additional)
    head_scheme(additional)
    if quantization in METHODS or set(given) == {LM_HEAD}:
        return
    if isinstance(additional, Mapping) and KEY in additional:
        _refuse_unknown(given)
        raise OnlineError(
            f"--additional-config has {KEY}, but --quantization is {quantization!r}; the options "
            f"are for one of {', '.join(METHODS)}, except {LM_HEAD}, which may stand alone. "
            "Drop one or give the other."
        )


def _refuse_unknown(given: dict[str, Any]) -> None:
    for name in given:
        if name not in _HELP:
            raise OnlineError(
                f"--additional-config {KEY} has {name!r} ({given[name]!r}), which is not known; "
                f"allowed are {', '.join(_HELP)}"
            )


def _read(name: str, value: object) -> object:
    """The value as Options wants it."""
    if name == "group_size":
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise _wrong(name, value)
        try:
            return parse_group_size(str(value))
        except ConvertError:
            raise _wrong(name, value) from None
    if name == "block_size":
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(name, value)
        return value
    if name == "symmetric":
        if not isinstance(value, bool):
            raise _wrong(name, value)
        return value
    if name in ("ignore", "targets"):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _wrong(name, value)
        return tuple(value)
    if not isinstance(value, str) or (name == LM_HEAD and value not in HEAD_SCHEMES):
        raise _wrong(name, value)
    return value


def _wrong(name: str, value: object) -> OnlineError:
    return OnlineError(f"--additional-config {KEY}.{name} is {value!r}; allowed is {_HELP[name]}")
