// Files on their way in (chosen, dropped or pasted) and out.

/** Call `accept` with every photo that the user chooses in `input`, drops anywhere or pastes. */
export function listenForFiles(input, accept) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    if (file) accept(file);
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
  const [file] = transfer.files;
  if (!file) return;
  event.preventDefault();
  accept(file);
}

/** Download a blob under the photo's name with another ending. */
export function save(blob, photoName, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${photoName.replace(/\.[^.]*$/, "")}-${ending}`;
  link.click();
  setTimeout(URL.revokeObjectURL, 60_000, link.href); // some browsers start to read it late
}
