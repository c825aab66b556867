import { Refusal, fetchClusters, nameCluster, useAdministratorKey } from "./api.js";

const MOST_CHARACTERS = 80;

/** A form that gives the held segment's cluster a name, for every answer from then on. */
export class Naming {
  form = document.createElement("form");
  #onNamed;
  #segment = null;
  #model = null;
  #label = render("label", { htmlFor: "name" });
  #name = render("input", { id: "name", maxLength: MOST_CHARACTERS, autocomplete: "off", placeholder: "no name yet" });
  #known = render("datalist", { id: "known-names" });
  #save = render("button", { type: "submit", textContent: "Save" });
  #error = render("p", { className: "naming-error", hidden: true });
  #keyField = render("label", { className: "naming-key", hidden: true, textContent: "Administrator's key " });
  #key = render("input", { type: "password", autocomplete: "off", spellcheck: false });

  /** `onNamed` is called with a model and all its clusters, once one of them has another name. */
  constructor(onNamed) {
    this.#onNamed = onNamed;
    this.form.className = "naming";
    this.#name.setAttribute("list", this.#known.id);
    this.#error.setAttribute("role", "alert");
    this.#keyField.append(this.#key);
    const row = render("div", { className: "naming-row" });
    row.append(this.#name, this.#save);
    const hint = render("small", { textContent: "In every answer from now on; an empty one gives back the model's own." });
    this.form.append(this.#label, row, hint, this.#known, this.#error, this.#keyField);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.#isChanged) return;
      event.stopPropagation(); // the segment stays held
      this.#reset();
    });
  }

  /** Name the cluster of another segment, which a model of this name and version found; `names` are suggested. */
  show(segment, model, names) {
    this.#segment = segment;
    this.#model = model;
    this.#label.textContent = `Name of cluster ${segment.cluster}`;
    this.#known.replaceChildren(...names.map((name) => render("option", { value: name })));
    this.#reset();
  }

  get #isChanged() {
    return this.#name.value !== (this.#segment.category ?? "") || !this.#error.hidden;
  }

  #reset() {
    this.#name.value = this.#segment.category ?? "";
    this.#error.hidden = this.#keyField.hidden = true;
  }

  async #submit() {
    const [segment, model] = [this.#segment, this.#model];
    if (this.#key.value) useAdministratorKey(this.#key.value);
    this.#save.disabled = true;
    try {
      await nameCluster(model, segment.cluster, this.#name.value);
      this.#onNamed(model, await fetchClusters(model));
    } catch (error) {
      if (segment === this.#segment) this.#tell(error);
    }
    this.#save.disabled = false;
  }

  #tell(error) {
    if (!(error instanceof Refusal)) console.error(error);
    this.#error.textContent = error instanceof Refusal ? error.message : "The name could not be saved.";
    this.#error.hidden = false;
    this.#keyField.hidden = !error.needsAdministrator;
    if (error.needsAdministrator) this.#key.focus();
  }
}

function render(tag, facts) {
  return Object.assign(document.createElement(tag), facts);
}
