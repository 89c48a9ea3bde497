# SPDX-License-Identifier: Apache-2.0
"""This package's environment variables: the only user of os.environ, every value validated."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PREFIX = "VLLM_PLUGIN_TM"

ISAS = ("amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2")
SCHEMES = ("w4a16", "w8a16", "w4a8", "w8a8", "fp8", "fp4")


class EnvError(ValueError):
    """A variable of ours has a value, or a name, that this package does not know."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    `default` is used when the variable is unset or empty. `accepted` spells out, for people, what
    `parse` takes; `parse` turns the text into the value and raises ValueError for anything else.
    """

    name: str
    doc: str
    default: str
    accepted: str
    parse: Callable[[str], object]
    compiled_in: bool = True

    def read(self) -> object:
        """The value now. Raises EnvError naming variable, value and accepted spellings."""
        text = os.environ.get(self.name, "") or self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise EnvError(
                f"{self.name}={text!r} is not understood: accepted are {self.accepted}"
            ) from error


def _one_of(**values: object) -> Callable[[str], object]:
    def parse(text: str) -> object:
        if text not in values:
            raise ValueError(text)
        return values[text]

    return parse


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def _schemes(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(SCHEMES):
        raise ValueError(text)
    return tuple(dict.fromkeys(names))


def _file(text: str) -> str:
    path = Path(text)
    if text and (path.suffix != ".json" or path.is_dir() or not path.parent.is_dir()):
        raise ValueError(text)
    return text


SWITCH = Variable(
    name=PREFIX,
    doc="The switch: 1 lets this package's kernels take the layers they support.",
    default="0",
    accepted='"0" or "" (off), "1" (on)',
    parse=_switch,
)
ISA = Variable(
    name=f"{PREFIX}_ISA",
    doc="The instruction set to use; auto takes the best one that the processor has.",
    default="auto",
    accepted=", ".join(f'"{name}"' for name in ("auto", *ISAS)),
    parse=_one_of(**{name: name for name in ("auto", *ISAS)}),
)
TAKEN_SCHEMES = Variable(
    name=f"{PREFIX}_SCHEMES",
    doc="The quantization schemes to take, separated by commas; the others stay upstream's.",
    default=",".join(SCHEMES),
    accepted="a comma-separated list of " + ", ".join(f'"{name}"' for name in SCHEMES),
    parse=_schemes,
)
INT8_ACTIVATIONS = Variable(
    name=f"{PREFIX}_W4A16_INT8_ACTIVATIONS",
    doc=(
        "1 trades accuracy for speed: W4A16 layers whose groups are 32 or longer round their "
        "activations to int8, with a scale for each token and group."
    ),
    default="0",
    accepted='"0" (activations are kept), "1" (rounded to int8)',
    parse=_switch,
)

CUDA_TUNING = Variable(
    name=f"{PREFIX}_CUDA_TUNING",
    doc=(
        "A file of measured tiles of the CUDA kernels: layers that it does not know are measured "
        "when they are loaded, and added. Results stay the same, bit for bit."
    ),
    default="",
    accepted='"" (tiles are reckoned), the path of a .json file in a folder that exists',
    parse=_file,
    compiled_in=False,
)

VARIABLES: tuple[Variable, ...] = (SWITCH, ISA, TAKEN_SCHEMES, INT8_ACTIVATIONS, CUDA_TUNING)


def enabled() -> bool:
    """Whether the switch is on. Raises EnvError for a value that is neither on nor off."""
    return bool(SWITCH.read())


def isa() -> str:
    """The instruction set asked for: "auto" or a member of ISAS."""
    return str(ISA.read())


def schemes() -> tuple[str, ...]:
    """The schemes that may be taken, members of SCHEMES, each once."""
    value = TAKEN_SCHEMES.read()
    assert isinstance(value, tuple)
    return value


def w4a16_int8_activations() -> bool:
    """Whether W4A16 layers are to round their activations to int8."""
    return bool(INT8_ACTIVATIONS.read())


def cuda_tuning() -> str:
    """The file of measured tiles, "" for none."""
    return str(CUDA_TUNING.read())


def validate() -> None:
    """Reads every variable once. Raises EnvError for a bad value or a name that we do not have.

    vLLM only warns of unknown VLLM_ names; a misspelt one of ours would silently do nothing.
    """
    known = [variable.name for variable in VARIABLES]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise EnvError(
                f"{name} is not a variable of this package: did you mean {near}? "
                f"Known are {', '.join(known)}"
            )
    for variable in VARIABLES:
        variable.read()


def given() -> tuple[str, ...]:
    """Names of our variables that are present in the environment."""
    return tuple(variable.name for variable in VARIABLES if variable.name in os.environ)


def text(name: str) -> str:
    """The raw text of one of our variables, its default where unset. Never raises for its value.

    This is what vLLM hashes into its compile-cache key, so that a graph that was compiled with
    the switch on is never reused with the switch off. Empty for a variable that no graph
    depends on.
    """
    variable = next(variable for variable in VARIABLES if variable.name == name)
    if not variable.compiled_in:
        return ""
    return os.environ.get(name, "") or variable.default


_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # the largest of its sets without AMX


def keep_onednn_from_amx() -> None:
    """Tells oneDNN, in torch and in vLLM, here and in children, to do without AMX: the bench's."""
    os.environ[_ONEDNN[0]] = _ONEDNN[1]


def onednn_kept_from_amx() -> bool:
    """Whether it has been told so."""
    return os.environ.get(_ONEDNN[0]) == _ONEDNN[1]
