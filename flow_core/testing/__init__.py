"""For people who write providers, and for our own tests: a provider in memory, a clock that is moved by hand, and the
contract that every provider must pass.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("flow_core.testing.contract")  # its failures show values, wherever it is run

from flow_core.testing.contract import NASTY, ProviderContract  # noqa: E402
from flow_core.testing.fakes import FakeClock, FakeProvider  # noqa: E402

__all__ = ["NASTY", "FakeClock", "FakeProvider", "ProviderContract"]
