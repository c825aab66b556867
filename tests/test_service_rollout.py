"""A version on its way: checked, tried, watched, taken back, closed; the one before answers all along."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_registry import NAME, SEGMENTS, make_registry, open_artifact
from fake_service import BLUE, draw_halves, save

from model.contract import NETWORK_FILE
from model.errors import RegistryError
from model.registry.versions import Registry
from service.inference.pipeline import Pipeline
from service.requests import RequestContext, SegmentOptions
from service.rollout.controller import RolloutController
from service.rollout.router import Route
from service.settings import Settings
from service.telemetry.metrics import Telemetry
from service.telemetry.stage_timer import StageTimer

HALVES = save(draw_halves())
pytestmark = pytest.mark.anyio


class Case:
    """A follower, and what a test does with it."""

    def __init__(self, folder: Path, kinds: dict[str, str], changes: dict[str, Any], settings: dict[str, Any]) -> None:
        self.registry = make_registry(folder, kinds, **changes)
        self.telemetry = Telemetry()
        self.follower = RolloutController(self.registry, NAME, open_artifact, Settings(**settings), self.telemetry)

    async def settle(self) -> None:
        """Steps until nothing is left to be opened."""
        await self.follower.step()
        while self.follower.held.opening:
            await asyncio.gather(*self.follower.held.opening.values())
            await self.follower.step()

    async def activate(self, version: str) -> None:
        self.registry.activate(NAME, version, author="test")
        await self.settle()

    async def ask(self, key: str = "", picture: bytes = HALVES) -> str:
        """The version that answers a picture."""
        claim = RequestContext(deadline=asyncio.get_running_loop().time() + 30.0)

        async def find(pipeline: Pipeline, claim: RequestContext) -> str:
            await pipeline.run(picture, SegmentOptions(), lambda _: None, claim, StageTimer(self.telemetry))
            return pipeline.contract.version

        with self.follower.router.admit(claim, key) as route:
            version = await route.answer(find)
        self.follower.router.mirror([picture])
        return version

    def list_roles(self) -> dict[str, str]:
        return {each.version: each.state for each in self.follower.describe().versions}

    def list_answers(self) -> dict[str, float]:
        """How many answers the metrics know of each version."""
        samples = [sample for metric in self.telemetry.segments.collect() for sample in metric.samples]
        return {each.labels["version"]: each.value for each in samples if each.name.endswith("_count")}

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
        await case.follower.stop()


async def test_a_new_version_answers_once_it_is_warm_and_the_old_one_until_then(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("1")
        assert await case.ask() == "1"
        case.registry.activate(NAME, "2", author="test")
        await case.follower.step()
        assert case.list_roles() == {"1": "active", "2": "loading"}
        assert await case.ask() == "1"
        await case.settle()
        assert await case.ask() == "2"
        assert case.list_roles() == {"1": "standby", "2": "active"}


async def test_the_old_version_is_kept_for_a_while_and_a_rollback_to_it_opens_nothing(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}, rollback_window_s=3600.0) as case:
        await case.activate("1")
        await case.activate("2")
        case.registry.roll_back(NAME, author="test")
        await case.follower.step()
        assert await case.ask() == "1"
        assert case.list_roles() == {"1": "active", "2": "unloaded"}
    async with follow(tmp_path / "at once", {"1": "good", "2": "good"}, rollback_window_s=0.0) as case:
        await case.activate("1")
        await case.activate("2")
        assert case.list_roles() == {"1": "unloaded", "2": "active"}
        case.registry.roll_back(NAME, author="test")
        await case.settle()
        assert await case.ask() == "1"


async def test_requests_under_way_end_with_the_version_they_began_with(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}, rollback_window_s=0.0) as case:
        await case.activate("1")
        claim = RequestContext(deadline=asyncio.get_running_loop().time() + 30.0)
        with case.follower.router.admit(claim, "") as route:
            await case.activate("2")
            assert case.list_roles() == {"1": "standby", "2": "active"}  # not closed: somebody is with it
            assert route.pipeline.contract.version == "1"
            await route.pipeline.run(HALVES, SegmentOptions(), lambda _: None, claim, StageTimer(case.telemetry))
        await case.follower.step()
        assert case.list_roles() == {"1": "unloaded", "2": "active"}


async def test_a_version_that_is_closed_leaves_no_figure_of_its_answers_behind(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}, rollback_window_s=0.0) as case:
        await case.activate("1")
        await case.ask()
        assert case.list_answers() == {"1": 1.0}
        await case.activate("2")
        assert case.list_answers() == {"2": 0.0}
    assert case.list_answers() == {}


@pytest.mark.parametrize(("kind", "words"), [("wrong", "golden answers differ"), ("nan", "not finite")])
async def test_a_bad_candidate_is_refused_and_the_old_version_stays(tmp_path: Path, kind: str, words: str) -> None:
    async with follow(tmp_path, {"1": "good", "2": kind}) as case:
        await case.activate("1")
        await case.activate("2")
        assert await case.ask() == "1"
        status = case.follower.describe()
        assert (status.active, status.serving, case.read_last()) == ("1", "1", ("reject", "2", "useg serve"))
        assert words in status.history[-1].reason
        assert words in (status.versions[1].reason or "")
        labels = {"model": NAME, "version": "2", "state": "failed"}
        assert case.telemetry.registry.get_sample_value("useg_model_version_state", labels) == 1.0
        assert (
            case.telemetry.registry.get_sample_value("useg_rollbacks_total", {"model": NAME, "cause": "load_failed"})
            == 1
        )


@pytest.mark.parametrize("damage", ["truncated", "renamed"])
async def test_a_candidate_that_was_damaged_on_disk_is_refused(tmp_path: Path, damage: str) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("1")
        case.registry.activate(NAME, "2", author="test")
        folder = case.registry.find_version(NAME, "2")
        if damage == "truncated":
            (folder / NETWORK_FILE).write_bytes(b"go")
        else:
            contract = folder / "contract.json"
            contract.write_text(contract.read_text().replace('"version": "2"', '"version": "3"'))
        await case.settle()
        assert (await case.ask(), case.follower.describe().active) == ("1", "1")
        words = "was changed" if damage == "truncated" else "says that it is '3'"
        assert words in case.follower.describe().history[-1].reason


async def test_a_slow_candidate_is_refused(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "slow"}, canary_max_latency_ratio=2.0) as case:
        await case.activate("1")
        await case.activate("2")
        assert case.follower.describe().serving == "1"
        assert "a picture takes" in case.follower.describe().history[-1].reason


async def test_the_first_version_that_is_refused_is_not_tried_again_until_somebody_asks(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "wrong", "2": "good"}) as case:
        await case.activate("1")
        assert "was refused: golden answers differ" in case.follower.router.obstacle
        revision = case.registry.read_state(NAME).revision
        await case.settle()
        assert case.registry.read_state(NAME).revision == revision
        await case.activate("1")
        assert case.registry.read_state(NAME).revision == revision + 2  # asked for, and refused again
        await case.activate("2")
        assert await case.ask() == "2"


async def test_failures_of_a_new_version_are_not_felt_and_take_it_back(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "broken"}) as case:
        await case.activate("1")
        await case.activate("2")
        assert case.list_roles() == {"1": "standby", "2": "active"}  # it runs on what it is warmed with
        assert [await case.ask() for _ in range(3)] == ["1", "1", "1"]
        await case.follower.step()
        assert case.list_roles() == {"1": "active", "2": "failed"}
        assert case.follower.describe().active == "1"
        assert case.read_last() == ("rollback", "2", "useg serve")
        assert "errors: 3 of 3 pictures failed" in case.registry.read_state(NAME).history[-1].reason


async def test_a_version_that_was_taken_back_is_tried_again_when_somebody_asks(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "broken"}) as case:
        await case.activate("1")
        await case.activate("2")
        for _ in range(3):
            await case.ask()
        await case.follower.step()
        await case.settle()
        assert case.follower.describe().serving == "1"
        await case.activate("2")
        assert case.follower.describe().serving == "2"


async def test_answers_that_look_otherwise_take_a_version_back(tmp_path: Path) -> None:
    changes = {"drift_reference": {"segments": SEGMENTS}}
    async with follow(tmp_path, {"1": "good", "2": "blind"}, changes) as case:
        await case.activate("1")
        for _ in range(50):
            await case.ask()
        await case.activate("2")
        for _ in range(49):
            assert await case.ask() == "2"
        await case.follower.step()
        assert case.follower.describe().serving == "2"
        await case.ask()
        await case.follower.step()
        assert case.follower.describe().serving == "1"
        assert "drift: segments drifted" in case.registry.read_state(NAME).history[-1].reason


async def test_the_version_before_answers_while_the_new_ones_network_is_started_again(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("1")
        await case.activate("2")
        case.follower.router.require().engine.is_alive = False
        assert await case.ask() == "1"


async def test_a_canary_answers_its_callers_and_no_others(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("1")
        case.registry.deploy_as(NAME, "canary", "2", 0.5, author="test")
        await case.settle()
        keys = [f"caller {number}" for number in range(40)]
        first = {key: await case.ask(key) for key in keys}
        assert {key: await case.ask(key) for key in keys} == first
        assert 10 <= sum(version == "2" for version in first.values()) <= 30
        case.registry.promote(NAME, author="test")
        await case.follower.step()
        assert {await case.ask(key) for key in keys} == {"2"}


async def test_a_canary_that_fails_is_not_felt_and_ends(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "broken"}) as case:
        await case.activate("1")
        case.registry.deploy_as(NAME, "canary", "2", 1.0, author="test")
        await case.settle()
        assert [await case.ask() for _ in range(3)] == ["1", "1", "1"]
        await case.follower.step()
        assert case.registry.read_state(NAME).canary is None
        assert case.list_roles() == {"1": "active", "2": "failed"}


async def test_a_shadow_sees_pictures_and_nobody_hears_of_it(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "broken"}) as case:
        await case.activate("1")
        case.registry.deploy_as(NAME, "shadow", "2", 1.0, author="test")
        await case.settle()
        shadow = case.follower.router.shadow
        assert shadow is not None
        assert case.list_roles() == {"1": "active", "2": "shadow"}
        for _ in range(3):
            assert await case.ask() == "1"
            await shadow.settle()
        assert shadow.pipeline.track.failures == 3
        await case.follower.step()
        assert (case.follower.router.shadow, case.list_roles()["2"]) == (None, "failed")
        labels = {"model": NAME, "outcome": "failed"}
        assert case.telemetry.registry.get_sample_value("useg_shadow_images_total", labels) == 3.0


async def test_a_picture_that_no_version_can_answer_counts_against_none(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "broken", "2": "broken"}) as case:
        await case.activate("1")
        await case.activate("2")
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await case.ask()
        await case.follower.step()
        assert case.follower.describe().serving == "2"


async def test_a_state_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good"}) as case:
        await case.activate("1")
        (case.registry.folder / NAME / "deployment.json").write_text("{")
        await case.follower.step()
        assert await case.ask() == "1"


def read_state_metric(case: Case, version: str) -> dict[str, float]:
    """The states that the metrics give a version."""
    samples = [sample for metric in case.telemetry.model_version_state.collect() for sample in metric.samples]
    return {each.labels["state"]: each.value for each in samples if each.labels["version"] == version and each.value}


@pytest.mark.parametrize("lost", [".", "2", "deployment.json"])
async def test_what_is_served_and_gone_from_the_registry_answers_on_and_is_told(
    tmp_path: Path, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}, rollback_window_s=0.0) as case:
        await case.activate("1")
        await case.activate("2")
        revision = case.follower.held.state.revision
        path = case.registry.folder / NAME / lost
        path.rename(tmp_path / "away")
        for _ in range(2):
            await case.follower.step()
        assert await case.ask() == "2"
        status = case.follower.describe()
        assert (status.active, status.serving, status.revision) == ("2", "2", revision)
        assert case.list_roles()["2"] == "missing_from_registry"
        assert read_state_metric(case, "2") == {"missing_from_registry": 1.0}
        assert caplog.text.count("2 answers, but the registry does not give it any more") == 1
        (tmp_path / "away").rename(path)
        await case.follower.step()
        assert case.list_roles() == {"1": "unloaded", "2": "active"}
        assert read_state_metric(case, "2") == {"active": 1.0}


async def test_a_version_that_was_removed_leaves_no_state_behind(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "good", "2": "good"}) as case:
        await case.activate("2")
        assert read_state_metric(case, "1") == {"unloaded": 1.0}
        case.registry.remove(NAME, "1", author="test")
        await case.follower.step()
        assert (case.list_roles(), read_state_metric(case, "1")) == ({"2": "active"}, {})


class ReadOnlyRegistry(Registry):
    """One that lies on a disk of somebody else's."""

    def quarantine(self, *_words: Any, **_named: Any) -> Any:
        raise RegistryError("read-only")


async def test_a_version_is_taken_back_where_the_registry_cannot_be_written(tmp_path: Path) -> None:
    case = Case(tmp_path, {"1": "good", "2": "broken"}, {}, {})
    registry = ReadOnlyRegistry(case.registry.folder)
    case.follower = RolloutController(registry, NAME, open_artifact, Settings(), case.telemetry)
    await case.activate("1")
    await case.activate("2")
    for _ in range(3):
        assert await case.ask(picture=save(draw_halves(BLUE))) == "1"
    await case.follower.step()
    await case.settle()
    assert (case.follower.describe().active, case.follower.describe().serving) == ("2", "1")
    await case.follower.stop()


async def test_a_route_without_a_spare_raises_what_its_version_raises(tmp_path: Path) -> None:
    async with follow(tmp_path, {"1": "broken"}) as case:
        await case.activate("1")
        pipeline = case.follower.router.require()
        route = Route(pipeline=pipeline, spare=None, claim=RequestContext(deadline=0.0))
        assert route.is_final(pipeline)
        with pytest.raises(RuntimeError):
            await case.ask()
