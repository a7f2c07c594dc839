"use strict";
(() => {
  const list = document.getElementById("cards");
  if (!list) return;
  const order = document.getElementById("order"), kind = document.getElementById("kind");
  const shown = document.getElementById("shown");
  const cards = [...list.children];
  const rules = {
    failure: (a, b) => b.dataset.failure - a.dataset.failure || a.dataset.gain - b.dataset.gain,
    gain: (a, b) => b.dataset.gain - a.dataset.gain,
    loss: (a, b) => a.dataset.gain - b.dataset.gain,
    word: (a, b) => a.dataset.word.localeCompare(b.dataset.word),
  };
  const show = () => {
    list.append(...cards.slice().sort(rules[order.value]));
    let count = 0;
    for (const card of cards) {
      card.hidden = kind.value !== "" && card.dataset.kind !== kind.value;
      count += card.hidden ? 0 : 1;
    }
    shown.textContent = `${count} of ${cards.length} words`;
  };
  order.addEventListener("change", show);
  kind.addEventListener("change", show);
  show();
})();
