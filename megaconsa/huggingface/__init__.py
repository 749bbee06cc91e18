"""The Hugging Face format: canonical parameter names, export, loading an export, and the model file
that ships with an export.
"""
