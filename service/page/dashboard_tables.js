import { formatS, formatShare } from "./figures.js";
import { renderBar, renderTable } from "./tables.js";

const ANSWERS = "useg_request_duration_seconds";
const STAGES = "useg_stage_duration_seconds";
const SHARES = [0.5, 0.95, 0.99];
const QUANTILES = ["Median", "95 %", "99 %"];
const MEASURES = [
  ["segments", "Segments", "useg_segments_per_image", (mean) => mean.toFixed(1)],
  ["void", "Void", "useg_void_ratio", formatShare],
  ["score", "Score", "useg_mean_score", (mean) => mean.toFixed(2)],
];

/** The tables, by the place where each belongs: what is so now, and what happened in the time that is told. */
export function renderDetails(metrics, told) {
  return {
    tasks: [renderTasks(told)],
    stages: [renderStages(told)],
    batches: renderBatches(told),
    failures: [renderFailures(told)],
    answers: [renderAnswers(metrics, told)],
    versions: [renderVersions(metrics)],
  };
}

function renderTasks(told) {
  const rows = [...told.rises(`${ANSWERS}_count`, "task")].map(([task, count]) => [
    task,
    String(count),
    ...listQuantiles(told, ANSWERS, { task }),
  ]);
  return renderTable("Latency by task", ["Task", "Answers", ...QUANTILES], rows);
}

function renderStages(told) {
  const sums = [...told.rises(`${STAGES}_sum`, "stage")].filter(([, seconds]) => seconds > 0);
  const all = sums.reduce((total, [, seconds]) => total + seconds, 0);
  const rows = sums.map(([stage, seconds]) => [
    stage,
    ...listQuantiles(told, STAGES, { stage }),
    renderBar(seconds / all, 1, formatShare(seconds / all)),
  ]);
  return rows.length
    ? renderTable("Time in each stage", ["Stage", ...QUANTILES, "Share"], rows)
    : "No picture yet.";
}

function renderBatches(told) {
  const rows = [...told.rises("useg_batch_size_count", "release_reason")]
    .filter(([, count]) => count > 0)
    .map(([reason, count]) => [
      reason,
      String(count),
      told.mean("useg_batch_size", { release_reason: reason }).toFixed(1),
    ]);
  if (!rows.length) return ["No batch yet."];
  const padding = document.createElement("p");
  padding.textContent = `${formatShare(told.mean("useg_batch_padding_ratio") ?? 0)} of their pixels show no picture.`;
  return [renderTable("Batches", ["Released by", "Batches", "Pictures in each"], rows), padding];
}

function renderFailures(told) {
  const answered = [...told.rises("http_server_request_duration_seconds_count", "http_response_status_code")];
  const rows = [
    ...answered.filter(([status]) => /^[45]/.test(status)).map(([status, count]) => [`Status ${status}`, count]),
    ...[...told.rises("useg_requests_rejected_total", "reason")].map(([reason, count]) => [`Turned away: ${reason}`, count]),
    ...[...told.rises("useg_requests_cancelled_total", "stage")].map(([stage, count]) => [`Hung up during: ${stage}`, count]),
    ["Pictures that the network cannot take", told.rise("useg_inference_failures_total")],
    ["Batches that failed and were halved", told.rise("useg_batch_splits_total")],
    ["Restarts of what runs the network", told.rise("useg_worker_restarts_total")],
    ["Versions taken back", told.rise("useg_rollbacks_total")],
  ].filter(([, count]) => count > 0);
  const written = rows.map(([name, count]) => [name, String(count)]);
  return rows.length ? renderTable("Refusals and errors", ["What", "How often"], written) : "None.";
}

function renderAnswers(metrics, told) {
  const open = metrics
    .list("useg_segments_per_image_count")
    .map(({ labels: { model, version } }) => ({ model, version }));
  const limit = metrics.sum("useg_output_drift_psi_limit");
  const rows = open.flatMap((which) =>
    MEASURES.map(([measure, name, metric, format]) => {
      const mean = told.mean(metric, which);
      const [drift] = metrics.list("useg_output_drift_psi", { measure, ...which });
      const bar = drift && renderBar(Math.min(1, drift.value), 1, drift.value.toFixed(2), limit);
      return [open.length > 1 ? `${name}, ${which.model} ${which.version}` : name, mean === null ? null : format(mean), bar];
    }),
  );
  return renderTable("Answers", ["In the mean", "Value", `Drift (limit ${limit})`], rows);
}

function renderVersions(metrics) {
  const roles = metrics.list("useg_model_version_state").filter(({ value }) => value === 1);
  const answering = metrics.list("useg_model_info");
  const find = ({ model, version }) =>
    answering.find(({ labels }) => labels.name === model && labels.version === version)?.labels;
  const rows = roles.length
    ? roles.map(({ labels }) => [
        `${labels.model} ${labels.version}`,
        labels.state,
        find(labels)?.backend,
        find(labels)?.precision,
      ])
    : answering.map(({ labels }) => [`${labels.name} ${labels.version}`, "active", labels.backend, labels.precision]);
  return rows.length ? renderTable("Versions", ["Version", "Role", "Runs on", "Precision"], rows) : "None yet.";
}

function listQuantiles(told, name, where) {
  return SHARES.map((share) => told.quantile(share, name, where)).map((seconds) =>
    seconds === null ? null : formatS(seconds),
  );
}
