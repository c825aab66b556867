import { renderSegment } from "./legend.js";

/** Tell everything about one segment, or hide; `image` is the size of the answer. */
export function showDetails(panel, segment, image) {
  panel.hidden = segment === null;
  if (segment === null) return;
  const [left, top, width, height] = segment.bbox;
  const head = document.createElement("div");
  head.className = "details-head";
  head.append(...renderSegment(segment, image));
  const facts = {
    Id: segment.id,
    Category: segment.category === null ? "none yet" : `${segment.category} (${segment.category_id})`,
    Area: `${segment.area.toLocaleString("en")} px`,
    Box: `${width} × ${height} px at ${left}, ${top}`,
  };
  const list = document.createElement("dl");
  for (const [name, value] of Object.entries(facts)) {
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    description.textContent = value;
    list.append(term, description);
  }
  panel.replaceChildren(head, list);
}
