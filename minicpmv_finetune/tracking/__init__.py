"""What is remembered of runs and models: MLflow runs, the model registry and the promotion record."""
