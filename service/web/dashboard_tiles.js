import {
  formatDecimal,
  formatMebibytes,
  formatPercent,
  formatSeconds,
  mapPairs,
  renderSparkline,
  renderStat,
} from "./charts.js";
import { MetricsWindow } from "./metrics.js";

const POSTS = { http_request_method: "POST", http_route: /^\/v1\/segment$|^\/v2\/.*infer$/ };
const FAILED = { ...POSTS, http_response_status_code: /^5/ };
const REQUESTS = "http_server_request_duration_seconds_count";
const DURATION = "useg_request_duration_seconds";
const MIN_CAPACITY = 30; // a minute
const LAG = "useg_event_loop_lag_seconds";

/** Values at a moment, of one scrape. */
const GAUGES = [
  { name: "Waiting", read: (metrics) => metrics.sum("useg_queue_depth"), format: String },
  { name: "In flight", read: (metrics) => metrics.sum("useg_requests_in_flight"), format: String },
  { name: "Memory", read: (metrics) => metrics.sum("process_resident_memory_bytes"), format: formatMebibytes },
];

/** Values over a time, of a window; null if nothing happened in it. Limits are those of the alerts. */
const SERIES = [
  {
    name: "Requests per second",
    read: (window) => window.rate("useg_requests_total"),
    format: formatDecimal,
    isRate: true,
  },
  { name: "Median latency", read: (window) => window.quantile(0.5, DURATION), format: formatSeconds },
  { name: "95 % latency", read: (window) => window.quantile(0.95, DURATION), format: formatSeconds, limit: 2.5 },
  {
    name: "Failed",
    read: (window) => divide(window.increase(REQUESTS, FAILED), window.increase(REQUESTS, POSTS)),
    format: formatPercent,
    limit: 0.005,
  },
  { name: "Event loop lag, 99\u00a0%", read: (window) => window.quantile(0.99, LAG), format: formatSeconds, limit: 0.1 },
  {
    name: "CPU cores in use",
    read: (window) => window.rate("process_cpu_seconds_total"),
    format: formatDecimal,
    isRate: true,
  },
];

/** Values with their course over `samples`; rates are those of the window `recent`, all else is of `shown`. */
export function renderTiles(samples, recent, shown) {
  const gauges = GAUGES.map(({ name, read, format }) => {
    const values = samples.map(({ metrics }) => read(metrics));
    return renderTile({ name, format }, values.at(-1), values);
  });
  const series = SERIES.map((each) => {
    const values = mapPairs(samples, (earlier, later) => each.read(new MetricsWindow(earlier, later)));
    return renderTile(each, each.read(each.isRate ? recent : shown), values);
  });
  return [...series.slice(0, 4), ...gauges, ...series.slice(4)];
}

function renderTile({ name, format, limit = Infinity }, value, values) {
  const known = values.filter((each) => each !== null);
  const course = known.length ? `now ${format(known.at(-1))}, max ${format(Math.max(...known))}` : "no data yet";
  const sparkline = renderSparkline(values, Math.max(values.length, MIN_CAPACITY), `Course: ${course}`);
  const tile = renderStat(name, value === null ? "–" : format(value), sparkline);
  tile.classList.toggle("alarm", value > limit);
  return tile;
}

function divide(part, whole) {
  return whole > 0 ? part / whole : null;
}
