-- Beside the database prefect: MLflow's runs and registry, and the users of its authentication.
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
