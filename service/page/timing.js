const MEANINGS = {
  read: "receiving the photo",
  decode: "decoding it",
  queue: "waiting for the network",
  preprocess: "preparing it",
  infer: "the network",
  merge: "merging masks",
  encode: "writing the answer",
  serialize: "putting it together",
};

/** Draw what the service spent its time on, to scale, and say it in words; `stages` as in the API. */
export function showTiming({ box, bar, text }, stages, seconds) {
  const total = stages.reduce((sum, { ms }) => sum + ms, 0);
  box.hidden = !(total > 0);
  if (box.hidden) return;
  bar.replaceChildren(
    ...stages.map(({ name, ms }) => {
      const piece = document.createElement("li");
      piece.dataset.stage = name;
      piece.title = `${name}: ${formatMs(ms)}, ${MEANINGS[name] ?? "a stage"}`;
      piece.style.flexGrow = ms;
      return piece;
    }),
  );
  const way = Math.max(0, seconds * 1000 - total);
  const parts = stages.map(({ name, ms }) => `${name} ${formatMs(ms)}`);
  text.textContent = `${formatMs(total)} in the service: ${parts.join(", ")}; ${formatMs(way)} on the way`;
}

function formatMs(ms) {
  return `${ms < 9.5 ? ms.toFixed(1) : Math.round(ms)} ms`;
}
