"""What runs on the machine with the GPUs. Standard library only, Python 3.8+, imports nothing of ours."""

from __future__ import annotations


def source(name: str) -> bytes:
    """Return the text of one of these files, such as `call.py`, for sending. Raises FileNotFoundError."""
    from pathlib import Path

    return (Path(__file__).parent / name).read_bytes()
