#!/bin/bash -l
#SBATCH --job-name=flow-train-0123456789abcdef-1-89abcdef
#SBATCH --output=/scratch/ada/flow/tasks/0123456789abcdef/1/slurm.out
#SBATCH --open-mode=append
#SBATCH --chdir=/scratch/ada/flow/tasks/0123456789abcdef/1
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --partition=long
#SBATCH --account=vision
#SBATCH --qos="high prio"
#SBATCH --constraint=a100&nvlink
#SBATCH --reservation=course
#SBATCH --mem=64G
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --mail-type=END,FAIL
#SBATCH --comment="it's \"so\" #1"
#SBATCH --nice=5
#SBATCH --contiguous
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=6

module load cuda/12.4 || exit
module load 'odd name' || exit
source /opt/conda/bin/activate torch
export OMP_NUM_THREADS=8
exec /opt/python/bin/python -I -S /scratch/ada/flow/runner/0123456789abcdef batch /scratch/ada/flow/tasks/0123456789abcdef/1
