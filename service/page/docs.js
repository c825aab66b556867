// The service's OpenAPI document, as a page: nothing is loaded from elsewhere.

const main = document.getElementById("docs");
const METHODS = ["get", "put", "post", "delete"];

function render(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** The part of the document that a reference names. */
function resolve(document, node) {
  if (!node?.$ref) return node ?? {};
  return node.$ref.replace("#/", "").split("/").reduce((part, key) => part[key], document);
}

/** A schema in a few words. */
function nameType(document, node) {
  if (node?.$ref) return node.$ref.split("/").at(-1);
  const schema = resolve(document, node);
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.map((each) => nameType(document, each)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  if (schema.type === "array") return `list of ${schema.prefixItems ? "numbers" : nameType(document, schema.items)}`;
  const range = [schema.minimum, schema.maximum].some((each) => each !== undefined);
  const limits = range ? ` ${schema.minimum ?? ""}…${schema.maximum ?? ""}` : "";
  return `${schema.format === "binary" ? "bytes" : (schema.type ?? "anything")}${limits}`;
}

function renderFacts(document, entries) {
  const list = render("dl");
  for (const { name, schema, description, note } of entries) {
    const preset = schema?.default === undefined ? "" : `, by default ${JSON.stringify(schema.default)}`;
    const type = render("code", "", nameType(document, schema) + preset);
    const words = render("small", "", [note, description ?? schema?.description].filter(Boolean).join(". "));
    list.append(render("dt", "", render("code", "", name)), render("dd", "", type, words));
  }
  return list;
}

function renderContent(document, content) {
  return Object.entries(content ?? {}).map(([media, { schema, example, examples }]) => {
    const details = render("details", "", render("summary", "", render("code", "", media)));
    const whole = resolve(document, schema);
    if (whole.description) details.append(render("p", "", whole.description));
    const fields = Object.entries(whole.properties ?? {}).map(([name, each]) => ({ name, schema: each }));
    if (fields.length) details.append(renderFacts(document, fields));
    else details.append(render("p", "", render("code", "", nameType(document, schema))));
    const shown = examples ?? (example === undefined ? {} : { example: { value: example } });
    for (const [title, { value }] of Object.entries(shown)) {
      details.append(render("h4", "", title), render("pre", "", JSON.stringify(value, null, 2)));
    }
    return details;
  });
}

function renderAnswers(document, responses) {
  return Object.entries(responses ?? {}).flatMap(([status, answer]) => [
    render("h4", "", render("strong", "", status), ` ${answer.description}`),
    ...renderContent(document, answer.content),
  ]);
}

function renderOperation(document, method, path, operation) {
  const body = render("div", "", render("p", "", operation.description ?? ""));
  const parameters = (operation.parameters ?? []).map((each) => ({ ...each, note: `in the ${each.in}` }));
  if (parameters.length) body.append(render("h3", "", "Parameters"), renderFacts(document, parameters));
  if (operation.requestBody) {
    const words = render("p", "", operation.requestBody.description ?? "");
    body.append(render("h3", "", "Body"), words, ...renderContent(document, operation.requestBody.content));
  }
  body.append(render("h3", "", "Answers"), ...renderAnswers(document, operation.responses));
  const title = render("summary", "");
  title.append(render("code", "method", method.toUpperCase()), render("code", "", path));
  title.append(render("span", "", (operation.description ?? "").split("\n")[0]));
  return render("details", "operation", title, body);
}

async function show() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`openapi.json: ${response.status}`);
  const document = await response.json();
  window.document.getElementById("summary").textContent = document.info.summary;
  const groups = new Map();
  for (const [path, item] of Object.entries(document.paths)) {
    for (const method of METHODS.filter((each) => item[each])) {
      const name = item[method].tags?.[0] ?? "Segments";
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(renderOperation(document, method, path, item[method]));
    }
  }
  for (const [name, operations] of groups) main.append(render("h2", "", name), ...operations);
  main.querySelector(".operation")?.setAttribute("open", "");
}

show()
  .catch((error) => main.append(render("p", "error", `The description could not be loaded: ${error.message}`)))
  .finally(() => main.setAttribute("aria-busy", "false"));
