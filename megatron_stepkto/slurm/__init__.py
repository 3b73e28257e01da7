"""A run as a chain of Slurm jobs. Nothing here runs inside a job: that is slurm/*.sbatch."""
