const GAP_PX = 14;
const MARGIN_PX = 8;

/** Show `content` beside the pointer, on the side where the window has room. */
export function placeTip(tip, { clientX, clientY }, content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const isRight = clientX + GAP_PX + tip.offsetWidth > document.documentElement.clientWidth;
  const isLow = clientY + GAP_PX + tip.offsetHeight > document.documentElement.clientHeight;
  tip.style.left = `${Math.max(MARGIN_PX, isRight ? clientX - GAP_PX - tip.offsetWidth : clientX + GAP_PX)}px`;
  tip.style.top = `${Math.max(MARGIN_PX, isLow ? clientY - GAP_PX - tip.offsetHeight : clientY + GAP_PX)}px`;
}
