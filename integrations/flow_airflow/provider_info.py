"""What Airflow's provider manager reads through the `apache_airflow_provider` entry point."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Describe this package the way `airflow providers list` expects it."""
    integration = "Flow"
    return {
        "package-name": "flow-gpu",
        "name": "Flow",
        "description": "Run a command or a pure Python function on a GPU machine.",
        "integrations": [
            {
                "integration-name": integration,
                "external-doc-url": "https://pypi.org/project/flow-gpu/",
                "tags": ["service"],
            }
        ],
        "operators": [{"integration-name": integration, "python-modules": ["flow_airflow.operators"]}],
        "sensors": [{"integration-name": integration, "python-modules": ["flow_airflow.sensors"]}],
        "triggers": [{"integration-name": integration, "python-modules": ["flow_airflow.triggers"]}],
    }
