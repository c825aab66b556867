import { fetchMetrics } from "./api.js";
import { formatS, renderFigure } from "./figures.js";
import { Metrics, findQuantile, subtractBins } from "./metrics.js";
import { drawLine, listPairs } from "./sparkline.js";

const EVERY_MS = 2000;
const KEPT = 60; // two minutes
const DURATION = "http_server_request_duration_seconds";
const ROUTE = { route: "/v1/segment" };

/** A live panel of queue and latency, read from `/metrics` while it is open and seen. */
export function watchHealth(panel, line, body) {
  const samples = [];
  async function look() {
    if (!panel.open || document.hidden) return;
    try {
      samples.push(readSample(new Metrics(await fetchMetrics())));
      if (samples.length > KEPT) samples.shift();
      show(samples, line, body);
    } catch (error) {
      line.textContent = `metrics are out of reach: ${error.message}`;
    }
  }
  panel.addEventListener("toggle", look);
  setInterval(look, EVERY_MS);
}

function readSample(metrics) {
  return {
    at: performance.now(),
    depth: metrics.sum("useg_queue_depth"),
    capacity: metrics.sum("useg_queue_capacity"),
    inflight: metrics.sum("useg_requests_in_flight"),
    answered: metrics.sum(`${DURATION}_count`, ROUTE),
    bins: metrics.bins(DURATION, ROUTE),
  };
}

function show(samples, line, body) {
  const [first, last] = [samples[0], samples.at(-1)];
  const isFresh = last.answered > first.answered;
  const bins = isFresh ? subtractBins(last.bins, first.bins) : last.bins;
  const period = isFresh ? "in the last two minutes" : "since its start";
  const rate = (last.answered - first.answered) / Math.max(1, (last.at - first.at) / 1000);
  const [median, high] = [0.5, 0.95].map((share) => findQuantile(share, bins));
  line.textContent = `${last.depth} waiting, ${last.inflight} in flight`;
  body.replaceChildren(
    renderFigure("Waiting", `${last.depth} of ${last.capacity}`, renderMeter(last)),
    renderFigure(
      "In flight",
      String(last.inflight),
      drawLine(
        samples.map(({ inflight }) => inflight),
        KEPT,
      ),
    ),
    renderFigure(
      "Answers a second",
      rate.toFixed(1),
      drawLine(
        listPairs(samples, (a, b) => b.answered - a.answered),
        KEPT,
      ),
    ),
    renderFigure(
      `Latency ${period}`,
      median === null ? "no answer yet" : `median ${formatS(median)}, 95 % within ${formatS(high)}`,
      drawLine(
        listPairs(samples, (a, b) => findQuantile(0.5, subtractBins(b.bins, a.bins))),
        KEPT,
      ),
    ),
  );
}

function renderMeter({ depth, capacity }) {
  const meter = document.createElement("meter");
  Object.assign(meter, { max: Math.max(1, capacity), high: 0.8 * capacity, value: depth, ariaLabel: "Queue" });
  return meter;
}
