"""The `rlhf` command, a file per group of commands."""
