"""Slurm from Python: what `megaconsa submit` hands to sbatch, and when a crashed job is given up. The jobs themselves are in slurm/."""
