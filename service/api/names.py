"""Clusters get names while they are used; whoever may change what is served gives them."""

import asyncio
import json
import re
from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model.contract import Contract
from model.errors import ClusterUnknown, ModelNotFound, NamesError, OptionInvalid, RevisionPassed
from model.glossary import Glossary, parse_glossary
from service.answers.schemas import ModelInfo
from service.api.administrators import require_administrator
from service.api.json_body import describe_body, parse_body, read_small_body
from service.api.names_schemas import (
    ClusterList,
    ClusterName,
    GlossaryDocument,
    NamedCluster,
    UndoneEdit,
    describe_cluster,
)
from service.api.reference import describe_problems
from service.artifact.names import Names
from service.parts import get_parts

_REVISION = re.compile(r'(?:W/)?"?(\d{1,9})"?', re.ASCII)
_CLUSTERS, _CLUSTER = "/v1/models/{name}/clusters", "/v1/models/{name}/clusters/{cluster}"
_NAMES = "/v1/models/{name}/names"
_READING = describe_problems(404, 422, 503)
_CHANGING = describe_problems(403, 404, 409, 412, 413, 415, 422, 500, 503, 504)
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
    names = _find(request, name)
    glossary, contract = names.glossary, names.contract
    _mark(response, glossary)
    count = contract.thing_clusters + contract.stuff_clusters
    return ClusterList(
        model=ModelInfo(name=contract.name, version=contract.version),
        revision=glossary.revision,
        clusters=[describe_cluster(cluster, contract, glossary) for cluster in range(1, count + 1)],
    )


@router.put(_CLUSTER, responses=_CHANGING, openapi_extra=_EDIT | describe_body(ClusterName.model_json_schema()))
async def name_cluster(name: str, cluster: int, request: Request, response: Response) -> NamedCluster:
    """Name a cluster; every later answer carries the name. For administrators."""
    by = require_administrator(request)
    given = parse_body(await read_small_body(request), ClusterName)
    return await _rename(request, response, name, cluster, given.category, by)


@router.delete(_CLUSTER, responses=_CHANGING, openapi_extra=_EDIT)
async def forget_name(name: str, cluster: int, request: Request, response: Response) -> NamedCluster:
    """Take back the name that was given to a cluster: it goes by the artifact's own again. For administrators."""
    by = require_administrator(request)
    return await _rename(request, response, name, cluster, "", by)


@router.get(_NAMES, responses=_READING, openapi_extra={"parameters": [_VERSION]})
async def export_names(name: str, request: Request, response: Response) -> GlossaryDocument:
    """All names that people gave, and the last edits."""
    return _export(_find(request, name).glossary, response)


@router.put(
    _NAMES,
    responses=_CHANGING,
    openapi_extra=_EDIT | describe_body({"$ref": f"#/components/schemas/{GlossaryDocument.__name__}"}),
)
async def import_names(name: str, request: Request, response: Response) -> GlossaryDocument:
    """Put the names of an export, or of `useg-model carry`, in the place of all that were given. For administrators.

    The history stays this model's own: one edit more, which can be undone.
    """
    by = require_administrator(request)
    body = await read_small_body(request)
    names = _find(request, name)
    try:
        given = parse_glossary(body, names.contract, "the body")
    except NamesError as error:
        raise OptionInvalid(str(error)) from error
    return _export(await _change(request, names, lambda old: old.adopt(given.names, by)), response)


@router.post(
    f"{_NAMES}/undo",
    responses=_CHANGING,
    openapi_extra=_EDIT | describe_body(UndoneEdit.model_json_schema(), is_required=False),
)
async def undo_edit(name: str, request: Request, response: Response) -> GlossaryDocument:
    """Give the clusters of an edit the names that they had before it. For administrators."""
    by = require_administrator(request)
    undone = parse_body(await read_small_body(request) or b"{}", UndoneEdit)
    changed = await _change(request, _find(request, name), lambda old: old.undo(by, undone.revision))
    return _export(changed, response)


async def _rename(
    request: Request, response: Response, name: str, cluster: int, category: str, by: str
) -> NamedCluster:
    names = _find(request, name)
    _require_cluster(cluster, names.contract)
    glossary = await _change(request, names, lambda old: old.rename({cluster: category}, by))
    _mark(response, glossary)
    facts = describe_cluster(cluster, names.apply(glossary), glossary)
    return NamedCluster(**facts.model_dump(), revision=glossary.revision)


async def _change(request: Request, names: Names, change: Callable[[Glossary], Glossary]) -> Glossary:
    """The names after a change of the revision that the request means, which was written."""
    expected = _read_revision(request)

    def change_expected(old: Glossary) -> Glossary:
        if expected not in (None, old.revision):
            raise RevisionPassed(f"the names are at revision {old.revision}, not {expected}: look at them again")
        return change(old)

    changed, edit = await asyncio.to_thread(names.change, change_expected)
    if edit:
        get_parts(request).telemetry.name_edits.labels(names.contract.name).inc()
    return changed


def _find(request: Request, name: str) -> Names:
    """The names of the version that is asked for, or of the active one.

    Raises ModelNotFound, also for a version that is not open, and NotReady while none is active.
    """
    rollout = get_parts(request).fleet.find(name)
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
        raise ClusterUnknown(f"{contract.name} {contract.version} has no cluster {cluster}: there are 1..{count}")


def _read_revision(request: Request) -> int | None:
    given = request.headers.get("if-match", "*").strip()
    if given == "*":
        return None
    match = _REVISION.fullmatch(given)
    if not match:
        raise OptionInvalid(f'If-Match must be a revision such as "3", as ETag tells it, got {given!r}')
    return int(match[1])


def _export(glossary: Glossary, response: Response) -> GlossaryDocument:
    _mark(response, glossary)
    return GlossaryDocument.model_validate(json.loads(glossary.render()))


def _mark(response: Response, glossary: Glossary) -> None:
    response.headers["ETag"] = f'"{glossary.revision}"'
    response.headers["Cache-Control"] = "no-cache"
