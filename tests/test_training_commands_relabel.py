import argparse
from pathlib import Path

from training.commands.relabel import add_options, run
from training.fitting.rounds.self_training import RoundPlan, read_teaching
from training.labels.store import LabelStore


def test_what_is_not_given_is_as_the_plan_has_it(tmp_path: Path, tiny_run: Path, tiny_store: LabelStore) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    add_options(parser)
    given = ["--features", str(tiny_store.features), "--out", str(tmp_path / "store")]
    run(parser.parse_args([str(tiny_run), str(tiny_store.folder), *given]))
    teaching = read_teaching(LabelStore(tmp_path / "store"))
    assert teaching is not None
    assert teaching.share == RoundPlan().share
