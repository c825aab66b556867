"""Versions are checked, tried, watched, rolled back and unloaded, while the previous one serves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_registry import NAME, SEGMENTS, make_registry, open_artifact
from fake_service import BLUE, draw_halves, save

from model.contract import NETWORK_FILE
from model.errors import NotReady, RegistryError
from model.registry.versions import Registry
from service.inference.pipeline import Pipeline
from service.metrics import RequestRecord, Telemetry
from service.requests import RequestContext, SegmentOptions
from service.rollout.controller import RolloutController
from service.settings import Settings

HALVES = save(draw_halves())
pytestmark = pytest.mark.anyio


class Case:
    """A controller of one model, and helpers for it."""

    def __init__(self, folder: Path, kinds: dict[str, str], changes: dict[str, Any], settings: dict[str, Any]) -> None:
        self.registry = make_registry(folder, kinds, **changes)
        self.telemetry = Telemetry()
        self.controller = RolloutController(self.registry, NAME, open_artifact, Settings(**settings), self.telemetry)

    async def load_all(self) -> None:
        """Reconcile until no version is left to be loaded."""
        await self.controller.reconcile()
        while self.controller.loading:
            await asyncio.gather(*self.controller.loading.values())
            await self.controller.reconcile()

    async def activate(self, version: str) -> None:
        self.registry.activate(NAME, version, author="test")
        await self.load_all()

    async def segment(self, key: str = "", image: bytes = HALVES) -> str:
        """Segment an image; return the version that did."""
        deadline = asyncio.get_running_loop().time() + 30.0

        async def call(pipeline: Pipeline, context: RequestContext) -> str:
            record = RequestRecord(self.telemetry)
            await pipeline.run(image, SegmentOptions(), lambda _: None, context, record, pipeline.contract)
            return pipeline.contract.version

        with self.controller.router.admit(RequestContext(deadline=deadline, routing_key=key)) as route:
            version = await route.run(call)
        self.controller.router.mirror([image])
        return version

    def list_roles(self) -> dict[str, str]:
        return {each.version: each.state for each in self.controller.describe().versions}

    def read_last(self) -> tuple[str, str | None, str]:
        event = self.registry.read_state(NAME).history[-1]
        return event.action, event.version, event.author


@asynccontextmanager
async def follow(
    folder: Path, kinds: dict[str, str], changes: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Case]:
    case = Case(folder, kinds, changes or {}, settings)
    try:
        yield case
    finally:
        await case.controller.stop()


async def test_a_new_version_serves_once_it_is_warm_and_the_old_one_until_then(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("1")
        assert await case.segment() == "1"
        case.registry.activate(NAME, "2", author="test")
        await case.controller.reconcile()
        assert case.list_roles() == {"1": "active", "2": "loading"}
        assert await case.segment() == "1"
        await case.load_all()
        assert await case.segment() == "2"
        assert case.list_roles() == {"1": "standby", "2": "active"}


async def test_without_a_rollback_window_the_old_version_is_loaded_again_for_a_rollback(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}, rollback_window_s=0.0) as case:
        await case.activate("1")
        await case.activate("2")
        assert case.list_roles() == {"1": "unloaded", "2": "active"}
        case.registry.roll_back(NAME, author="test")
        await case.load_all()
        assert await case.segment() == "1"


async def test_requests_in_flight_finish_on_the_version_they_started_with(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}, rollback_window_s=0.0) as case:
        await case.activate("1")
        context = RequestContext(deadline=asyncio.get_running_loop().time() + 30.0)
        with case.controller.router.admit(context) as route:
            await case.activate("2")
            assert case.list_roles() == {"1": "standby", "2": "active"}  # not closed: somebody is with it
            assert route.pipeline.contract.version == "1"
            record = RequestRecord(case.telemetry)
            pipeline = route.pipeline
            await pipeline.run(HALVES, SegmentOptions(), lambda _: None, context, record, pipeline.contract)
        await case.controller.reconcile()
        assert case.list_roles() == {"1": "unloaded", "2": "active"}


@pytest.mark.parametrize(
    ("kind", "words"), [("wrong", "golden answers differ"), ("nan", "not finite"), ("slow", "an image takes")]
)
async def test_a_version_that_fails_a_check_is_rejected(tmp_path: Path, kind: str, words: str) -> None:
    async with follow(tmp_path, {"1": "good", "2": kind}, canary_max_latency_ratio=2.0) as case:
        await case.activate("1")
        await case.activate("2")
        assert await case.segment() == "1"
        status = case.controller.describe()
        assert (status.active, status.serving_version, case.read_last()) == ("1", "1", ("reject", "2", "useg serve"))
        assert words in status.history[-1].reason
        assert words in (status.versions[1].reason or "")
        assert case.list_roles()["2"] == "failed"
        assert (
            case.telemetry.registry.get_sample_value("useg_rollbacks_total", {"model": NAME, "cause": "load_failed"})
            == 1
        )


@pytest.mark.parametrize("damage", ["truncated", "renamed"])
async def test_a_version_that_was_damaged_on_disk_is_rejected(tmp_path: Path, damage: str) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("1")
        case.registry.activate(NAME, "2", author="test")
        folder = case.registry.find_version(NAME, "2")
        if damage == "truncated":
            (folder / NETWORK_FILE).write_bytes(b"go")
        else:
            contract = folder / "contract.json"
            contract.write_text(contract.read_text().replace('"version": "2"', '"version": "3"'))
        await case.load_all()
        assert (await case.segment(), case.controller.describe().active) == ("1", "1")
        words = "was changed" if damage == "truncated" else "holds version '3'"
        assert words in case.controller.describe().history[-1].reason


async def test_a_failed_first_version_is_not_retried_until_it_is_activated_again(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "wrong", "2": "good"}) as case:
        await case.activate("1")
        assert "failed: golden answers differ" in case.controller.router.unready_reason
        revision = case.registry.read_state(NAME).revision
        await case.load_all()
        assert case.registry.read_state(NAME).revision == revision
        await case.activate("1")
        assert case.registry.read_state(NAME).revision == revision + 2  # asked for, and refused again
        await case.activate("2")
        assert await case.segment() == "2"


@pytest.mark.parametrize("role", ["active", "canary"])
async def test_a_version_with_errors_is_rolled_back_and_clients_notice_nothing(tmp_path: Path, role: str) -> None:
    async with follow(tmp_path, {"1": "good", "2": "broken"}) as case:
        await case.activate("1")
        if role == "canary":
            case.registry.deploy_as(NAME, "canary", "2", 1.0, author="test")
            await case.load_all()
        else:
            await case.activate("2")
        assert case.list_roles()["2"] == role  # it runs on what it is warmed with
        assert [await case.segment() for _ in range(3)] == ["1", "1", "1"]
        await case.controller.reconcile()
        assert case.list_roles() == {"1": "active", "2": "failed"}
        assert (case.controller.describe().active, case.registry.read_state(NAME).canary) == ("1", None)
        assert case.read_last() == ("rollback", "2", "useg serve")
        assert "errors: 3 of 3 images failed" in case.registry.read_state(NAME).history[-1].reason


async def test_a_version_whose_outputs_drift_is_rolled_back(tmp_path: Path) -> None:
    changes = {"drift_reference": {"segments": SEGMENTS}}
    async with follow(tmp_path, {"1": "good", "2": "blind"}, changes) as case:
        await case.activate("1")
        for _ in range(50):
            await case.segment()
        await case.activate("2")
        for _ in range(49):
            assert await case.segment() == "2"
        await case.controller.reconcile()
        assert case.controller.describe().serving_version == "2"
        await case.segment()
        await case.controller.reconcile()
        assert case.controller.describe().serving_version == "1"
        assert "drift: segments drifted" in case.registry.read_state(NAME).history[-1].reason


async def test_the_previous_version_serves_while_the_new_ones_worker_restarts(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "deadly"}) as case:
        await case.activate("1")
        await case.activate("2")
        (case.registry.find_version(NAME, "2") / NETWORK_FILE).unlink()  # it cannot be loaded again
        assert [await case.segment() for _ in range(3)] == ["1"] * 3
        with pytest.raises(NotReady, match="is being restarted"):
            case.controller.router.get_pipeline()


async def test_a_canary_serves_its_clients_and_no_others(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("1")
        case.registry.deploy_as(NAME, "canary", "2", 0.5, author="test")
        await case.load_all()
        keys = [f"caller {number}" for number in range(40)]
        first = {key: await case.segment(key) for key in keys}
        assert {key: await case.segment(key) for key in keys} == first
        assert 10 <= sum(version == "2" for version in first.values()) <= 30
        case.registry.promote(NAME, author="test")
        await case.controller.reconcile()
        assert {await case.segment(key) for key in keys} == {"2"}


async def test_a_failing_shadow_is_removed_and_its_results_are_discarded(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "broken"}) as case:
        await case.activate("1")
        case.registry.deploy_as(NAME, "shadow", "2", 1.0, author="test")
        await case.load_all()
        shadow = case.controller.router.shadow
        assert shadow is not None
        assert case.list_roles() == {"1": "active", "2": "shadow"}
        for failures in range(1, 4):
            assert await case.segment() == "1"
            async with asyncio.timeout(30.0):
                while shadow.pipeline.stats.recent().failures < failures:
                    await asyncio.sleep(0.01)
        await case.controller.reconcile()
        assert (case.controller.router.shadow, case.list_roles()["2"]) == (None, "failed")
        labels = {"model": NAME, "outcome": "failed"}
        assert case.telemetry.registry.get_sample_value("useg_shadow_images_total", labels) == 3.0


async def test_an_image_that_no_version_can_segment_counts_against_none(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "broken", "2": "broken"}) as case:
        await case.activate("1")
        await case.activate("2")
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await case.segment()
        await case.controller.reconcile()
        assert case.controller.describe().serving_version == "2"


async def test_an_unreadable_deployment_state_changes_nothing(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good"}) as case:
        await case.activate("1")
        (case.registry.folder / NAME / "deployment.json").write_text("{")
        await case.controller.reconcile()
        assert await case.segment() == "1"


@pytest.mark.parametrize("lost", [".", "2", "deployment.json"])
async def test_a_version_missing_from_the_registry_keeps_serving_and_is_logged(
    tmp_path: Path, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}, rollback_window_s=0.0) as case:
        await case.activate("1")
        await case.activate("2")
        revision = case.controller.state.revision
        path = case.registry.folder / NAME / lost
        path.rename(tmp_path / "away")
        for _ in range(2):
            await case.controller.reconcile()
        assert await case.segment() == "2"
        status = case.controller.describe()
        assert (status.active, status.serving_version, status.revision) == ("2", "2", revision)
        assert case.list_roles()["2"] == "missing_from_registry"
        assert caplog.text.count("2 is served, but no longer in the registry") == 1
        (tmp_path / "away").rename(path)
        await case.controller.reconcile()
        assert case.list_roles() == {"1": "unloaded", "2": "active"}


class ReadOnlyRegistry(Registry):
    """A registry on a read-only disk."""

    def quarantine(self, *_words: Any, **_named: Any) -> Any:
        raise RegistryError("read-only")


async def test_a_version_is_rolled_back_although_the_registry_is_read_only(tmp_path: Path) -> None:
    case = Case(tmp_path, {"1": "good", "2": "broken"}, {}, {})
    registry = ReadOnlyRegistry(case.registry.folder)
    case.controller = RolloutController(registry, NAME, open_artifact, Settings(), case.telemetry)
    await case.activate("1")
    await case.activate("2")
    for _ in range(3):
        assert await case.segment(image=save(draw_halves(BLUE))) == "1"
    await case.controller.reconcile()
    await case.load_all()
    assert (case.controller.describe().active, case.controller.describe().serving_version) == ("2", "1")
    await case.controller.stop()
