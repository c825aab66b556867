// Photos chosen, dropped or pasted by the user, and downloads.

/** Call `accept` with the photos that the user chooses in `input`, drops on the page or pastes. */
export function listenForFiles(input, accept) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = ""; // so that the same files can be chosen again
    if (files.length) accept(files);
  });
  addEventListener("paste", (event) => acceptTransfer(event, event.clipboardData, accept));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dragging");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    acceptTransfer(event, event.dataTransfer, accept);
  });
}

/** Call `accept` with a sample photo when its button in `box` is pressed; samples.jpg holds them side by side. */
export function listenForSamples(box, accept) {
  const buttons = [...box.querySelectorAll("button")];
  box.addEventListener("click", async ({ target }) => {
    const index = buttons.indexOf(target);
    if (index < 0) return;
    const response = await fetch("static/samples.jpg");
    const strip = await createImageBitmap(await response.blob());
    const canvas = new OffscreenCanvas(strip.width / buttons.length, strip.height);
    canvas.getContext("2d").drawImage(strip, -index * canvas.width, 0);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
    accept([new File([blob], `${target.textContent.toLowerCase()}.jpg`, { type: "image/jpeg" })]);
  });
}

function acceptTransfer(event, transfer, accept) {
  const files = [...transfer.files];
  if (!files.length) return;
  event.preventDefault();
  accept(files);
}

/** Download a blob as the photo's name without its extension, and `suffix`. */
export function save(blob, photoName, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${photoName.replace(/\.[^.]*$/, "")}-${suffix}`;
  link.click();
  setTimeout(URL.revokeObjectURL, 60_000, link.href); // some browsers start to read it late
}
