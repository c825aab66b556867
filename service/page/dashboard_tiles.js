import { formatMb, formatS, formatShare, formatTenths, renderFigure } from "./figures.js";
import { drawLine, listPairs } from "./sparkline.js";
import { Window } from "./window.js";

const POSTS = { method: "POST", route: /^\/v1\/segment$|^\/v2\/.*infer$/ };
const FAILED = { ...POSTS, status: /^5/ };
const REQUESTS = "http_server_request_duration_seconds_count";
const ANSWERS = "useg_request_duration_seconds";
const SHORTEST = 30; // a minute
const LAG = "useg_event_loop_lag_seconds";

/** What is so at a moment: read from one look. */
const GAUGES = [
  { name: "Waiting", read: (metrics) => metrics.sum("useg_queue_depth"), format: String },
  { name: "In flight", read: (metrics) => metrics.sum("useg_requests_in_flight"), format: String },
  { name: "Memory", read: (metrics) => metrics.sum("process_resident_memory_bytes"), format: formatMb },
];

/** What happens in a time: read from a window; null where nothing did. Limits are those of the alerts. */
const COURSES = [
  {
    name: "Requests a second",
    read: (window) => window.rate("useg_requests_total"),
    format: formatTenths,
    isRate: true,
  },
  { name: "Median latency", read: (window) => window.quantile(0.5, ANSWERS), format: formatS },
  { name: "95 % answered within", read: (window) => window.quantile(0.95, ANSWERS), format: formatS, limit: 2.5 },
  {
    name: "Failed",
    read: (window) => divide(window.rise(REQUESTS, FAILED), window.rise(REQUESTS, POSTS)),
    format: formatShare,
    limit: 0.005,
  },
  { name: "Event loop late, 99\u00a0%", read: (window) => window.quantile(0.99, LAG), format: formatS, limit: 0.1 },
  {
    name: "Busy processors",
    read: (window) => window.rate("process_cpu_seconds_total"),
    format: formatTenths,
    isRate: true,
  },
];

/** Figures with their course over `samples`; rates are those of the window `recent`, all else is of `told`. */
export function renderTiles(samples, recent, told) {
  const moments = GAUGES.map(({ name, read, format }) => {
    const values = samples.map(({ metrics }) => read(metrics));
    return renderTile({ name, format }, values.at(-1), values);
  });
  const courses = COURSES.map((figure) => {
    const values = listPairs(samples, (earlier, later) => figure.read(new Window(earlier, later)));
    return renderTile(figure, figure.read(figure.isRate ? recent : told), values);
  });
  return [...courses.slice(0, 4), ...moments, ...courses.slice(4)];
}

function renderTile({ name, format, limit = Infinity }, value, values) {
  const known = values.filter((each) => each !== null);
  const course = known.length ? `now ${format(known.at(-1))}, at most ${format(Math.max(...known))}` : "nothing yet";
  const line = drawLine(values, Math.max(values.length, SHORTEST), `Course: ${course}`);
  const tile = renderFigure(name, value === null ? "–" : format(value), line);
  tile.classList.toggle("alarm", value > limit);
  return tile;
}

function divide(part, whole) {
  return whole > 0 ? part / whole : null;
}
