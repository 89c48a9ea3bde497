# SPDX-License-Identifier: Apache-2.0
"""Which vLLM versions this package is tested with: the one place that code, docs and tests read."""

import re

# Models ran on these (`make versions`), and their sources satisfy every contract of the patch table
# (`make compat`).
TESTED_VLLM: tuple[str, ...] = ("0.28.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
# The one that set-up installs, the newest with a wheel for CPUs: the whole suite ran with it.
INSTALLED_VLLM = "0.32.0"


def public_version(version: str) -> str:
    """The release part of a version: "0.32.0+cpu" and "0.32.0.post1" give "0.32.0"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return match.group() if match else version


def is_too_old(version: str) -> bool:
    """Whether a version is below the oldest tested one; False for one like "dev"."""
    numbers = public_version(version)
    return numbers[:1].isdigit() and _key(numbers) < _key(TESTED_VLLM[0])


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def vllm_warning(version: str) -> str | None:
    """What to tell the user of this vLLM version; None when it is a tested one."""
    if public_version(version) in TESTED_VLLM:
        return None
    return (
        f"vLLM {version} is not a version that vllm-plugin-tm was tested with "
        f"({', '.join(TESTED_VLLM)}). Every patched symbol is still checked before it is touched."
    )
