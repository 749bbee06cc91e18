"""The first hour of a new user: every command, with real arguments, on a small corpus of their own.

`python -m tests.journey` walks in a fresh copy of the repository and prints the steps and times.
"""
