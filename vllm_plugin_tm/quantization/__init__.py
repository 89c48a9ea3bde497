# SPDX-License-Identifier: Apache-2.0
"""Disk formats: what is supported, and the way from a checkpoint's layout to the kernels'."""
