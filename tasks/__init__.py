"""One Prefect task per step, and the plain functions inside."""
