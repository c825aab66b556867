// Segments as text: the list, the details of one segment, and the tooltip.

import { segmentColor } from "./mask_canvas.js";

const GROUPS = [
  { isThing: 1, title: "Things", hint: "countable objects" },
  { isThing: 0, title: "Stuff", hint: "surfaces and background" },
];
const PERCENT = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const MIN_SHOWN_FRACTION = 0.001;
const TOOLTIP_GAP_PX = 14;
const TOOLTIP_MARGIN_PX = 8;

/** One button per segment, things before stuff; `data-index` is the segment's index in the result. */
export function renderSegmentList(segments, image) {
  return GROUPS.flatMap(({ isThing, title, hint }) => {
    const indices = [...segments.keys()].filter((index) => segments[index].isthing === isThing);
    if (!indices.length) return [];
    const heading = render("h2", "", `${title} `);
    heading.append(render("small", "", `${indices.length} · ${hint}`));
    const list = render("ul");
    list.append(...indices.map((index) => renderItem(segments[index], index, image)));
    return [heading, list];
  });
}

/** Color, name, kind, score and area of a segment; used in the list, the details and the tooltip. */
export function renderSegment(segment, image) {
  const swatch = render("i", "swatch");
  swatch.style.background = `rgb(${segmentColor(segment.id, segment.isthing)})`;
  const name = segment.category_name ?? `unnamed cluster ${segment.cluster_id}`;
  const kind = `${segment.isthing ? "thing" : "stuff"}, cluster ${segment.cluster_ids.join(", ")}`;
  const area = formatFraction(segment.area / (image.width * image.height));
  const numbers = `score ${segment.score.toFixed(2)} · ${area} of area`;
  return [swatch, render("strong", "", name), render("small", "kind", kind), render("small", "", numbers)];
}

/** Show everything about one segment, or hide the panel; `form` edits the cluster's name. */
export function showDetails(panel, segment, image, form) {
  panel.hidden = segment === null;
  if (segment === null) return;
  const [left, top, width, height] = segment.bbox;
  const head = render("div", "details-head");
  head.append(...renderSegment(segment, image));
  const properties = {
    Id: segment.id,
    Category: segment.category_name === null ? "none yet" : `${segment.category_name} (${segment.category_id})`,
    Area: `${segment.area.toLocaleString("en")} px`,
    Box: `${width} × ${height} px at ${left}, ${top}`,
  };
  const list = render("dl");
  for (const [name, value] of Object.entries(properties)) list.append(render("dt", "", name), render("dd", "", value));
  const focused = form.contains(document.activeElement) ? document.activeElement : null;
  panel.replaceChildren(head, list, form);
  focused?.focus(); // replaceChildren removes the form for a moment
}

/** Show `content` next to the pointer, on the side where the window has room. */
export function placeTooltip(tooltip, { clientX, clientY }, content) {
  tooltip.replaceChildren(...content);
  tooltip.hidden = false;
  const { clientWidth, clientHeight } = document.documentElement;
  tooltip.style.left = `${place(clientX, tooltip.offsetWidth, clientWidth)}px`;
  tooltip.style.top = `${place(clientY, tooltip.offsetHeight, clientHeight)}px`;
}

function place(pointer, length, available) {
  const isBeyond = pointer + TOOLTIP_GAP_PX + length > available;
  return Math.max(TOOLTIP_MARGIN_PX, isBeyond ? pointer - TOOLTIP_GAP_PX - length : pointer + TOOLTIP_GAP_PX);
}

function renderItem(segment, index, image) {
  const button = render("button");
  button.type = "button";
  button.dataset.index = index;
  button.setAttribute("aria-pressed", "false");
  button.append(...renderSegment(segment, image));
  const item = render("li");
  item.append(button);
  return item;
}

function formatFraction(fraction) {
  return fraction < MIN_SHOWN_FRACTION ? `<${PERCENT.format(MIN_SHOWN_FRACTION)}` : PERCENT.format(fraction);
}

function render(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}
