"""What people read about a run: its metrics, its status and its HTML report.

This package imports neither training nor DeepSpeed.
"""
