// Requests to the service. URLs are relative, so that the page works behind a path prefix.

const TASKS = ["panoptic", "instance", "semantic"];
const UNAUTHORIZED = 401;
const FORBIDDEN = 403;

let apiKey = ""; // kept in memory only
let adminKey = ""; // kept in memory only; sent when a category name is changed

/** Send this API key with every request. */
export function setApiKey(text) {
  apiKey = text.trim();
}

/** Send this key with every change of a category name. */
export function setAdminKey(text) {
  adminKey = text.trim();
}

/** A failed request, with a message for the user. */
export class ApiError extends Error {
  constructor(message, { isRetryable, needsApiKey = false, needsAdminKey = false }) {
    super(message);
    this.isRetryable = isRetryable;
    this.needsApiKey = needsApiKey;
    this.needsAdminKey = needsAdminKey;
  }
}

/**
 * Segment a photo: the JSON response for all tasks, and the milliseconds of each stage on the server.
 *
 * Throws ApiError, or AbortError when `signal` is aborted.
 */
export async function fetchSegments(file, detail, signal) {
  const response = await post(segmentUrl(TASKS.join(","), detail), file, "application/json", signal);
  const stages = parseServerTiming(response.headers.get("Server-Timing") ?? "");
  return { result: await response.json(), stages };
}

/** The label map of one task as a PNG blob. Throws as `fetchSegments`. */
export async function fetchLabelMap(file, task, detail, signal) {
  const response = await post(segmentUrl(task, detail), file, "image/png", signal);
  return response.blob();
}

/** The photo as the service decodes it, upright, at most `longestEdge` pixels long. Throws ApiError. */
export async function fetchPhoto(file, longestEdge) {
  const response = await post(`v1/decode?longest_edge=${longestEdge}`, file, "image/jpeg");
  return response.blob();
}

/** The service's metrics as text. Throws ApiError. */
export async function fetchMetrics() {
  const response = await send("metrics", { headers: authorize({}) });
  return response.text();
}

/** Set the category name of a cluster; an empty one restores the model's own. Throws ApiError. */
export async function setCategoryName(model, clusterId, categoryName) {
  const headers = authorize({ "Content-Type": "application/json" }, adminKey || apiKey);
  const body = JSON.stringify({ category_name: categoryName });
  await send(clustersUrl(model, `/${clusterId}`), { method: "PUT", headers, body });
}

/** All clusters of a model with their names. Throws ApiError. */
export async function fetchClusters(model) {
  const response = await send(clustersUrl(model), { headers: authorize({}, apiKey || adminKey) });
  return (await response.json()).clusters;
}

/** Names belong to a version: another version has other clusters. */
function clustersUrl({ name, version }, suffix = "") {
  return `v1/models/${encodeURIComponent(name)}/clusters${suffix}?version=${encodeURIComponent(version)}`;
}

function segmentUrl(task, detail) {
  return `v1/segment?${new URLSearchParams({ task, ...(detail === "standard" ? {} : { detail }) })}`;
}

async function post(url, file, accept, signal) {
  const body = new FormData();
  body.append("file", file);
  return send(url, { method: "POST", headers: authorize({ Accept: accept }), body, signal });
}

async function send(url, options) {
  const response = await fetch(url, options).catch(rejectNetworkError);
  if (!response.ok) throw await parseProblem(response);
  return response;
}

function authorize(headers, key = apiKey) {
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

/** Parse `decode;dur=7.5, queue;dur=0.1`, in its order. */
function parseServerTiming(header) {
  const parts = header.split(",").map((part) => part.trim().split(";dur="));
  return parts.filter(([, ms]) => ms !== undefined).map(([name, ms]) => ({ name, ms: Number(ms) }));
}

function rejectNetworkError(error) {
  if (error.name === "AbortError") throw error;
  // A server that closes the connection during a large upload looks like one that is down.
  throw new ApiError("No response: the service cannot be reached, or the file is too large.", { isRetryable: true });
}

/** Parse RFC 9457 problem details; for any other body, such as a proxy's page, report the status. */
async function parseProblem(response) {
  const problem = await response.json().catch(() => ({}));
  const message = problem.detail ?? problem.title ?? `The service responded with status ${response.status}.`;
  const needsApiKey = response.status === UNAUTHORIZED;
  const needsAdminKey = needsApiKey || response.status === FORBIDDEN;
  const isRetryable = needsApiKey || response.status >= 500 || response.status === 429;
  return new ApiError(String(message), { isRetryable, needsApiKey, needsAdminKey });
}
