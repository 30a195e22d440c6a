"""MLflow, watching."""
