"""The report as one HTML file that needs nothing else: no script, no network."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from model.files import atomic_write
from training.evaluation.evaluation_report import ClassMetrics, ClusterMetrics, EvaluationReport, EvaluationSummary
from training.evaluation.gallery import GalleryItem, category_rgb
from training.evaluation.metrics.bootstrap import ConfidenceInterval
from training.evaluation.page_style import STYLE

HTML_REPORT_FILE = "report.html"
_RANKS = {"best": "Best", "median": "Median", "worst": "Worst"}
_INSTANCE_ROWS = {
    "agnostic_mask": "masks, all categories as one",
    "agnostic_box": "boxes, all categories as one",
    "named_mask": "masks, by category",
    "named_box": "boxes, by category",
}
_INSTANCE_COLUMNS = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large",
    "ar1": "AR1", "ar10": "AR10", "ar100": "AR100",
}  # fmt: skip


def write_html_report(report: EvaluationReport, gallery: Sequence[GalleryItem], folder: Path) -> None:
    """`report.html`."""
    with atomic_write(folder / HTML_REPORT_FILE) as sibling:
        sibling.write_text(render_html_report(report, gallery), encoding="utf-8")


def render_html_report(report: EvaluationReport, gallery: Sequence[GalleryItem]) -> str:
    """The whole page."""
    summary = report.summary
    body = [
        _render_head(summary),
        _render_tiles(summary),
        _render_panoptic(summary),
        _render_semantic(summary),
        _render_instances(summary),
        _render_classes(report.classes),
        _render_gallery(gallery),
        _render_matching(report),
        _render_protocol(summary),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(summary.source)} on {escape(summary.truth)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body></html>\n"
    )


def _render_head(summary: EvaluationSummary) -> str:
    alarm = (
        '<p class="alarm"><b>Fitted on what is scored.</b> Clusters got their categories from photos that are among '
        "the scored ones: every figure with categories in it is an upper bound, not a result.</p>"
        if summary.matching.evaluated_on_fit_set
        else ""
    )
    return (
        f"<h1>{escape(summary.source)}</h1>"
        f'<p class="facts">on {summary.images:,} pictures of {escape(summary.truth)} · {escape(summary.classes)}</p>'
        + alarm
    )


def _render_tiles(summary: EvaluationSummary) -> str:
    tiles = [(title, summary.panoptic.get(key)) for title, key in (("Panoptic quality", "pq"),)]
    tiles += [
        ("Semantic, mean IoU", summary.semantic.get("miou")),
        ("Semantic, pixel accuracy", summary.semantic.get("accuracy")),
    ]
    for key, name in (("agnostic_mask", "Objects, mask"), ("agnostic_box", "Objects, box")):
        if key in summary.instance:
            headline = summary.instance[key].headline
            tiles += [(f"{name} AP", headline["ap"]), (f"{name} AR100", headline["ar100"])]
            break
    shown = "".join(_render_tile(title, interval) for title, interval in tiles if interval)
    return (
        f'<div class="tiles">{shown}</div><p class="muted"><br>All figures in percent. The band on each scale is the '
        "95 % bootstrap interval over the pictures (1,000 resamples).</p>"
    )


def _render_tile(title: str, interval: ConfidenceInterval) -> str:
    return (
        f'<div class="tile"><span>{escape(title)}</span><b>{interval.value:.1f}</b>'
        f"<span>{interval.low:.1f}&thinsp;&ndash;&thinsp;{interval.high:.1f}</span>"
        f'<div class="scale"><i style="left:{interval.low}%;width:{interval.high - interval.low:.2f}%"></i>'
        f'<u style="left:{interval.value}%"></u></div></div>'
    )


def _render_panoptic(summary: EvaluationSummary) -> str:
    if not summary.panoptic:
        return ""
    rows = [
        ("all classes", ""),
        ("things", "_things"),
        ("stuff", "_stuff"),
        ("lenient: unmatched for free", "_lenient"),
    ]
    cells = [
        [escape(name), *(_render_bar_cell(summary.panoptic[f"{key}{end}"]) for key in ("pq", "sq", "rq"))]
        for name, end in rows
    ]
    return (
        "<h2>Panoptic quality and its parts</h2><p class=muted>PQ = SQ &times; RQ for each class: how well found "
        "segments fit, times how many were found. The means over classes do not multiply.</p>"
        + _render_table(["", "PQ", "SQ, fit", "RQ, found"], cells)
    )


def _render_semantic(summary: EvaluationSummary) -> str:
    if not summary.semantic:
        return ""
    rows = []
    for title, figures in (
        (summary.classes, summary.semantic),
        ("all things as one class, beside the stuff", summary.semantic_things_as_one),
    ):
        for name, end in (("", ""), (", lenient", "_lenient")):
            cells = [_render_cell(figures.get(f"{key}{end}")) for key in ("miou", "accuracy")]
            stuff = _render_cell(figures["miou_stuff"]) if f"miou_stuff{end}" in figures else ""
            rows.append([escape(title + name), cells[0], stuff, cells[1]])
    return "<h2>Semantic</h2>" + _render_table(["", "mean IoU", "of stuff alone", "pixel accuracy"], rows)


def _render_instances(summary: EvaluationSummary) -> str:
    rows = []
    for key, title in _INSTANCE_ROWS.items():
        if figures := summary.instance.get(key):
            cells = [
                _render_cell(figures.headline[name]) if name in figures.headline else _format(figures.others[name])
                for name in _INSTANCE_COLUMNS
            ]
            rows.append([title, *cells])
    return "<h2>Objects</h2>" + _render_table(["", *_INSTANCE_COLUMNS.values()], rows) if rows else ""


def _render_classes(classes: Sequence[ClassMetrics]) -> str:
    parts = []
    keys = [key for key in ("pq", "iou", "ap") if any(getattr(each, key) is not None for each in classes)]
    for title, is_thing in (("Things", True), ("Stuff", False)):
        chosen = [
            (place, each)
            for place, each in enumerate(classes)
            if each.is_thing == is_thing and any(getattr(each, key) is not None for key in keys)
        ]
        if chosen:
            first = keys[0]
            chosen.sort(key=lambda entry: (-(getattr(entry[1], first) or 0.0), entry[1].name))
            rows = "".join(_render_class(place, each, keys[:2]) for place, each in chosen)
            parts.append(f"<h3>{title}</h3><div class=classes>{rows}</div>")
    names = {"pq": "PQ", "iou": "IoU", "ap": "AP"}
    marks = "".join(
        f'<span class="key{" pale" if place else ""}"></span>{names[key]}' for place, key in enumerate(keys[:2])
    )
    return f"<h2>By class</h2><p class=muted>{marks}</p>" + "".join(parts) if parts else ""


def _render_class(place: int, each: ClassMetrics, keys: Sequence[str]) -> str:
    bars = "".join(
        f'<div class="bar{" pale" if number else ""}"><i style="width:{getattr(each, key) or 0}%"></i></div>'
        f"<em>{_format(getattr(each, key))}</em>"
        for number, key in enumerate(keys)
    )
    chip = _render_chip(category_rgb(place))
    return f'<div class="class"><span title="{escape(each.name)}">{chip}{escape(each.name)}</span>{bars}</div>'


def _render_gallery(gallery: Sequence[GalleryItem]) -> str:
    if not gallery:
        return ""
    parts = [
        "<h2>Photos</h2><p class=muted>Ranked by each photo's own quality. A colour is a category, the same in truth "
        "and answer.</p>"
    ]
    for rank, title in _RANKS.items():
        if chosen := [each for each in gallery if each.rank == rank]:
            parts.append(
                f"<h3>{title}</h3><div class=heads><span>photo</span><span>truth</span><span>answer</span></div>"
            )
            parts += [_render_exhibit(each) for each in chosen]
    return "".join(parts)


def _render_exhibit(each: GalleryItem) -> str:
    pictures = "".join(
        f'<img alt="{name}" src="data:image/jpeg;base64,{b64encode(content).decode("ascii")}">'
        for name, content in (("photo", each.photo), ("truth", each.truth), ("answer", each.answer))
    )
    chips = "".join(f"<span>{_render_chip(chip.rgb)}{escape(chip.name)}</span>" for chip in each.chips)
    title = f"<span class=muted>{escape(each.figures.file)}: {each.figures.quality:.1f}</span>"
    return f'<figure class="exhibit"><div>{pictures}</div><figcaption>{title}{chips}</figcaption></figure>'


def _render_matching(report: EvaluationReport) -> str:
    facts = report.summary.matching
    rows = [
        [
            f"{each.cluster}",
            "thing" if each.is_thing else "stuff",
            " / ".join(dict.fromkeys(escape(name) if name else "<i>none</i>" for name in each.categories)),
            f'<div class="bar"><i style="width:{100 * each.purity:.1f}%"></i></div>{100 * each.purity:.0f}',
            f"{each.support:,}",
        ]
        for each in sorted(report.clusters, key=_sort_cluster)
    ]
    return (
        "<h2>Clusters and categories</h2>"
        f"<p>Matched by <b>{escape(facts.method)}</b>, fitted on {escape(facts.fitted_on)}. {facts.unmatched_clusters} "
        f"of {facts.clusters} clusters were predicted without having a category.</p>"
        f"<details><summary>All {facts.clusters} clusters, those that met most first</summary>"
        + _render_table(
            ["cluster", "kind", "category in each fit", "share of the category most met", "pixels or votes"],
            rows,
            words=3,
        )
        + "</details>"
    )


def _sort_cluster(each: ClusterMetrics) -> tuple[int, int]:
    return -each.support, each.cluster


def _render_protocol(summary: EvaluationSummary) -> str:
    return (
        f"<h2>Protocol</h2><p>{escape(summary.protocol)}</p><p class=muted>"
        f"Source sha256 <code>{escape(summary.source_sha256)}</code><br>"
        f"Photos sha256 <code>{escape(summary.photos_sha256)}</code></p>"
    )


def _render_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Cells are HTML; the head is text. The first `words` columns hold words, the others figures."""
    marks = [" class=left" if place < words else "" for place in range(len(head))]
    first = "".join(f"<th{mark}>{escape(cell)}</th>" for mark, cell in zip(marks, head, strict=True))
    rest = "".join(
        "<tr>" + "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


def _render_cell(interval: ConfidenceInterval | None) -> str:
    if interval is None:
        return "&ndash;"
    return f"{interval.value:.1f}<small>{interval.low:.1f}&thinsp;&ndash;&thinsp;{interval.high:.1f}</small>"


def _render_bar_cell(interval: ConfidenceInterval) -> str:
    return f'<div class="bar"><i style="width:{interval.value}%"></i></div>{interval.value:.1f}<small>' + (
        f"{interval.low:.1f}&thinsp;&ndash;&thinsp;{interval.high:.1f}</small>"
    )


def _render_chip(rgb: tuple[int, int, int]) -> str:
    return f'<span class="chip" style="background:rgb{rgb}"></span>'


def _format(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.1f}"
