"""The examples of the guide on remote functions, in its order; only the container images are left out."""

# mypy: ignore-errors

import numpy as np

import flow_core as aviato
from flow_core import SandboxDefaults, Serialization, get

# ------------------------------------------------------------ Overview

with aviato.Session() as session:

    @session.function()
    def compute(x: int, y: int) -> int:
        return x + y

    # Execute in sandbox
    result = compute.remote(2, 3).result()
    print(result)  # 5

    # -------------------------------------------------------- Basic usage

    @session.function()
    def process_data(data: dict) -> dict:
        # Code runs inside the sandbox
        import pandas as pd

        df = pd.DataFrame(data)
        return {"mean": df["value"].mean()}

    # Returns a reference immediately
    ref = compute.remote(2, 3)

    # Block for result
    result = ref.result()

    # One-liner
    result = compute.remote(2, 3).result()
    print(result)  # 5

    # -------------------------------------------------------- Execution methods

    @session.function()
    def square(x: int) -> int:
        return x * x

    # Execute for each input
    refs = square.map((x,) for x in range(10))

    # Collect all results
    results = get(refs)
    print(results)  # [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]

    @session.function()
    def add(x: int, y: int) -> int:
        return x + y

    # Each tuple is unpacked as arguments
    refs = add.map([(1, 2), (3, 4), (5, 6)])
    results = get(refs)
    print(results)  # [3, 7, 11]

    # No sandbox created - runs in current process
    result = compute.local(2, 3)
    print(result)  # 5

    # -------------------------------------------------------- Serialization modes

    @session.function(serialization=Serialization.JSON)
    def process(data: dict) -> dict:
        return {"result": data["value"] * 2}

    print(process.remote({"value": 21}).result())  # {'result': 42}

    @session.function(serialization=Serialization.PICKLE)
    def compute_numpy(arr: np.ndarray) -> np.ndarray:
        return arr * 2

    arr = np.array([1, 2, 3])
    result = compute_numpy.remote(arr).result()
    print(repr(result))  # array([2, 4, 6])

    # -------------------------------------------------------- Closures and globals

    multiplier = 10

    @session.function()
    def multiply(x: int) -> int:
        return x * multiplier  # Captures 'multiplier'

    result = multiply.remote(5).result()
    print(result)  # 50

    CONFIG = {"threshold": 0.5}

    @session.function()
    def check_value(x: float) -> bool:
        return x > CONFIG["threshold"]

    result = check_value.remote(0.7).result()
    print(result)  # True

    # -------------------------------------------------------- Container image: its workers start with its first call

    @session.function(container_image="pytorch/pytorch:latest")
    def train_model(data: dict) -> dict:
        import torch  # noqa: F401

        # GPU training code
        return {"loss": 0.01}

    # -------------------------------------------------------- Error handling

    @session.function()
    def failing_function() -> None:
        raise ValueError("Something went wrong")

    try:
        failing_function.remote().result()
    except Exception as e:
        print(
            f"Function failed: {e}".splitlines()[0]
        )  # Function failed: Remote execution failed: ValueError: Something went wrong

# ------------------------------------------------------------ Complete example

defaults = SandboxDefaults(
    tags=("remote-functions-demo",),
)

with aviato.Session(defaults=defaults) as session:
    # JSON serialization for simple types
    @session.function()
    def square(x: int) -> int:
        return x * x

    # Pickle for complex types
    @session.function(serialization=Serialization.PICKLE)
    def process_array(arr: np.ndarray) -> float:
        return float(arr.mean())

    # Single execution
    result = square.remote(7).result()
    print(f"7 squared: {result}")  # 7 squared: 49

    # Parallel execution
    refs = square.map((x,) for x in range(5))
    results = get(refs)
    print(f"Squares: {results}")  # Squares: [0, 1, 4, 9, 16]

    # NumPy example
    arr = np.array([1, 2, 3, 4, 5])
    mean = process_array.remote(arr).result()
    print(f"Array mean: {mean}")  # Array mean: 3.0
