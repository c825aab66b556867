"""`/v1/models/{name}/clusters` and `/names`: the category names that people give to clusters."""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from model.contract import Contract
from model.errors import ClusterNotFound, InvalidCategoryNames, InvalidParameter
from model.registry.category_names import CategoryNames, parse_names
from service.inference.live_category_names import LiveCategoryNames
from service.middleware import API_KEY, Admin, get_state
from service.problems import document_problems
from service.schemas import ModelInfo, Schema

_ETAG = re.compile(r'(?:W/)?"?(\d{1,9})"?', re.ASCII)
_READ = document_problems(404, 422, 503)
_CHANGE = document_problems(403, 404, 408, 409, 412, 413, 415, 422, 429, 500, 503)

router = APIRouter(
    prefix="/v1/models/{name}", tags=["Category names"], dependencies=API_KEY, responses=document_problems(401, 431)
)


class CategoryNameBody(Schema, defer_build=False):
    """The new name of a cluster."""

    category_name: Annotated[str, Field(examples=["dog"])]
    """1 to 80 printable characters; an empty name restores the model's own."""


class UndoRequest(Schema, defer_build=False):
    """The change to undo."""

    revision: Annotated[int | None, Field(ge=1)] = None
    """Revision that the change led to (default: the last)."""


class ClusterInfo(Schema):
    """A class of the network and its category name."""

    cluster_id: Annotated[int, Field(ge=1)]
    isthing: Literal[0, 1]
    category_id: int | None
    """As in results; null if the cluster has no name."""
    category_name: str | None
    origin: Literal["user", "model"] | None
    """Whether people gave the name or the model has it."""
    author: str | None
    """Name of the admin key that gave the name."""
    timestamp: str | None
    """Time of the change, ISO 8601 in UTC."""


class RenamedCluster(ClusterInfo):
    """A cluster after a change."""

    revision: Annotated[int, Field(ge=0)]
    """Revision of the names, for `If-Match`."""


class ClusterList(Schema):
    """All clusters of a version."""

    model: ModelInfo
    revision: Annotated[int, Field(ge=0)]
    """Revision of the names, for `If-Match`."""
    clusters: list[ClusterInfo]


CategoryNamesDocument = dict[str, Any]
"""All names that people gave to the clusters of one network, and the last changes, as in `ARTIFACT.names.json`."""


async def get_names(
    name: str,
    request: Request,
    version: Annotated[str | None, Query(description="Version of the model (default: the active one).")] = None,
) -> LiveCategoryNames:
    """Return the names of a version; a FastAPI dependency.

    Raises ModelNotFound, also for a version that is not loaded, and NotReady while none is active.
    """
    return get_state(request).model_repository.routers.get(name).get_pipeline(version).names


Names = Annotated[LiveCategoryNames, Depends(get_names)]


@dataclass
class NamesEditor:
    """Changes the names of a version for one request; a FastAPI dependency."""

    request: Request
    response: Response
    author: Admin
    live: Names
    if_match: Annotated[
        str | None, Header(alias="If-Match", description="Revision to change, as in `ETag` (default: the latest).")
    ] = None

    async def change(self, change: Callable[[CategoryNames], CategoryNames]) -> CategoryNames:
        """Write a change and return the names after it. Raises PreconditionFailed for another revision."""
        names, is_changed = await asyncio.to_thread(self.live.edit, change, _parse_if_match(self.if_match))
        if is_changed:
            get_state(self.request).telemetry.category_name_edits.labels(self.live.contract.name).inc()
        _set_etag(self.response, names)
        return names

    async def rename(self, cluster: int, category_name: str) -> RenamedCluster:
        """Rename a cluster. Raises ClusterNotFound."""
        contract = self.live.contract
        count = contract.thing_clusters + contract.stuff_clusters
        if not 1 <= cluster <= count:
            raise ClusterNotFound(f"{contract.name} {contract.version} has no cluster {cluster}: there are 1..{count}")
        names = await self.change(lambda old: old.rename({cluster: category_name}, self.author))
        info = cluster_info(cluster, self.live.apply(names), names)
        return RenamedCluster(**info.model_dump(), revision=names.revision)


Editor = Annotated[NamesEditor, Depends()]


@router.get("/clusters", responses=_READ)
async def list_clusters(live: Names, response: Response) -> ClusterList:
    """List all clusters of a version with their names and who gave them."""
    names, contract = live.names, live.contract
    _set_etag(response, names)
    count = contract.thing_clusters + contract.stuff_clusters
    return ClusterList(
        model=ModelInfo(name=contract.name, version=contract.version),
        revision=names.revision,
        clusters=[cluster_info(cluster, contract, names) for cluster in range(1, count + 1)],
    )


@router.put("/clusters/{cluster_id}", responses=_CHANGE)
async def set_category_name(cluster_id: int, body: CategoryNameBody, editor: Editor) -> RenamedCluster:
    """Set the category name of a cluster, for all later results. Requires an admin key."""
    return await editor.rename(cluster_id, body.category_name)


@router.delete("/clusters/{cluster_id}", responses=_CHANGE)
async def reset_category_name(cluster_id: int, editor: Editor) -> RenamedCluster:
    """Restore the model's own name of a cluster. Requires an admin key."""
    return await editor.rename(cluster_id, "")


@router.get("/names", responses=_READ)
async def export_category_names(live: Names, response: Response) -> CategoryNamesDocument:
    """Export all names that people gave, and the last changes."""
    _set_etag(response, live.names)
    return _to_document(live.names)


@router.put("/names", responses=_CHANGE)
async def import_category_names(body: CategoryNamesDocument, editor: Editor) -> CategoryNamesDocument:
    """Replace all names by those of an export, or of `useg names transfer`; one change, which can be undone.

    Requires an admin key.
    """
    try:
        imported = parse_names(json.dumps(body).encode(), editor.live.contract, "the body")
    except InvalidCategoryNames as error:
        raise InvalidParameter(str(error)) from error
    return _to_document(
        await editor.change(lambda old: old.replace_all(imported.names, editor.author, imported.examples))
    )


@router.post("/names/undo", responses=_CHANGE)
async def undo_change(editor: Editor, body: UndoRequest | None = None) -> CategoryNamesDocument:
    """Give the clusters of a change the names that they had before it. Requires an admin key."""
    revision = body.revision if body else None
    return _to_document(await editor.change(lambda old: old.undo(editor.author, revision)))


def cluster_info(cluster: int, contract: Contract, names: CategoryNames) -> ClusterInfo:
    """Return a cluster with the name that it has in the contract, to which `names` were applied."""
    category, given = contract.categories.get(cluster), names.names.get(cluster)
    return ClusterInfo(
        cluster_id=cluster,
        isthing=1 if contract.is_thing(cluster) else 0,
        category_id=category.id if category else None,
        category_name=category.name if category else None,
        origin="user" if given else "model" if category else None,
        author=given.author if given else None,
        timestamp=given.timestamp if given else None,
    )


def _parse_if_match(text: str | None) -> int | None:
    if text is None or text.strip() == "*":
        return None
    match = _ETAG.fullmatch(text.strip())
    if not match:
        raise InvalidParameter(f'If-Match must be a revision such as "3", as in ETag, got {text!r}')
    return int(match[1])


def _to_document(names: CategoryNames) -> CategoryNamesDocument:
    document: CategoryNamesDocument = json.loads(names.to_json())
    return document


def _set_etag(response: Response, names: CategoryNames) -> None:
    response.headers["ETag"] = f'"{names.revision}"'
