/** A table of rows under columns; the first cell of a row is its head. Cells are text, or elements. */
export function renderTable(caption, columns, rows) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const column of columns) head.append(renderHead(column, "col"));
  const body = table.createTBody();
  for (const [name, ...cells] of rows) {
    const row = body.insertRow();
    row.append(renderHead(name, "row"));
    for (const cell of cells) row.insertCell().append(cell ?? "–");
  }
  const title = document.createElement("caption");
  title.className = "unseen";
  title.textContent = caption;
  table.prepend(title);
  return table;
}

/** A bar of `value` within 0..`max`, told in words beside it. */
export function renderBar(value, max, text, high = max) {
  const cell = document.createElement("span");
  const [bar, words] = [document.createElement("meter"), document.createElement("span")];
  Object.assign(bar, { max, high, value, ariaHidden: "true" });
  cell.className = "bar";
  words.textContent = text;
  cell.append(bar, words);
  return cell;
}

/** Put something in the place of what is there, unless that looks the same: what is read or selected stays. */
export function refresh(place, ...content) {
  const next = place.cloneNode(false);
  next.append(...content);
  if (!next.isEqualNode(place)) place.replaceChildren(...next.childNodes);
}

function renderHead(text, scope) {
  const cell = document.createElement("th");
  cell.scope = scope;
  cell.textContent = text;
  return cell;
}
