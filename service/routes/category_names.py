"""The names of clusters in JSON, documented for OpenAPI; what is exported is what `model.registry.category_names`
writes."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from model.contract import Contract
from model.errors import ClusterNotFound, InvalidCategoryNames, InvalidParameter, ModelNotFound, PreconditionFailed
from model.registry.category_names import FORMAT_VERSION, MAX_NAME_LENGTH, CategoryNames, parse_names
from service.inference.live_category_names import LiveCategoryNames
from service.responses.schemas import ModelInfo
from service.routes.administrators import require_administrator
from service.routes.json_body import describe_body, parse_body, read_small_body
from service.routes.openapi import document_problems
from service.state import get_state


class _NamesSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CategoryNameBody(_NamesSchema):
    """What a cluster is to be called."""

    category: Annotated[
        str,
        Field(
            description=f"1 to {MAX_NAME_LENGTH} printable characters; an empty one gives back the artifact's own.",
            examples=["dog"],
        ),
    ]


class UndoRequest(_NamesSchema):
    """Which edit is to be undone."""

    revision: Annotated[int, Field(ge=1, description="The one that it led to; null: the last.")] | None = None


class ClusterInfo(_NamesSchema):
    """One of the network's classes and its name."""

    cluster: Annotated[int, Field(ge=1)]
    isthing: bool
    category_id: Annotated[int | None, Field(description="As in answers; null if the cluster has no name.")]
    category: str | None
    origin: Annotated[
        Literal["given", "artifact"] | None, Field(description="Whether people gave the name or the artifact has it.")
    ]
    by: Annotated[str | None, Field(description="Who gave it: the name of a key.")]
    at: Annotated[str | None, Field(description="When, ISO 8601 in UTC.")]


class RenamedCluster(ClusterInfo):
    """One cluster after an edit."""

    revision: Annotated[int, Field(ge=0, description="Of the names, for `If-Match`.")]


class ClusterList(_NamesSchema):
    """All clusters of a model's active version."""

    model: ModelInfo
    revision: Annotated[int, Field(ge=0, description="Of the names, for `If-Match`.")]
    clusters: list[ClusterInfo]


class UserCategoryName(_NamesSchema):
    """A name that somebody gave."""

    category_name: str
    author: str
    timestamp: str
    category_id: int | None = None


class CategoryNameEdit(_NamesSchema):
    """One change; clusters by number, null for a name that nobody gave."""

    revision: int
    author: str
    timestamp: str
    before: dict[int, UserCategoryName | None]
    after: dict[int, UserCategoryName | None]


class CategoryNamesDocument(_NamesSchema):
    """All names that people gave to the clusters of one network, and the last edits."""

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    model: str
    version: str
    network_sha256: Annotated[str, Field(description="To another network these names say nothing.")]
    revision: int
    names: Annotated[dict[int, UserCategoryName], Field(description="By cluster.")]
    history: list[CategoryNameEdit]


def cluster_info(cluster: int, contract: Contract, glossary: CategoryNames) -> ClusterInfo:
    """One cluster under the names of a contract, which the glossary's are among."""
    category, given = contract.categories.get(cluster), glossary.names.get(cluster)
    return ClusterInfo(
        cluster=cluster,
        isthing=contract.is_thing(cluster),
        category_id=category.id if category else None,
        category=category.name if category else None,
        origin="given" if given else "artifact" if category else None,
        by=given.author if given else None,
        at=given.timestamp if given else None,
    )


_REVISION = re.compile(r'(?:W/)?"?(\d{1,9})"?', re.ASCII)
_CLUSTERS, _CLUSTER = "/v1/models/{name}/clusters", "/v1/models/{name}/clusters/{cluster}"
_NAMES = "/v1/models/{name}/names"
_READING = document_problems(404, 422, 503)
_CHANGING = document_problems(403, 404, 409, 412, 413, 415, 422, 500, 503, 504)
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "description": "The revision that is changed, as in ETag; without it, whichever is the last.",
    "schema": {"type": "string"},
}
_VERSION = {
    "name": "version",
    "in": "query",
    "description": "The version whose clusters are meant; without it, the active one.",
    "schema": {"type": "string"},
}
_EDIT = {"parameters": [_IF_MATCH, _VERSION]}

router = APIRouter(tags=["Names of clusters"])


@router.get(_CLUSTERS, responses=_READING, openapi_extra={"parameters": [_VERSION]})
async def list_clusters(name: str, request: Request, response: Response) -> ClusterList:
    """Every cluster of a model, its name if it has one, and who gave it."""
    names = _get_names(request, name)
    glossary, contract = names.glossary, names.contract
    _set_etag(response, glossary)
    count = contract.thing_clusters + contract.stuff_clusters
    return ClusterList(
        model=ModelInfo(name=contract.name, version=contract.version),
        revision=glossary.revision,
        clusters=[cluster_info(cluster, contract, glossary) for cluster in range(1, count + 1)],
    )


