# SPDX-License-Identifier: Apache-2.0
"""The one error of conversions."""


class ConvertError(Exception):
    """A conversion cannot be started or go on; the message says what, where, and what is allowed.

    Nothing that looks finished is left behind.
    """
