# SPDX-License-Identifier: Apache-2.0
"""Which vLLM versions this package is tested with: the one place that code, docs and tests read."""

import re

# The whole suite, a real server included, ran with these.
TESTED_VLLM: tuple[str, ...] = ("0.32.0",)
# The sources of these satisfy every contract of the patch table (`make compat`).
COMPAT_VLLM: tuple[str, ...] = ("0.28.0", "0.30.0", "0.32.0")


def public_version(version: str) -> str:
    """The release part of a version: "0.32.0+cpu" and "0.32.0.post1" give "0.32.0"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return match.group() if match else version


def vllm_warning(version: str) -> str | None:
    """What to tell the user of this vLLM version; None when it is a tested one."""
    if public_version(version) in TESTED_VLLM:
        return None
    return (
        f"vLLM {version} is not a version that vllm-plugin-tm was tested with "
        f"({', '.join(TESTED_VLLM)}). Every patched symbol is still checked before it is touched."
    )
