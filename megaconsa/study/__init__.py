"""Studies: many runs from one start, planned by one YAML file.

Their results are compared in one table and one page.
"""
