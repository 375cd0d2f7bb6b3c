// Text is as large as fits: in a window of 1280 x 720, 32 px (beside a figure 24) down to 14.
for (const slide of document.querySelectorAll("section > div")) {
  const fits = () => slide.scrollHeight <= slide.clientHeight && slide.scrollWidth <= slide.clientWidth;
  let size = slide.querySelector("img") ? 24 : 32;
  do slide.style.fontSize = `${size / 20}rem`;
  while (!fits() && --size >= 14);
}

// The arrow keys, and those of a presenter, go from slide to slide.
const steps = {
  ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1, Home: -Infinity, End: Infinity,
};
const slides = [...document.querySelectorAll("section")];
addEventListener("keydown", (event) => {
  if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const now = slides.findIndex((slide) => slide.getBoundingClientRect().bottom > innerHeight / 2);
  slides[Math.max(0, Math.min(slides.length - 1, now + steps[event.key]))].scrollIntoView();
});
