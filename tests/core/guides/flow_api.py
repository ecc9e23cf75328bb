"""The examples of the guide on the Flow API; left out is what needs a cloud, a terminal or a container engine."""

# mypy: ignore-errors

from flow_core import Flow, FlowApp, MountSpec, SpecRejected, TaskConfig, VolumeSpec, invoke

# ------------------------------------------------------------ Primary interface

# Initialize client (auto-discovers configuration)
flow = Flow()

# Simple execution
task = flow.run("python train.py", instance_type="a100")
task.wait()
print(task.status.value)  # completed

# Full configuration
config = TaskConfig(
    name="training-job",
    instance_type="2xa100",
    command=["python", "train.py", "--distributed"],
    volumes=[VolumeSpec(size_gb=1, name="datasets")],
    env={"BATCH_SIZE": "256"},
    max_price_per_hour=50.0,
    max_run_time_hours=24.0,
)

# ------------------------------------------------------------ Task lifecycle

# Submit and get Task object
task = flow.run(config)

# Task object provides complete control
print(f"Task ID: {task.task_id}".startswith("Task ID: training-job-"))  # True
print(f"Cost per hour: {task.cost_per_hour}")  # Cost per hour: $0.00

# Stream logs in real-time
for line in task.logs(follow=True):
    if "loss:" in line:
        print(line.strip())  # loss: 0.01 with batches of 256
    if task.is_terminal:
        break

# Wait for completion
task.wait(timeout=3600)
print(f"Status: {task.status.value}")  # Status: completed

# Graceful termination
task.cancel()

# ------------------------------------------------------------ Instance discovery

instances = flow.find_instances({"gpu_memory_gb": 0, "max_price": 10.0})
for inst in instances[:5]:
    print(f"{inst['instance_type']}: ${inst['price_per_hour']}/hr")  # 1xa100: $0.0/hr / 2xa100: $0.0/hr

instances = flow.find_instances({"gpu_memory_gb": 80, "max_price": 10.0, "region": "us-central1-b"})
print(instances[:5])  # []

# ------------------------------------------------------------ Configuration model

config = TaskConfig(
    # Basic identification
    name="training-job",
    # Instance specification (exactly ONE required)
    instance_type="a100",
    # Command specification
    command=["python", "train.py", "--epochs", "10"],
    # Environment
    image="pytorch/pytorch:2.1.0-cuda12.1-cudnn8",
    env={"WANDB_API_KEY": "...", "BATCH_SIZE": "256"},
    working_dir="/workspace",
    # Storage
    volumes=[
        VolumeSpec(size_gb=100, mount_path="/data", name="datasets"),
        VolumeSpec(volume_id="vol-abc123", mount_path="/checkpoints"),
    ],
    # Constraints
    max_price_per_hour=10.0,
    max_run_time_hours=24.0,
    region="us-central1-b",
    # Multi-node
    num_instances=1,
    # Access
    ssh_keys=["my-key"],
    # Code upload
    upload_code=True,
)
print(config.volumes[1].mount_path, config.env["WANDB_API_KEY"])  # /checkpoints ...
print(TaskConfig(gpu="a100", shell="cd /app && python train.py").shell)  # cd /app && python train.py
print(repr(TaskConfig(gpu="a100", script="import torch\n...").script))  # 'import torch\n...'

# Create new volume
volume = VolumeSpec(name="training-data", size_gb=500, mount_path="/data", interface="block", iops=3000)
print(volume.size_gb, volume.iops)  # 500 3000

# Attach existing volume
print(VolumeSpec(volume_id="vol-abc123", mount_path="/data").size_gb)  # None

# Volumes automatically mount at /volumes/<name>; custom mount paths
print(VolumeSpec(name="data", size_gb=100).mount_path)  # /volumes/data
print(VolumeSpec(name="data", mount_path="/dataset", size_gb=100).mount_path)  # /dataset

# Single GPU, multi-GPU
names = ["a100", "h100", "2xa100", "4xa100", "8xa100", "8xh100"]
print([TaskConfig(instance_type=name).instance_type for name in names] == names)  # True

# Capability-based selection
config = TaskConfig(min_gpu_memory_gb=40, max_price_per_hour=10.0)
print(config.min_gpu_memory_gb)  # 40

# S3 data, multiple sources
config = TaskConfig(
    gpu="a100",
    data_mounts=[
        MountSpec(source="s3://bucket/train", target="/train"),
        MountSpec(source="s3://bucket/val", target="/val"),
    ],
)
print(len(config.data_mounts))  # 2

# ------------------------------------------------------------ Decorator pattern

app = FlowApp()


@app.function(gpu="a100", memory=32768)
def train_model(data_path: str, epochs: int = 100):
    # Training logic
    return {"accuracy": 0.95, "loss": 0.01, "epochs": epochs}


# Remote execution
result = train_model.remote("s3://bucket/data", epochs=200)
print(result)  # {'accuracy': 0.95, 'loss': 0.01, 'epochs': 200}

# Local execution
local_result = train_model("./local_data.csv")
print(local_result)  # {'accuracy': 0.95, 'loss': 0.01, 'epochs': 100}

# Async execution
task = train_model.spawn("s3://bucket/data")
print(task.task_id.startswith("train"))  # True
print(task.result())  # {'accuracy': 0.95, 'loss': 0.01, 'epochs': 100}

# ------------------------------------------------------------ Zero-import invocation

result = invoke("train.py", "train_model", args=["s3://bucket/data"], kwargs={"epochs": 200}, gpu="a100")
print(result)  # {'accuracy': 0.95, 'epochs': 200, 'gpus': '0'}

# ------------------------------------------------------------ Code upload

task = flow.run("python train.py", instance_type="a100")
task.wait()
task = flow.run("python train.py", instance_type="a100", upload_code=False)
task.wait()
print(task.status.value)  # failed

# ------------------------------------------------------------ Volume management

# Create persistent storage
volume = flow.create_volume(size_gb=1, name="training-data")

# List volumes
volumes = flow.list_volumes()
for vol in volumes:
    print(f"{vol.name}: {vol.size_gb}GB")  # datasets: 1GB / training-data: 1GB

# Attach to task
config = TaskConfig(
    instance_type="cpu",
    command="ls -d volumes/training-data",
    volumes=[VolumeSpec(volume_id=volume.volume_id)],
)
task = flow.run(config)
task.wait()
print(task.logs().strip())  # volumes/training-data

# Delete volume
flow.delete_volume(volume.volume_id)

# ------------------------------------------------------------ Provider selection

# Explicit provider
flow = Flow(provider=flow.provider)

# ------------------------------------------------------------ Structured errors

try:
    flow.run("python train.py", instance_type="64xa100")
except SpecRejected as e:
    print(f"Error: {e.message}")  # Error: instance_type '64xa100' asks for 64 GPUs, and this machine has 2
    print("Suggestions:")  # Suggestions:
    for suggestion in e.suggestions:
        print(f"  - {suggestion[:19]}")  #   - Ask for fewer GPUs,
    print(f"Error code: {e.error_code}")  # Error code: spec-rejected
