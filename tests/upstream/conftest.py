# SPDX-License-Identifier: Apache-2.0
"""Makes the package tools importable for the tests of the upstream runner."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
