"""Register two raw scans from Python: `from register import Input, register`; see `registration`."""

from registration import Input, Options, Registration, register

__all__ = ["Input", "Options", "Registration", "register"]
