"use strict";
// Everything here only rearranges what the page already says: without scripts it is complete.
(() => {
  const $ = (id) => document.getElementById(id);

  // Tables: a button in each head sorts by that column, numbers by value, the largest first.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    if (body.rows.length < 2) continue;
    heads.forEach((head, column) => {
      if ("plain" in head.dataset) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      const value = (row) => {
        const cell = row.cells[column], text = cell.dataset.sort ?? cell.textContent.trim();
        const number = Number(text.replaceAll(",", ""));
        return text !== "" && !Number.isNaN(number) ? number : text;
      };
      button.addEventListener("click", () => {
        const rows = [...body.rows];
        const numeric = rows.some((row) => typeof value(row) === "number");
        const was = head.getAttribute("aria-sort");
        const down = was === "none" ? numeric : was === "ascending";
        for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const known = (row) => !numeric || typeof value(row) === "number";
        rows.sort((a, b) => {
          if (known(a) !== known(b)) return known(a) ? -1 : 1;  // what was not measured stays last
          const [x, y] = [value(a), value(b)];
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return down ? -order : order;
        });
        body.append(...rows);
      });
    });
  }

  // The gallery: order, the two arms that are compared, and the kind of word.
  const list = $("cards");
  if (list) {
    const [order, before, after, kind, shown] = ["order", "before", "after", "kind", "shown"].map($);
    const cards = [...list.children].map((element) => ({
      element,
      word: element.dataset.word,
      kind: element.dataset.kind,
      measure: element.dataset.measure,
      scores: JSON.parse(element.dataset.scores),
      misses: JSON.parse(element.dataset.misses),
      grades: JSON.parse(element.dataset.grades),
    }));
    const names = Object.keys(cards[0].misses);
    const show = () => {
      const from = before?.value ?? names[0], to = after?.value ?? names.at(-1);
      for (const card of cards) {
        card.known = from in card.scores && to in card.scores;
        card.gain = card.known ? card.scores[to] - card.scores[from] : 0;
        const told = card.element.querySelector(".change");
        if (told) {
          const points = Math.round(100 * card.gain);
          told.textContent = `${points < 0 ? "−" : "+"}${Math.abs(points)} points ${card.measure}`;
          told.className = `change ${points > 0 ? "up" : points < 0 ? "down" : ""}`;
        }
      }
      const rules = {
        failure: (a, b) => (b.misses[to] ? 1 : 0) - (a.misses[to] ? 1 : 0)
          || (a.grades[to] ?? 0) - (b.grades[to] ?? 0) || a.gain - b.gain,
        gain: (a, b) => b.gain - a.gain,
        loss: (a, b) => a.gain - b.gain,
        word: (a, b) => a.word.localeCompare(b.word),
      };
      cards.sort(rules[order.value]);
      list.append(...cards.map((card) => card.element));
      let count = 0;
      for (const card of cards) {
        card.element.hidden = Boolean(kind?.value) && card.kind !== kind.value;
        count += card.element.hidden ? 0 : 1;
      }
      shown.textContent = `${count} of ${cards.length} words`;
    };
    for (const control of [order, before, after, kind]) control?.addEventListener("change", show);
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    show();
  }

  // Where the reader is.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of document.querySelectorAll("main > section")) watch.observe(section);

  const commands = $("commands");
  if (commands && navigator.clipboard) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(commands.textContent);
      button.textContent = "Copied";
    });
    commands.after(button);
  }
})();
