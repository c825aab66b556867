import { fetchMetrics } from "./api.js";

const EVERY_MS = 2000;
const KEPT = 60; // two minutes
const ROUTE = 'route="/v1/segment"';
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 40;

/** A live panel of queue and latency, read from `/metrics` while it is open and seen. */
export function watchHealth(panel, line, body) {
  const samples = [];
  async function look() {
    if (!panel.open || document.hidden) return;
    try {
      samples.push(readSample(await fetchMetrics()));
      if (samples.length > KEPT) samples.shift();
      show(samples, line, body);
    } catch (error) {
      line.textContent = `metrics are out of reach: ${error.message}`;
    }
  }
  panel.addEventListener("toggle", look);
  setInterval(look, EVERY_MS);
}

/** What the panel needs of Prometheus' text format. */
export function readSample(text) {
  const sample = { at: performance.now(), depth: 0, capacity: 0, inflight: 0, answered: 0, buckets: new Map() };
  const gauges = { seg_queue_depth: "depth", seg_queue_capacity: "capacity", seg_inflight: "inflight" };
  for (const row of text.split("\n")) {
    const [, name, labels = "", value] = row.match(/^([a-z_]+)(?:\{(.*)\})? (\S+)$/) ?? [];
    if (gauges[name]) sample[gauges[name]] = Number(value);
    if (!labels.includes(ROUTE)) continue;
    if (name === "http_server_request_duration_seconds_count") sample.answered += Number(value);
    if (name !== "http_server_request_duration_seconds_bucket") continue;
    const bound = Number(labels.match(/le="([^"]+)"/)[1].replace("+Inf", "Infinity"));
    sample.buckets.set(bound, (sample.buckets.get(bound) ?? 0) + Number(value));
  }
  return sample;
}

/** The latency below which a share of the answers between two samples lies, in seconds; null if there was none. */
export function findQuantile(share, earlier, later) {
  const count = later.answered - earlier.answered;
  if (count <= 0) return null;
  let [low, below] = [0, 0];
  for (const [bound, total] of [...later.buckets].sort(([a], [b]) => a - b)) {
    const within = total - (earlier.buckets.get(bound) ?? 0);
    if (within >= share * count) {
      return Number.isFinite(bound) ? low + ((bound - low) * (share * count - below)) / (within - below) : low;
    }
    [low, below] = [bound, within];
  }
  return low;
}

function show(samples, line, body) {
  const [first, last] = [samples[0], samples.at(-1)];
  const nothing = { answered: 0, buckets: new Map() };
  const since = last.answered > first.answered ? first : nothing;
  const period = since === first ? "in the last two minutes" : "since its start";
  const rate = (last.answered - first.answered) / Math.max(1, (last.at - first.at) / 1000);
  const [median, high] = [0.5, 0.95].map((share) => findQuantile(share, since, last));
  line.textContent = `${last.depth} waiting, ${last.inflight} in flight`;
  body.replaceChildren(
    renderFigure("Waiting", `${last.depth} of ${last.capacity}`, renderMeter(last)),
    renderFigure("In flight", String(last.inflight), drawLine(samples.map(({ inflight }) => inflight))),
    renderFigure("Answers a second", rate.toFixed(1), drawLine(listPairs(samples, (a, b) => b.answered - a.answered))),
    renderFigure(
      `Latency ${period}`,
      median === null ? "no answer yet" : `median ${formatS(median)}, 95 % within ${formatS(high)}`,
      drawLine(listPairs(samples, (a, b) => findQuantile(0.5, a, b))),
    ),
  );
}

function listPairs(samples, compare) {
  return samples.slice(1).map((sample, index) => compare(samples[index], sample));
}

function renderFigure(name, value, picture) {
  const figure = document.createElement("div");
  const title = document.createElement("span");
  const number = document.createElement("strong");
  title.textContent = name;
  number.textContent = value;
  figure.append(title, number, picture);
  return figure;
}

function renderMeter({ depth, capacity }) {
  const meter = document.createElement("meter");
  Object.assign(meter, { max: Math.max(1, capacity), high: 0.8 * capacity, value: depth, ariaLabel: "Queue" });
  return meter;
}

/** A line of the last values; nulls are left out. */
function drawLine(values) {
  const top = Math.max(...values.filter((each) => each !== null), Number.MIN_VALUE);
  const points = values
    .map((value, index) => (value === null ? "" : `${KEPT - values.length + index},${HEIGHT - (HEIGHT - 2) * (value / top) - 1}`))
    .filter(Boolean);
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", `0 0 ${KEPT} ${HEIGHT}`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "polyline");
  path.setAttribute("points", points.join(" "));
  picture.append(path);
  return picture;
}

function formatS(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}
