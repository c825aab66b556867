import { formatPercent, formatSeconds, renderBar, renderTable } from "./charts.js";

const DURATION = "useg_request_duration_seconds";
const STAGES = "useg_stage_duration_seconds";
const QUANTILES = [0.5, 0.95, 0.99];
const QUANTILE_NAMES = ["Median", "95 %", "99 %"];
const OUTPUTS = [
  ["segments", "Segments", "useg_segments_per_image", (mean) => mean.toFixed(1)],
  ["void", "Void", "useg_void_ratio", formatPercent],
  ["score", "Score", "useg_mean_score", (mean) => mean.toFixed(2)],
];

/** The tables by the id of their element: of the current `metrics`, and of the shown window. */
export function renderTables(metrics, shown) {
  return {
    tasks: [renderTasks(shown)],
    stages: [renderStages(shown)],
    batches: renderBatches(shown),
    failures: [renderFailures(shown)],
    outputs: [renderOutputs(metrics, shown)],
    versions: renderVersions(metrics),
  };
}

function renderTasks(shown) {
  const rows = [...shown.increaseBy(`${DURATION}_count`, "task")].map(([task, count]) => [
    task,
    String(count),
    ...renderQuantiles(shown, DURATION, { task }),
  ]);
  return renderTable("Latency by task", ["Task", "Responses", ...QUANTILE_NAMES], rows);
}

function renderStages(shown) {
  const sums = [...shown.increaseBy(`${STAGES}_sum`, "stage")].filter(([, seconds]) => seconds > 0);
  const total = sums.reduce((sum, [, seconds]) => sum + seconds, 0);
  const rows = sums.map(([stage, seconds]) => [
    stage,
    ...renderQuantiles(shown, STAGES, { stage }),
    renderBar(seconds / total, 1, formatPercent(seconds / total)),
  ]);
  return rows.length ? renderTable("Time per stage", ["Stage", ...QUANTILE_NAMES, "Share"], rows) : "No images yet.";
}

function renderBatches(shown) {
  const rows = [...shown.increaseBy("useg_batch_size_count", "release_reason")]
    .filter(([, count]) => count > 0)
    .map(([reason, count]) => [
      reason,
      String(count),
      shown.mean("useg_batch_size", { release_reason: reason }).toFixed(1),
    ]);
  if (!rows.length) return ["No batches yet."];
  const padding = document.createElement("p");
  padding.textContent = `${formatPercent(shown.mean("useg_batch_padding_ratio") ?? 0)} of the pixels are padding.`;
  return [renderTable("Batches", ["Released by", "Batches", "Images per batch"], rows), padding];
}

function renderFailures(shown) {
  const statuses = [...shown.increaseBy("http_server_request_duration_seconds_count", "http_response_status_code")];
  const rows = [
    ...statuses.filter(([status]) => /^[45]/.test(status)).map(([status, count]) => [`Status ${status}`, count]),
    ...[...shown.increaseBy("useg_requests_rejected_total", "reason")].map(([reason, count]) => [`Rejected: ${reason}`, count]),
    ...[...shown.increaseBy("useg_requests_cancelled_total", "stage")].map(([stage, count]) => [`Cancelled during: ${stage}`, count]),
    ["Images on which the network failed", shown.increase("useg_inference_failures_total")],
    ["Failed batches that were split", shown.increase("useg_batch_splits_total")],
    ["Restarts of the inference thread", shown.increase("useg_worker_restarts_total")],
    ["Rolled back versions", shown.increase("useg_rollbacks_total")],
  ].filter(([, count]) => count > 0);
  const cells = rows.map(([name, count]) => [name, String(count)]);
  return rows.length ? renderTable("Errors", ["Error", "Count"], cells) : "None.";
}

function renderOutputs(metrics, shown) {
  const versions = metrics
    .list("useg_segments_per_image_count")
    .map(({ labels: { model, version } }) => ({ model, version }));
  const limit = metrics.sum("useg_output_drift_psi_limit");
  const rows = versions.flatMap((version) =>
    OUTPUTS.map(([measure, name, metric, format]) => {
      const mean = shown.mean(metric, version);
      const [drift] = metrics.list("useg_output_drift_psi", { measure, ...version });
      const bar = drift && renderBar(Math.min(1, drift.value), 1, drift.value.toFixed(2), limit);
      const title = versions.length > 1 ? `${name}, ${version.model} ${version.version}` : name;
      return [title, mean === null ? null : format(mean), bar];
    }),
  );
  return renderTable("Model outputs", ["Measure", "Mean", `Drift (limit ${limit})`], rows);
}

function renderVersions(metrics) {
  const roles = metrics.list("useg_model_version_state").filter(({ value }) => value === 1);
  const active = metrics.list("useg_model_info");
  const findInfo = ({ model, version }) =>
    active.find(({ labels }) => labels.name === model && labels.version === version)?.labels;
  const rows = roles.length
    ? roles.map(({ labels }) => [
        `${labels.model} ${labels.version}`,
        labels.state,
        findInfo(labels)?.backend,
        findInfo(labels)?.precision,
      ])
    : active.map(({ labels }) => [`${labels.name} ${labels.version}`, "active", labels.backend, labels.precision]);
  const skipped = metrics
    .list("useg_skipped_backend_info")
    .map(({ labels }) => [`${labels.model} ${labels.version}`, labels.backend, labels.reason]);
  return [
    rows.length ? renderTable("Versions", ["Version", "State", "Backend", "Precision"], rows) : "None yet.",
    ...(skipped.length ? [renderTable("Faster backends", ["Version", "Not in use", "Why"], skipped)] : []),
  ];
}

function renderQuantiles(shown, name, where) {
  return QUANTILES.map((q) => shown.quantile(q, name, where)).map((seconds) =>
    seconds === null ? null : formatSeconds(seconds),
  );
}
