"""Where it runs: launchers, supervision, GPU blocks, servers."""
