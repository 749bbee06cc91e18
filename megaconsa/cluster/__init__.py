"""Slurm jobs from Python: the commands of `megaconsa submit`, and when to give up a crashed job.

The jobs themselves are in slurm/.
"""
