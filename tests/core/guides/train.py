"""A user's module: nothing of ours in it."""

# mypy: ignore-errors

import os


def train_model(data_path: str, epochs: int = 100):
    # Training logic
    return {"accuracy": 0.95, "epochs": epochs, "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}


if __name__ == "__main__":
    print("loss: 0.01 with batches of", os.environ.get("BATCH_SIZE", "64"))
