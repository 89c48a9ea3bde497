# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_plugin_tm.cli` is the same as `vllm-tm`."""

import sys

from vllm_plugin_tm.cli import main

if __name__ == "__main__":
    sys.exit(main())
