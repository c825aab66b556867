// Files on their way in (chosen, dropped or pasted) and out.

/** Call `accept` with all photos that the user chooses in `input` at once, drops anywhere or pastes. */
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

/** Download a blob under the photo's name with another ending. */
export function save(blob, photoName, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${photoName.replace(/\.[^.]*$/, "")}-${ending}`;
  link.click();
  setTimeout(URL.revokeObjectURL, 60_000, link.href); // some browsers start to read it late
}
