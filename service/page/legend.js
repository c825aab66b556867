import { chooseColour } from "./colours.js";

const GROUPS = [
  { isThing: true, title: "Things", hint: "objects one can count" },
  { isThing: false, title: "Stuff", hint: "surfaces and background" },
];
const PERCENT = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const LEAST_SHARE = 0.001;

/** A segment in words; `image` is the size of the picture that its area is a share of. */
function describe(segment, image) {
  return {
    name: segment.category ?? `unnamed cluster ${segment.cluster}`,
    kind: `${segment.isthing ? "thing" : "stuff"}, cluster ${segment.cluster}`,
    figures: `score ${segment.score.toFixed(2)} · ${formatShare(segment.area / (image.width * image.height))} of area`,
  };
}

function formatShare(share) {
  return share < LEAST_SHARE ? `<${PERCENT.format(LEAST_SHARE)}` : PERCENT.format(share);
}

/** The same content for the list and for the tip at the pointer. */
export function renderSegment(segment, image) {
  const { name, kind, figures } = describe(segment, image);
  const swatch = render("i", "swatch");
  swatch.style.background = `rgb(${chooseColour(segment.id, segment.isthing)})`;
  return [swatch, render("strong", "", name), render("small", "kind", kind), render("small", "", figures)];
}

/** One button a segment, things before stuff; `data-index` is its place in the answer. */
export function renderLegend(segments, image) {
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

function render(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}
