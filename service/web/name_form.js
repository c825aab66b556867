import { ApiError, fetchClusters, setAdminKey, setCategoryName } from "./api.js";

const MAX_NAME_LENGTH = 80;

/** A form that sets the category name of the pinned segment's clusters. */
export class NameForm {
  element = document.createElement("form");
  #onRenamed;
  #segment = null;
  #model = null;
  #label = render("label", { htmlFor: "name" });
  #name = render("input", { id: "name", maxLength: MAX_NAME_LENGTH, autocomplete: "off", placeholder: "no name yet" });
  #suggestions = render("datalist", { id: "known-names" });
  #save = render("button", { type: "submit", textContent: "Save" });
  #error = render("p", { className: "name-error", hidden: true });
  #keyField = render("label", { className: "name-key", hidden: true, textContent: "Admin key " });
  #key = render("input", { type: "password", autocomplete: "off", spellcheck: false });

  /** `onRenamed` is called with a model and all its clusters after one of them was renamed. */
  constructor(onRenamed) {
    this.#onRenamed = onRenamed;
    this.element.className = "name-form";
    this.#name.setAttribute("list", this.#suggestions.id);
    this.#error.setAttribute("role", "alert");
    this.#keyField.append(this.#key);
    const row = render("div", { className: "name-row" });
    row.append(this.#name, this.#save);
    const hint = render("small", { textContent: "Used in all new results. Leave empty to restore the default name." });
    this.element.append(this.#label, row, hint, this.#suggestions, this.#error, this.#keyField);
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.element.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.#isChanged) return;
      event.stopPropagation(); // the segment stays pinned
      this.#reset();
    });
  }

  /** Edit the clusters of another segment, found by this version of a model; suggest these names. */
  show(segment, model, names) {
    this.#segment = segment;
    this.#model = model;
    this.#label.textContent = `Name of cluster ${segment.cluster_ids.join(", ")}`;
    this.#suggestions.replaceChildren(...names.map((name) => render("option", { value: name })));
    this.#reset();
  }

  get #isChanged() {
    return this.#name.value !== (this.#segment.category_name ?? "") || !this.#error.hidden;
  }

  #reset() {
    this.#name.value = this.#segment.category_name ?? "";
    this.#error.hidden = this.#keyField.hidden = true;
  }

  async #submit() {
    const [segment, model] = [this.#segment, this.#model];
    if (this.#key.value) setAdminKey(this.#key.value);
    this.#save.disabled = true;
    try {
      for (const clusterId of segment.cluster_ids) await setCategoryName(model, clusterId, this.#name.value);
      this.#onRenamed(model, await fetchClusters(model));
    } catch (error) {
      if (segment === this.#segment) this.#showError(error);
    }
    this.#save.disabled = false;
  }

  #showError(error) {
    if (!(error instanceof ApiError)) console.error(error);
    this.#error.textContent = error instanceof ApiError ? error.message : "The name could not be saved.";
    this.#error.hidden = false;
    this.#keyField.hidden = !error.needsAdminKey;
    if (error.needsAdminKey) this.#key.focus();
  }
}

function render(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}
