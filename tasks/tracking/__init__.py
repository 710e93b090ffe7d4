"""MLflow: the runs that show what happened, and the registry that says which model serves.

A flow run is one MLflow run, each of its stages a run nested in it; stage directories stay the one truth, so nothing
here is read back to decide what has to be computed. All of it runs in the flow's process, which a
stage's worker tells its metrics. Nothing outside this package imports mlflow, and here only functions do: it takes
seconds.

    store = open_store(workspace)
    parent = start_run(store, config, tags)
    run = stage_run(store, parent, "sft", directory)    # what its worker tells goes to Tracker(store.uri, run)
    finish_stage(store, run, ref, datasets)             # or link_cached(store, parent, ref) if it was done
    version = register_version(store, "chat-policy", folder, parent, tags)
    end_run(store, parent, "FINISHED")
"""

from tasks.tracking.inputs import Source, log_model, log_sources
from tasks.tracking.redaction import flattened, redacted
from tasks.tracking.registry import (
    CANDIDATE,
    CHAMPION,
    PREVIOUS,
    Version,
    add_to_description,
    alias,
    delete_version,
    fetch_version,
    find_version,
    model_tags,
    named_version,
    read_file,
    register_version,
    registered_names,
    registry_lock,
    set_alias,
    tag_model,
    tag_version,
    versions,
)
from tasks.tracking.runs import (
    FLOW_RUN,
    end_dead,
    end_run,
    finish_stage,
    link_cached,
    log_file,
    log_table,
    run_of,
    set_status,
    stage_run,
    start_run,
)
from tasks.tracking.store import Store, connect, how_to_open, model_url, open_store, run_url
from tasks.tracking.tracker import Tracker

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "FLOW_RUN",
    "PREVIOUS",
    "Source",
    "Store",
    "Tracker",
    "Version",
    "add_to_description",
    "alias",
    "connect",
    "delete_version",
    "end_dead",
    "end_run",
    "fetch_version",
    "find_version",
    "finish_stage",
    "flattened",
    "how_to_open",
    "link_cached",
    "log_file",
    "log_model",
    "log_sources",
    "log_table",
    "model_tags",
    "model_url",
    "named_version",
    "open_store",
    "read_file",
    "redacted",
    "register_version",
    "registered_names",
    "registry_lock",
    "run_of",
    "run_url",
    "set_alias",
    "set_status",
    "stage_run",
    "start_run",
    "tag_model",
    "tag_version",
    "versions",
]
