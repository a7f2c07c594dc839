"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const SIDE = 32, ROW = 48, PAGE = 100;
  const WHY = { 1: "outside of the teacher's window", 2: "a constant map", 3: "failed" };
  const ARMS = ["base", "sft", "lavender", "shuffled", "centre", "oracle"];
  // matplotlib's inferno, fitted by a polynomial for each of red, green and blue: darker is lower in any colour vision.
  const INFERNO = [
    [0.1, 27, 2962.4, -10635.9, 19675.2, -18178.4, 6398.6],
    [0.4, 144.4, -1006.7, 4451.7, -8521, 8301.2, -3116.6],
    [-9.5, 1050.1, -4145.6, 11384.5, -20974.8, 18765, -5894.5],
  ];
  const colours = Array.from({ length: 256 }, (_, level) =>
    INFERNO.map((channel) => Math.max(0, Math.min(255, channel.reduceRight((sum, c) => sum * (level / 255) + c, 0)))));

  let about, split, current = 0, example = null, image = null, chosen = null, wanted = 0, panels = [];
  let found = null;  // numbers of the examples that are listed; null: all of them
  let pages = new Map();  // number of a page of the list -> its rows, or the promise of them
  let quiet = Promise.resolve();  // until the example just chosen is there; texts of the list wait for it

  const get = async (path, query) => {
    const answer = await fetch(`${path}?${new URLSearchParams(query)}`);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const say = (text) => { $("status").textContent = text; };
  const same = (a, b) => a[0] === b[0] && a[1] === b[1] && a[2] === b[2];
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // --- the list: only the rows in sight exist ---

  const length = () => (found ? found.length : about.splits[split]);
  const number = (place) => (found ? found[place] : place);
  const page = (at) => {
    if (!pages.has(at)) {
      const from = at * PAGE, to = Math.min(length(), from + PAGE);
      const of = Array.from({ length: to - from }, (_, i) => number(from + i)).join(",");
      const mine = pages;
      const query = { split, of };
      const rows = quiet.then(() => get("/rows", query)).then((answer) => {
        mine.set(at, answer.rows);
        if (mine === pages) drawList();
      }, (error) => say(error.message));
      pages.set(at, rows);
    }
    return pages.get(at);
  };
  const drawList = () => {
    const list = $("list"), many = length();
    $("space").style.height = `${many * ROW}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(many, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
    const rows = [];
    for (let place = first; place < last; place++) {
      const at = Math.floor(place / PAGE), known = page(at);
      const told = Array.isArray(known) ? known[place - at * PAGE] : [number(place), "", "…"];
      const row = make("div", { className: "row", id: `row-${told[0]}` },
        make("b", { textContent: `${told[0]}  ${told[1]}` }), make("span", { textContent: told[2] }));
      row.style.top = `${place * ROW}px`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(told[0] === current));
      row.setAttribute("aria-setsize", String(many));
      row.setAttribute("aria-posinset", String(place + 1));
      row.addEventListener("click", () => open(told[0]));
      rows.push(row);
    }
    $("space").replaceChildren(...rows);
    list.setAttribute("aria-activedescendant", `row-${current}`);
  };
  const place = () => (found ? found.indexOf(current) : current);
  const reveal = () => {
    const list = $("list"), top = place() * ROW;
    $("space").style.height = `${length() * ROW}px`;  // before it is drawn, or there is nowhere to scroll to
    if (top < 0) return;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  };
  const step = (by) => {
    const at = place(), to = at < 0 ? 0 : Math.max(0, Math.min(length() - 1, at + by));
    if (length() && to !== at) open(number(to));
  };
  const count = () => {
    $("count").textContent = `${length().toLocaleString("en")} of ${about.splits[split].toLocaleString("en")} examples`;
  };
  const relist = () => {
    pages = new Map();
    $("list").scrollTop = 0;
    count();
    reveal();
    drawList();
  };

  // --- search: by key, or by words; a long search answers in parts ---

  let asked = 0;
  const search = async () => {
    const turn = ++asked, q = $("search").value.trim();
    if (!q) { found = null; relist(); return; }
    for (let more = true; more;) {
      const answer = await get("/search", { split, q });
      if (turn !== asked) return;
      found = answer.found;
      more = answer.searched < answer.of;
      relist();
      const cut = answer.count > found.length ? `, the first ${found.length.toLocaleString("en")} are listed` : "";
      $("count").textContent = `${answer.count.toLocaleString("en")} found${cut}` +
        (more ? `; ${answer.searched.toLocaleString("en")} of ${answer.of.toLocaleString("en")} searched…` : "");
    }
    performance.mark("searched");
  };

  // --- pictures ---

  const drawPanel = (panel) => {
    const canvas = panel.canvas, context = canvas.getContext("2d");
    if (!image) { context.clearRect(0, 0, canvas.width, canvas.height); return; }
    const scale = Math.max(1, Math.min(8, Math.round(512 / Math.max(image.naturalWidth, image.naturalHeight))));
    const width = image.naturalWidth * scale, height = image.naturalHeight * scale;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const at = chosen && panel.maps ? panel.maps.words.findIndex((word) => same(word, chosen)) : -1;
    const shown = at >= 0 && panel.maps.status[at] === 0, strength = Number($("strength").value);
    context.imageSmoothingEnabled = image.naturalWidth > 128;
    context.filter = shown ? `grayscale(${0.65 * strength}) brightness(${1 - 0.45 * strength})` : "none";
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    canvas.dataset.shown = shown ? chosen.join(",") : "";
    if (!shown) return;
    const heat = new ImageData(SIDE, SIDE);
    for (let i = 0; i < SIDE * SIDE; i++) {
      const level = panel.maps.maps[at * SIDE * SIDE + i];
      heat.data.set([...colours[level], 255 * strength * (0.3 + 0.7 * level / 255)], 4 * i);
    }
    const small = new OffscreenCanvas(SIDE, SIDE);
    small.getContext("2d").putImageData(heat, 0, 0);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  };
  const tell = (panel, text) => {
    const at = chosen && panel.maps ? panel.maps.words.findIndex((word) => same(word, chosen)) : -1;
    let note = panel.problem ?? (panel.kind && !panel.maps ? "reading…" : "");
    if (chosen && panel.maps) {
      note = at < 0 ? "no map of this word" : WHY[panel.maps.status[at]] ?? "";
      const range = panel.maps.range[at];
      if (!note && range) note = `${range[0].toPrecision(2)} to ${range[1].toPrecision(2)}`;
    }
    panel.note.textContent = note;
    const about = panel.kind ? `where ${panel.name} looks for ${text}` : "the image";
    panel.canvas.setAttribute("aria-label", chosen && at >= 0 ? about : `the image of example ${example?.key ?? ""}`);
  };
  const drawAll = () => {
    const text = chosen ? [...example.turns[chosen[0]].text].slice(chosen[1], chosen[2]).join("") : "";
    for (const panel of panels) { drawPanel(panel); tell(panel, text); }
    $("word").textContent = text ? `“${text}”` : "Point at a word, or move to it with Tab and the arrow keys.";
  };

  // --- teachers and students ---

  const sources = () => [
    ...Object.entries(about.teachers[split]).map(([name, stored]) => ({ kind: "teacher", name, stored })),
    ...about.students.map((name) => ({ kind: "student", name, stored: true })),
  ];
  const tone = (source) => {
    const arm = source.name.replace(/-\d+$/, "");
    return source.kind === "teacher" ? "teacher" : ARMS.includes(arm) ? arm : "a";
  };
  const picked = () => [...document.querySelectorAll("#sources input:checked")].map((box) => box.source);
  const swatch = (source) => {
    const dot = make("i", { className: "swatch" });
    dot.style.background = `var(--arm-${tone(source)})`;
    return dot;
  };
  const showSources = () => {
    const before = new Set(JSON.parse(sessionStorage.getItem("sources") ?? "[]"));
    const all = sources(), stored = all.find((source) => source.kind === "teacher" && source.stored) ?? all[0];
    const kept = all.filter((source) => before.has(`${source.kind}/${source.name}`));
    $("sources").replaceChildren($("sources").firstElementChild, ...all.map((source) => {
      const box = make("input", { type: "checkbox", checked: kept.length ? kept.includes(source) : source === stored });
      box.source = source;
      box.addEventListener("change", () => {
        sessionStorage.setItem("sources", JSON.stringify(picked().map((one) => `${one.kind}/${one.name}`)));
        showPanels();
        loadMaps(wanted);
      });
      const label = source.kind === "teacher" ? `teacher ${source.name}` : source.name;
      const hint = source.stored ? "" : "read now";
      return make("label", {}, box, swatch(source), label, ...(hint ? [make("small", { textContent: hint })] : []));
    }));
    showPanels();
  };
  const showPanels = () => {
    const kept = new Map(panels.map((panel) => [`${panel.kind}/${panel.name}`, panel]));
    panels = [{ kind: "", name: "image" }, ...picked()].map((source) => {
      const key = `${source.kind}/${source.name}`;
      if (kept.has(key)) return kept.get(key);
      const canvas = make("canvas", { width: 256, height: 256 }), note = make("small");
      canvas.setAttribute("role", "img");
      const caption = make("figcaption", {}, ...(source.kind ? [swatch(source)] : []), source.name, note);
      return { ...source, canvas, note, maps: null, element: make("figure", {}, canvas, caption) };
    });
    $("panels").replaceChildren(...panels.map((panel) => panel.element));
    if (example) drawAll();
  };
  const fetchMaps = async (turn) => {
    await Promise.all(panels.filter((panel) => panel.kind && !panel.maps && !panel.problem).map(async (panel) => {
      try {
        const answer = await get("/maps", { split, index: current, kind: panel.kind, name: panel.name });
        const maps = { ...answer, maps: Uint8Array.from(atob(answer.maps), (c) => c.charCodeAt(0)) };
        if (turn === wanted) panel.maps = maps;
      } catch (error) {
        if (turn === wanted) panel.problem = error.message;
      }
    }));
  };
  const showMaps = () => {
    const known = panels.flatMap((panel) => panel.maps?.words.filter((_, i) => panel.maps.status[i] === 0) ?? []);
    for (const span of document.querySelectorAll(".word"))
      span.classList.toggle("some", known.some((word) => same(word, span.word)));
    drawAll();
    const some = document.querySelectorAll(".word.some").length;
    say(`${example.words.length} words, ${some} with a map`);
  };
  const loadMaps = async (turn) => {
    await fetchMaps(turn);
    if (turn === wanted) showMaps();
  };

  // --- one example ---

  const choose = (span) => {
    document.querySelectorAll(".word.on").forEach((other) => other.classList.remove("on"));
    span.classList.add("on");
    for (const other of document.querySelectorAll(".word")) other.tabIndex = other === span ? 0 : -1;
    chosen = span.word;
    drawAll();
  };
  const showTurns = () => {
    $("turns").replaceChildren(...example.turns.map((turn, at) => {
      const line = make("p", { className: "turn" }, make("b", { textContent: turn.role }));
      // Offsets count code points, as Python does; a script counts UTF-16 units.
      const text = [...turn.text];
      let last = 0;
      for (const word of example.words.filter((one) => one[0] === at)) {
        const span = make("span", { className: "word", tabIndex: -1, textContent: text.slice(word[1], word[2]).join("") });
        span.word = word;
        span.addEventListener("pointerenter", () => choose(span));
        span.addEventListener("focus", () => choose(span));
        line.append(text.slice(last, word[1]).join(""), span);
        last = word[2];
      }
      line.append(text.slice(last).join(""));
      return line;
    }));
    const first = document.querySelector(".word");
    if (first) first.tabIndex = 0;
  };
  const showMeta = () => {
    const told = { key: example.key, source: example.source, licence: example.licence, ...example.meta };
    $("meta").replaceChildren(...Object.entries(told).flatMap(([key, value]) => [
      make("dt", { textContent: key }),
      make("dd", { textContent: typeof value === "string" ? value : JSON.stringify(value) }),
    ]));
  };
  const loadImage = async (query) => {
    const picture = new Image();
    picture.src = `/image?${new URLSearchParams(query)}`;
    await picture.decode();
    return picture;
  };
  const open = async (index) => {
    const turn = ++wanted;
    current = index;
    history.replaceState(null, "", `#${encodeURIComponent(split)}/${index}`);
    const query = { split, index };
    for (const panel of panels) { panel.maps = null; panel.problem = undefined; }
    const told = get("/example", query), shown = loadImage(query).catch(() => null), maps = fetchMaps(turn);
    quiet = Promise.allSettled([told, shown]);
    reveal();
    drawList();
    try {
      const [one, picture] = await Promise.all([told, shown]);
      if (turn !== wanted) return;
      [example, image, chosen] = [one, picture, null];
      showTurns();
      showMeta();
      drawAll();
      await maps;
      if (turn !== wanted) return;
      showMaps();
      if (example.image && !picture) say("the image cannot be shown");
      performance.mark(`shown-${split}-${index}`);
    } catch (error) {
      if (turn === wanted) say(error.message);
    }
  };

  const start = async () => {
    about = JSON.parse($("about").textContent);  // it comes with the page, to save a request
    $("data").textContent = `${about.data} · students of ${about.model}`;
    document.title = `Word maps: ${about.data}`;
    $("split").replaceChildren(...Object.keys(about.splits).map((name) => new Option(name)));
    const [name, index] = decodeURIComponent(location.hash.slice(1)).split("/");
    if (name in about.splits) $("split").value = name;
    split = $("split").value;
    current = Math.max(0, Math.min(about.splits[split] - 1, Number(index) || 0));
    showSources();
    count();
    await open(current);

    $("split").addEventListener("change", () => {
      split = $("split").value;
      found = null;
      $("search").value = "";
      asked++;
      current = 0;
      showSources();
      relist();
      open(0);
    });
    let pause;
    $("search").addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(() => search().catch((error) => say(error.message)), 120);
    });
    for (const form of ["find", "controls"]) $(form).addEventListener("submit", (event) => event.preventDefault());
    $("list").addEventListener("scroll", drawList, { passive: true });
    addEventListener("resize", drawList);
    addEventListener("hashchange", () => {
      const [name, index] = decodeURIComponent(location.hash.slice(1)).split("/");
      if (name === split && Number(index) >= 0 && Number(index) < about.splits[split]) open(Number(index));
    });
    $("strength").addEventListener("input", drawAll);
    $("back").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    $("list").addEventListener("keydown", (event) => {
      const seen = Math.floor($("list").clientHeight / ROW);
      const by = { ArrowUp: -1, ArrowDown: 1, PageUp: -seen, PageDown: seen, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      step(by);
    });
    $("turns").addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], words = [...document.querySelectorAll(".word")];
      const at = words.indexOf(document.activeElement);
      if (by && at >= 0) words[Math.max(0, Math.min(words.length - 1, at + by))].focus();
    });
  };
  start().catch((error) => say(error.message));
})();
