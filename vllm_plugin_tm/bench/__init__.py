# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what is measured, against whom and against which limits. Prints nothing; the
command line (vllm_plugin_tm/cli/bench.py) shows what comes out of here."""
