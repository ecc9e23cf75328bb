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
        "task-decorators": [{"name": "flow_gpu", "class-name": "flow_airflow.decorators.flow_gpu_task"}],
        "extra-links": ["flow_airflow.links.FlowTaskLink"],
        "connection-types": [_connection_type()],
        "hooks": [{"integration-name": integration, "python-modules": ["flow_airflow.hooks"]}],
        "operators": [
            {
                "integration-name": integration,
                "python-modules": [
                    "flow_airflow.operators",
                    "flow_airflow.cancelling",
                    "flow_airflow.sessions",
                    "flow_airflow.volumes",
                ],
            }
        ],
        "sensors": [{"integration-name": integration, "python-modules": ["flow_airflow.sensors"]}],
        "triggers": [
            {
                "integration-name": integration,
                "python-modules": ["flow_airflow.triggers", "flow_airflow.sensors"],
            }
        ],
    }


def _connection_type() -> dict[str, Any]:
    """Describe the form of a connection. What its fields mean is said in `flow_airflow.connections`."""
    text = {"type": ["string", "null"]}

    def field(label: str, description: str, **schema: Any) -> dict[str, Any]:
        return {"label": label, "description": description, "schema": {**text, **schema}}

    return {
        "connection-type": "flow",
        "hook-class-name": "flow_airflow.hooks.FlowHook",
        "hook-name": "Flow",
        "ui-field-behaviour": {
            "hidden-fields": ["schema"],
            "relabeling": {
                "host": "Host (ssh: one or more, with commas; slurm: the login node)",
                "login": "User on the host",
                "port": "Port of SSH",
                "password": "API key (of a cloud)",
                "extra": "Settings",
            },
            "placeholders": {
                "host": "gpu1.example.org",
                "login": "ada",
                "port": "22",
                "extra": '{"retention_days": 3}',
            },
        },
        "conn-fields": {
            "provider": field(
                "Provider", "Where tasks run: local, ssh, slurm, or another that is installed."
            ),
            "default_instance_type": field(
                "Default machine", "For tasks that do not say which: a100, 8xh100, cpu …"
            ),
            "home": field(
                "Folder for tasks", "On the machines that run them. Left out: in the user's home folder."
            ),
            "python": field("Python", "Runs functions and scripts there, for example /opt/conda/bin/python."),
            "identity_file": field("SSH key file", "Its path on the workers and the triggerer."),
            "private_key": field("SSH key", "Its text, in place of a file.", format="password"),
            "host_key": field("Public key of the host", "In place of known_hosts: ssh-ed25519 AAAA…"),
            "partition": field("Slurm partition", "For providers of type slurm."),
            "account": field("Slurm account", "For providers of type slurm."),
            "task_url": field(
                "Page about a task", "A dashboard's address with {task_id} in it, for the link on tasks."
            ),
        },
    }
