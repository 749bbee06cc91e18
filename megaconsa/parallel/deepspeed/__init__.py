"""The only package that imports DeepSpeed: the engine, its pipeline modules, and patches to it."""
