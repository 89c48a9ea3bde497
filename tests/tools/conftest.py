# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of tools/ import it from the source tree, whatever way pytest was started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
