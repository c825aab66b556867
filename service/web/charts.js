// Numbers, sparklines, tables and bars.

const SVG = "http://www.w3.org/2000/svg";
const SPARKLINE_HEIGHT = 40;
const STAGE_LABELS = {
  read: "receive the request",
  decode: "decode the image",
  queue: "wait in the queue",
  preprocess: "prepare the input",
  infer: "run the network",
  merge: "merge masks",
  encode: "encode the response",
  serialize: "serialize the response",
};

export function formatSeconds(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

export function formatPercent(fraction) {
  return `${(100 * fraction).toFixed(fraction && fraction < 0.1 ? 1 : 0)} %`;
}

export function formatDecimal(value) {
  return value.toFixed(1);
}

export function formatMebibytes(bytes) {
  return `${Math.round(bytes / 2 ** 20)} MB`;
}

/** A value with its name above and a chart below. */
export function renderStat(name, value, chart) {
  const stat = document.createElement("div");
  const title = document.createElement("span");
  const number = document.createElement("strong");
  title.textContent = name;
  number.textContent = value;
  stat.append(title, number, chart);
  return stat;
}

/** A line of the last values, `capacity` of them across; nulls are left out. Without a `label` it is decorative. */
export function renderSparkline(values, capacity, label = "") {
  const max = Math.max(...values.filter((value) => value !== null), Number.MIN_VALUE);
  const points = values
    .map((value, index) =>
      value === null
        ? ""
        : `${capacity - values.length + index},${SPARKLINE_HEIGHT - (SPARKLINE_HEIGHT - 2) * (value / max) - 1}`,
    )
    .filter(Boolean);
  const chart = document.createElementNS(SVG, "svg");
  chart.setAttribute("viewBox", `0 0 ${capacity} ${SPARKLINE_HEIGHT}`);
  chart.setAttribute("preserveAspectRatio", "none");
  if (label) chart.setAttribute("role", "img");
  chart.setAttribute(label ? "aria-label" : "aria-hidden", label || "true");
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", points.join(" "));
  chart.append(line);
  return chart;
}

/** `compare` of each pair of neighboring samples. */
export function mapPairs(samples, compare) {
  return samples.slice(1).map((sample, index) => compare(samples[index], sample));
}

/** A table; the first cell of each row is its header. Cells are text or elements. */
export function renderTable(caption, columns, rows) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const column of columns) head.append(renderHeader(column, "col"));
  const body = table.createTBody();
  for (const [name, ...cells] of rows) {
    const row = body.insertRow();
    row.append(renderHeader(name, "row"));
    for (const cell of cells) row.insertCell().append(cell ?? "–");
  }
  const title = document.createElement("caption");
  title.className = "visually-hidden";
  title.textContent = caption;
  table.prepend(title);
  return table;
}

/** A bar of `value` in 0..`max` with a text; it changes color above `high`. */
export function renderBar(value, max, text, high = max) {
  const cell = document.createElement("span");
  const [bar, label] = [document.createElement("meter"), document.createElement("span")];
  Object.assign(bar, { max, high, value, ariaHidden: "true" });
  cell.className = "bar";
  label.textContent = text;
  cell.append(bar, label);
  return cell;
}

/** Replace the content of an element only if it differs, which keeps selections and focus. */
export function replaceIfChanged(element, ...content) {
  const next = element.cloneNode(false);
  next.append(...content);
  if (!next.isEqualNode(element)) element.replaceChildren(...next.childNodes);
}

/** The stages of a request as a bar to scale and as text; `stages` as in `Server-Timing`. */
export function showTiming({ box, bar, text }, stages, seconds) {
  const total = stages.reduce((sum, { ms }) => sum + ms, 0);
  box.hidden = !(total > 0);
  if (box.hidden) return;
  bar.replaceChildren(
    ...stages.map(({ name, ms }) => {
      const piece = document.createElement("li");
      piece.dataset.stage = name;
      piece.title = `${name}: ${formatMs(ms)}, ${STAGE_LABELS[name] ?? "other"}`;
      piece.style.flexGrow = ms;
      return piece;
    }),
  );
  const transferMs = Math.max(0, seconds * 1000 - total);
  const parts = stages.map(({ name, ms }) => `${name} ${formatMs(ms)}`);
  text.textContent = `${formatMs(total)} on the server: ${parts.join(", ")}; ${formatMs(transferMs)} transfer`;
}

function renderHeader(text, scope) {
  const cell = document.createElement("th");
  cell.scope = scope;
  cell.textContent = text;
  return cell;
}

function formatMs(ms) {
  return `${ms < 9.5 ? ms.toFixed(1) : Math.round(ms)} ms`;
}
