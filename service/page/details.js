import { renderSegment } from "./legend.js";

/** Tell everything about one segment, or hide; `image` is the size of the answer, `form` names the cluster. */
export function showDetails(panel, segment, image, form) {
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
  const focused = form.contains(document.activeElement) ? document.activeElement : null;
  panel.replaceChildren(head, list, form);
  focused?.focus(); // it was taken out of the page for a moment
}
