"""The local provider keeps the contract."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from flow_core.testing import ProviderContract


class TestLocalProvider(ProviderContract):
    patience_s = float(os.environ.get("FLOW_CONTRACT_PATIENCE_S", "60"))

    @pytest.fixture
    def environment(self, home: Path) -> Mapping[str, str]:
        config = home.parent / "config.yaml"
        config.write_text("local:\n  kill_grace_s: 1.5\n")
        return {"FLOW_LOCAL_HOME": str(home), "FLOW_LOCAL_GPUS": "2", "FLOW_CONFIG": str(config)}
