"""The names of clusters in JSON, documented for OpenAPI; what is exported is what `model.glossary` writes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.contract import Contract
from model.glossary import FORMAT_VERSION, MOST_CHARACTERS, Glossary
from service.answers.schemas import ModelInfo


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ClusterName(_Schema):
    """What a cluster is to be called."""

    category: Annotated[
        str,
        Field(
            description=f"1 to {MOST_CHARACTERS} printable characters; an empty one gives back the artifact's own.",
            examples=["dog"],
        ),
    ]


class UndoneEdit(_Schema):
    """Which edit is to be undone."""

    revision: Annotated[int, Field(ge=1, description="The one that it led to; null: the last.")] | None = None


class ClusterInfo(_Schema):
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


class NamedCluster(ClusterInfo):
    """One cluster after an edit."""

    revision: Annotated[int, Field(ge=0, description="Of the names, for `If-Match`.")]


class ClusterList(_Schema):
    """All clusters of a model's active version."""

    model: ModelInfo
    revision: Annotated[int, Field(ge=0, description="Of the names, for `If-Match`.")]
    clusters: list[ClusterInfo]


class GivenName(_Schema):
    """A name that somebody gave."""

    category: str
    by: str
    at: str


class NameEdit(_Schema):
    """One change; clusters by number, null for a name that nobody gave."""

    revision: int
    by: str
    at: str
    before: dict[int, GivenName | None]
    after: dict[int, GivenName | None]


class GlossaryDocument(_Schema):
    """All names that people gave to the clusters of one network, and the last edits."""

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    model: str
    version: str
    network_sha256: Annotated[str, Field(description="To another network these names say nothing.")]
    revision: int
    names: Annotated[dict[int, GivenName], Field(description="By cluster.")]
    history: list[NameEdit]


def describe_cluster(cluster: int, contract: Contract, glossary: Glossary) -> ClusterInfo:
    """One cluster under the names of a contract, which the glossary's are among."""
    category, given = contract.categories.get(cluster), glossary.names.get(cluster)
    return ClusterInfo(
        cluster=cluster,
        isthing=contract.is_thing(cluster),
        category_id=category.id if category else None,
        category=category.name if category else None,
        origin="given" if given else "artifact" if category else None,
        by=given.by if given else None,
        at=given.at if given else None,
    )
