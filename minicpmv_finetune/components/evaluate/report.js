"use strict";
const cards = [...document.querySelectorAll(".card")].map((element) => ({
  element,
  outcome: element.dataset.outcome,
  words: element.textContent.toLowerCase(),
}));
const buttons = [...document.querySelectorAll("[data-filter]")];
const search = document.querySelector("#search");
const shown = document.querySelector("#shown");
const nothing = document.querySelector("#nothing");
let filter = "all";

function update() {
  const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const card of cards) {
    const visible =
      (filter === "all" || card.outcome === filter) && terms.every((word) => card.words.includes(word));
    card.element.hidden = !visible;
    count += visible;
  }
  shown.textContent = String(count);
  nothing.hidden = count > 0;
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    filter = button.dataset.filter;
    update();
    if (button.closest(".hero")) document.querySelector("#gallery").scrollIntoView({ behavior: "smooth" });
  });
}
search.addEventListener("input", update);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "Escape" && document.activeElement === search) {
    search.value = "";
    update();
  }
});
update();