@router.put(_CLUSTER, responses=_CHANGING, openapi_extra=_EDIT | describe_body(CategoryNameBody.model_json_schema()))
async def set_category_name(name: str, cluster: int, request: Request, response: Response) -> RenamedCluster:
    """Name a cluster; every later answer carries the name. For administrators."""
    by = require_administrator(request)
    given = parse_body(await read_small_body(request), CategoryNameBody)
    return await _rename(request, response, name, cluster, given.category, by)


@router.delete(_CLUSTER, responses=_CHANGING, openapi_extra=_EDIT)
async def reset_category_name(name: str, cluster: int, request: Request, response: Response) -> RenamedCluster:
    """Take back the name that was given to a cluster: it goes by the artifact's own again. For administrators."""
    by = require_administrator(request)
    return await _rename(request, response, name, cluster, "", by)


@router.get(_NAMES, responses=_READING, openapi_extra={"parameters": [_VERSION]})
async def export_category_names(name: str, request: Request, response: Response) -> CategoryNamesDocument:
    """All names that people gave, and the last edits."""
    return _export(_get_names(request, name).glossary, response)


@router.put(
    _NAMES,
    responses=_CHANGING,
    openapi_extra=_EDIT | describe_body({"$ref": f"#/components/schemas/{CategoryNamesDocument.__name__}"}),
)
async def import_category_names(name: str, request: Request, response: Response) -> CategoryNamesDocument:
    """Put the names of an export, or of `useg names transfer`, in the place of all that were given. For administrators.

    The history stays this model's own: one edit more, which can be undone.
    """
    by = require_administrator(request)
    body = await read_small_body(request)
    names = _get_names(request, name)
    try:
        given = parse_names(body, names.contract, "the body")
    except InvalidCategoryNames as error:
        raise InvalidParameter(str(error)) from error
    return _export(await _change(request, names, lambda old: old.replace_all(given.names, by)), response)


@router.post(
    f"{_NAMES}/undo",
    responses=_CHANGING,
    openapi_extra=_EDIT | describe_body(UndoRequest.model_json_schema(), is_required=False),
)
async def undo_edit(name: str, request: Request, response: Response) -> CategoryNamesDocument:
    """Give the clusters of an edit the names that they had before it. For administrators."""
    by = require_administrator(request)
    undone = parse_body(await read_small_body(request) or b"{}", UndoRequest)
    changed = await _change(request, _get_names(request, name), lambda old: old.undo(by, undone.revision))
    return _export(changed, response)


async def _rename(
    request: Request, response: Response, name: str, cluster: int, category: str, by: str
) -> RenamedCluster:
    names = _get_names(request, name)
    _require_cluster(cluster, names.contract)
    glossary = await _change(request, names, lambda old: old.rename({cluster: category}, by))
    _set_etag(response, glossary)
    facts = cluster_info(cluster, names.apply(glossary), glossary)
    return RenamedCluster(**facts.model_dump(), revision=glossary.revision)


async def _change(
    request: Request, names: LiveCategoryNames, change: Callable[[CategoryNames], CategoryNames]
) -> CategoryNames:
    """The names after a change of the revision that the request means, which was written."""
    expected = _parse_if_match(request)

    def change_expected(old: CategoryNames) -> CategoryNames:
        if expected not in (None, old.revision):
            raise PreconditionFailed(f"the names are at revision {old.revision}, not {expected}: look at them again")
        return change(old)

    changed, edit = await asyncio.to_thread(names.change, change_expected)
    if edit:
        get_state(request).telemetry.category_name_edits.labels(names.contract.name).inc()
    return changed


def _get_names(request: Request, name: str) -> LiveCategoryNames:
    """The names of the version that is asked for, or of the active one.

    Raises ModelNotFound, also for a version that is not open, and NotReady while none is active.
    """
    rollout = get_state(request).model_repository.find(name)
    active = rollout.require()
    wanted = request.query_params.get("version", active.contract.version)
    others = [each.pipeline for each in rollout.list_deployments()]
    found = [each for each in (active, *others) if each and each.contract.version == wanted]
    if not found:
        raise ModelNotFound(f"{name} answers with version {active.contract.version}, not with {wanted!r}: ask again")
    return found[0].names


def _require_cluster(cluster: int, contract: Contract) -> None:
    count = contract.thing_clusters + contract.stuff_clusters
    if not 1 <= cluster <= count:
        raise ClusterNotFound(f"{contract.name} {contract.version} has no cluster {cluster}: there are 1..{count}")


def _parse_if_match(request: Request) -> int | None:
    given = request.headers.get("if-match", "*").strip()
    if given == "*":
        return None
    match = _REVISION.fullmatch(given)
    if not match:
        raise InvalidParameter(f'If-Match must be a revision such as "3", as ETag tells it, got {given!r}')
    return int(match[1])


def _export(glossary: CategoryNames, response: Response) -> CategoryNamesDocument:
    _set_etag(response, glossary)
    return CategoryNamesDocument.model_validate(json.loads(glossary.to_json()))


def _set_etag(response: Response, glossary: CategoryNames) -> None:
    response.headers["ETag"] = f'"{glossary.revision}"'
    response.headers["Cache-Control"] = "no-cache"
