#!/bin/sh
#SBATCH --job-name=flow-train-0123456789abcdef-1-89abcdef
#SBATCH --output=/scratch/ada/flow/tasks/0123456789abcdef/1/slurm.out
#SBATCH --open-mode=append
#SBATCH --chdir=/scratch/ada/flow/tasks/0123456789abcdef/1
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --partition=gpu
#SBATCH --gres=gpu:a100:2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=96

exec /opt/python/bin/python -I -S /scratch/ada/flow/runner/0123456789abcdef batch /scratch/ada/flow/tasks/0123456789abcdef/1
