# SPDX-License-Identifier: Apache-2.0
"""What this package changes in upstream vLLM: a table (data) and one module per target."""
