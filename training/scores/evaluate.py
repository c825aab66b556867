"""A source of answers held against labelled pictures: one pass, then everything from what it counted."""

from collections.abc import Sequence

from training.scores.figures.figures import (
    count_panoptic_all,
    count_semantic_all,
    list_classes,
    list_clusters,
    list_pictures,
    measure_instances,
    measure_panoptic,
    measure_semantic,
)
from training.scores.figures.report import MatchingFacts, Report, Summary
from training.scores.meetings.answers import LEAST_SCORE, Source
from training.scores.meetings.comparison import Comparison, compare_all, hash_photo, list_spaces
from training.scores.naming.names import Names, describe_photos
from training.scores.naming.naming import Fit, MatchPlan, check_names, fit_names, list_unmatched, name_clusters
from training.scores.sets.truth import Truth

PROTOCOL = (
    "Things are matched among things and stuff among stuff. A segment of an unmatched cluster is a false positive of "
    "the category that it covers most, and its pixels are wrong; lenient figures let it go free, as the papers do. "
    "True and predicted stuff is one segment a category. Objects: pycocotools, detections scored "
    f"{LEAST_SCORE} and better; detections of unmatched clusters cannot find a named object."
)


def match_clusters(source: Source, truth: Truth, plan: MatchPlan) -> Names:
    """Names for the source's clusters, fitted on the whole set."""
    return fit_names(compare_all(source, truth), truth, list_spaces(source, truth), plan, source.digest)


def check_plan(source: Source, truth: Truth, plan: MatchPlan) -> None:
    """Raise ConfigError, before the long pass, if the plan's names do not fit, or have seen these photos."""
    if plan.names is not None:
        digests = [hash_photo(each) for each in truth.pictures]
        check_names(plan.names, list_spaces(source, truth), truth.taxonomy, digests, is_same_set=plan.is_same_set)


def evaluate(source: Source, truth: Truth, plan: MatchPlan) -> tuple[Report, Fit]:
    """Every figure that the set allows, and the namings behind them; raises what `check_plan` and `score` raise."""
    check_plan(source, truth, plan)
    return score(compare_all(source, truth), source, truth, plan)


def score(comparisons: Sequence[Comparison], source: Source, truth: Truth, plan: MatchPlan) -> tuple[Report, Fit]:
    """The same from comparisons that were made before."""
    spaces = list_spaces(source, truth)
    fit = name_clusters(comparisons, truth, spaces, plan)
    panoptic = count_panoptic_all(comparisons, fit, spaces) if truth.kind == "panoptic" else None
    has_regions = truth.kind in ("panoptic", "semantic")
    semantic = count_semantic_all(comparisons, fit, spaces) if has_regions else None
    gathered = count_semantic_all(comparisons, fit, spaces, things_as_one=True) if has_regions else None
    instance, precisions = measure_instances(comparisons, fit, truth)
    summary = Summary(
        source=source.title,
        source_sha256=source.digest,
        truth=truth.name,
        classes=truth.taxonomy.title,
        pictures=len(comparisons),
        photos_sha256=describe_photos(truth.name, [each.digest for each in comparisons]).sha256,
        protocol=PROTOCOL,
        matching=_describe_matching(comparisons, fit),
        panoptic=measure_panoptic(panoptic, spaces.things) if panoptic else {},
        semantic=measure_semantic(semantic, spaces.things) if semantic else {},
        semantic_things_as_one=measure_semantic(gathered, None) if gathered else {},
        instance=instance,
    )
    report = Report(
        summary=summary,
        classes=list_classes(truth, panoptic, semantic, precisions),
        clusters=list_clusters(comparisons, fit, spaces, truth, plan.thresholds),
        pictures=list_pictures(comparisons, truth, panoptic, semantic),
    )
    return report, fit


def _describe_matching(comparisons: Sequence[Comparison], fit: Fit) -> MatchingFacts:
    return MatchingFacts(
        method=fit.method,
        fitted_on=fit.fitted_on,
        scored_what_was_fitted=fit.scored_what_was_fitted,
        clusters=len(fit.namings[0].panoptic) - 1,
        unmatched_clusters=len(list_unmatched(comparisons, fit)),
    )
