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
