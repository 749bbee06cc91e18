"""What people read about a run: its plan before, its metrics and its HTML report after. Imports neither training nor DeepSpeed."""
