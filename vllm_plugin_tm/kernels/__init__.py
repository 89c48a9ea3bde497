# SPDX-License-Identifier: Apache-2.0
"""Forward math: op schemas and fakes, and the reference that defines them. No disk formats."""
