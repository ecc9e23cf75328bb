"""Functions that know nothing of Airflow."""

from __future__ import annotations

import time


def train(epochs: int, rate: float) -> dict[str, float]:
    loss = 1.0
    for epoch in range(1, epochs + 1):
        time.sleep(1.5)
        loss *= 1 - rate * (1 - rate)
        print(f"epoch {epoch}/{epochs}: loss {loss:.4f}")
    return {"rate": rate, "loss": round(loss, 4), "epochs": epochs}


def pick_best(results: list[dict[str, float]]) -> dict[str, float]:
    return min(results, key=lambda result: result["loss"])
