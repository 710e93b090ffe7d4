"""Runs that wait for this one, and would look for the same: where several sets change at once, each starts one.

A run that an event started reads the sets as they are when it begins. So the one that begins has seen all that those
behind it in the queue were started for, and they are cancelled; those that come later stay, as does what a person or
the schedule started, and a run that goes on: after a person's answer, or from its checkpoints.
"""

from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterCreatedBy,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

BY_EVENTS = FlowRunFilter(
    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
    created_by=FlowRunFilterCreatedBy(type_=["AUTOMATION"]),
)


def cancel_covered() -> None:
    """Cancel the runs of this run's deployment that events started with its parameters and that have not begun.

    Call it before the run looks at what there is; outside of a deployment it does nothing.
    """
    if deployment.id is None:
        return
    own = UUID(str(flow_run.id))
    of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[UUID(deployment.id)]))
    message = f"The run {flow_run.name} began after this was asked for, and looks for the same."
    with get_client(sync_client=True) as client:
        parameters = client.read_flow_run(own).parameters
        waiting = client.read_flow_runs(deployment_filter=of_deployment, flow_run_filter=BY_EVENTS)
        covered = [run for run in waiting if run.run_count == 0 and run.parameters == parameters and run.id != own]
        for run in covered:
            client.set_flow_run_state(run.id, Cancelled(message=message))
    if covered:
        get_run_logger().info("Cancelled %d waiting runs that events started for the same.", len(covered))
