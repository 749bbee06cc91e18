"""Studies: many runs from one start, planned by one YAML file, compared in one table and one
page."""
