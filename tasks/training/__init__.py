"""The RLHF core: knows neither Prefect nor MLflow."""
