import { fetchMetrics } from "./api.js";
import { formatSeconds, mapPairs, renderSparkline, renderStat } from "./charts.js";
import { Metrics, bucketQuantile, subtractBuckets } from "./metrics.js";

const INTERVAL_MS = 2000;
const MAX_SAMPLES = 60; // two minutes
const DURATION = "http_server_request_duration_seconds";
const ROUTE = { http_route: "/v1/segment" };

/** A live panel of queue and latency, from `/metrics`; it polls while the panel is open and visible. */
export function watchHealth(panel, summary, body) {
  const samples = [];
  async function poll() {
    if (!panel.open || document.hidden) return;
    try {
      samples.push(readSample(new Metrics(await fetchMetrics())));
      if (samples.length > MAX_SAMPLES) samples.shift();
      show(samples, summary, body);
    } catch (error) {
      summary.textContent = `metrics are not available: ${error.message}`;
    }
  }
  panel.addEventListener("toggle", poll);
  setInterval(poll, INTERVAL_MS);
}

function readSample(metrics) {
  return {
    at: performance.now(),
    depth: metrics.sum("useg_queue_depth"),
    capacity: metrics.sum("useg_queue_capacity"),
    inFlight: metrics.sum("useg_requests_in_flight"),
    responses: metrics.sum(`${DURATION}_count`, ROUTE),
    buckets: metrics.buckets(DURATION, ROUTE),
  };
}

function show(samples, summary, body) {
  const [first, last] = [samples[0], samples.at(-1)];
  const isRecent = last.responses > first.responses;
  const buckets = isRecent ? subtractBuckets(last.buckets, first.buckets) : last.buckets;
  const period = isRecent ? "in the last two minutes" : "since the start";
  const rate = (last.responses - first.responses) / Math.max(1, (last.at - first.at) / 1000);
  const [median, p95] = [0.5, 0.95].map((q) => bucketQuantile(q, buckets));
  const sparkline = (values) => renderSparkline(values, MAX_SAMPLES);
  const medians = mapPairs(samples, (a, b) => bucketQuantile(0.5, subtractBuckets(b.buckets, a.buckets)));
  summary.textContent = `${last.depth} waiting, ${last.inFlight} in flight`;
  body.replaceChildren(
    renderStat("Waiting", `${last.depth} of ${last.capacity}`, renderMeter(last)),
    renderStat("In flight", String(last.inFlight), sparkline(samples.map(({ inFlight }) => inFlight))),
    renderStat("Requests per second", rate.toFixed(1), sparkline(mapPairs(samples, (a, b) => b.responses - a.responses))),
    renderStat(
      `Latency ${period}`,
      median === null ? "no request yet" : `median ${formatSeconds(median)}, 95 % within ${formatSeconds(p95)}`,
      sparkline(medians),
    ),
  );
}

function renderMeter({ depth, capacity }) {
  const meter = document.createElement("meter");
  Object.assign(meter, { max: Math.max(1, capacity), high: 0.8 * capacity, value: depth, ariaLabel: "Queue" });
  return meter;
}
