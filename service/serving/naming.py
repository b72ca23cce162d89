"""Names of our Serve apps and deployments. Pure, so that gateway, fleet and tests agree without asking anyone."""

from __future__ import annotations

from service.serving.messages import Deployable

ROOT_DEPLOYMENT = "AppRoot"
ENGINE_DEPLOYMENT = "EngineReplica"


def own_prefix(instance_id: str) -> str:
    """What every Serve app of this Tunesmith starts with; apps with other names are never touched."""
    return f"tunesmith-{instance_id}-"


def gateway_app_name(instance_id: str) -> str:
    """The app of the gateways."""
    return own_prefix(instance_id) + "gateway"


def app_prefix(instance_id: str) -> str:
    """What every engine app of this Tunesmith starts with: those that the fleet starts and deletes."""
    return own_prefix(instance_id) + "engine-"


def app_name(instance_id: str, deployable: Deployable) -> str:
    """The Serve app that hosts a base or a full model; other weights under the same id give another name."""
    return app_prefix(instance_id) + deployable.key
