"""Slurm jobs: one sbatch file for each kind, and lib.sh, the shell library that they share.

`megaconsa submit` submits them.
"""
