from dataclasses import replace

from training.fitting.loop.sources import are_same_sources, describe_sources
from training.labels.store import LabelStore


def test_labels_made_before_a_setting_existed_had_its_default(tiny_store: LabelStore) -> None:
    labels = tiny_store.read_config()
    now = describe_sources(labels, 8)
    before = {**now, "labels": {name: value for name, value in now["labels"].items() if name != "stuff_crf"}}
    assert are_same_sources(before, now)
    assert not are_same_sources(before, describe_sources(replace(labels, stuff_crf=True), 8))
    assert not are_same_sources(now, describe_sources(replace(labels, threshold=0.5), 8))
    assert not are_same_sources(now, describe_sources(labels, 9))
    assert not are_same_sources({**now, "start": {"sha256": "0"}}, now)


def test_sources_name_no_folder_of_this_machine(tiny_store: LabelStore) -> None:
    described = describe_sources(tiny_store.read_config(), 8)
    assert described["photos"]["count"] == 8
    assert "/" not in str(described)
