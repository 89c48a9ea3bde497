# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors formats; files are named as upstream names its schemes."""
