"use strict";
const $ = (id) => document.getElementById(id);
const SIDE = 32;
let about, example, maps = { words: [], maps: new Uint8Array(0), status: [] }, image, wanted = 0;

const get = async (path) => {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
};
const same = (a, b) => a[0] === b[0] && a[1] === b[1] && a[2] === b[2];
// Dark purple over red to yellow, brightness growing with the value, so that it reads without colour vision too.
const colour = (v) => [Math.min(255, 40 + 420 * v), Math.max(0, 330 * (v - 0.35)), Math.max(0, 90 - 160 * Math.abs(v - 0.3))];

const draw = (word) => {
  const canvas = $("canvas"), context = canvas.getContext("2d");
  if (!image) { context.clearRect(0, 0, canvas.width, canvas.height); return; }
  context.imageSmoothingEnabled = image.naturalWidth > 128;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const at = word ? maps.words.findIndex((w) => same(w, word)) : -1;
  if (at < 0) return;
  const heat = new ImageData(SIDE, SIDE), strength = Number($("strength").value);
  for (let i = 0; i < SIDE * SIDE; i++) {
    const value = maps.maps[at * SIDE * SIDE + i] / 255;
    heat.data.set([...colour(value), 255 * strength], 4 * i);
  }
  const small = new OffscreenCanvas(SIDE, SIDE);
  small.getContext("2d").putImageData(heat, 0, 0);
  context.imageSmoothingEnabled = true;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
};

const showTurns = () => {
  const box = $("turns");
  box.replaceChildren(...example.turns.map((turn, number) => {
    const line = document.createElement("p"), role = document.createElement("b");
    line.className = "turn";
    role.textContent = turn.role;
    line.append(role);
    // Offsets count code points, as Python does; a script counts UTF-16 units.
    const text = [...turn.text];
    let last = 0;
    for (const word of example.words.filter((w) => w[0] === number)) {
      line.append(text.slice(last, word[1]).join(""));
      const span = document.createElement("span");
      span.className = "word";
      span.textContent = text.slice(word[1], word[2]).join("");
      span.tabIndex = 0;
      span.word = word;
      span.addEventListener("pointerenter", () => choose(span));
      span.addEventListener("focus", () => choose(span));
      line.append(span);
      last = word[2];
    }
    line.append(text.slice(last).join(""));
    return line;
  }));
  markWords();
};
const markWords = () => {
  for (const span of document.querySelectorAll(".word"))
    span.classList.toggle("none", !maps.words.some((w, i) => same(w, span.word) && maps.status[i] === 0));
};
let chosen = null;
const choose = (span) => {
  document.querySelectorAll(".word.on").forEach((other) => other.classList.remove("on"));
  span.classList.add("on");
  chosen = span.word;
  const at = maps.words.findIndex((w) => same(w, chosen));
  const of = $("maps").value.split("/").slice(1).join("/");
  $("canvas").setAttribute("aria-label", at < 0 ? `the image; no map for ${span.textContent}` : `where ${of} looks for ${span.textContent}`);
  draw(chosen);
};

const loadMaps = async (turn) => {
  const [kind, ...name] = $("maps").value.split("/");
  maps = { words: [], maps: new Uint8Array(0), status: [] };
  if (kind) {
    const query = new URLSearchParams({ split: $("split").value, index: $("index").value, kind, name: name.join("/") });
    const found = await get(`/maps?${query}`);
    if (turn !== wanted) return;
    maps = { ...found, maps: Uint8Array.from(atob(found.maps), (c) => c.charCodeAt(0)) };
  }
  markWords();
  draw(chosen);
};
const load = async () => {
  const turn = ++wanted, split = $("split").value;
  const count = about.splits[split];
  const index = Math.max(0, Math.min(count - 1, Number($("index").value) || 0));
  $("index").value = index;
  $("index").max = count - 1;
  $("of").textContent = `of ${count}`;
  history.replaceState(null, "", `#${split}/${index}`);
  const query = new URLSearchParams({ split, index });
  try {
    const found = await get(`/example?${query}`);
    if (turn !== wanted) return;
    example = found;
    chosen = null;
    const before = $("maps").value;
    const options = [...example.teachers.map((name) => `teacher/${name}`), ...about.students.map((name) => `student/${name}`)];
    $("maps").replaceChildren(...(options.length ? options : ["/none"]).map((value) => new Option(value.replace("/", " "), value)));
    if (options.includes(before)) $("maps").value = before;
    showTurns();
    $("meta").replaceChildren(...Object.entries({ key: example.key, source: example.source, licence: example.licence, ...example.meta })
      .flatMap(([key, value]) => {
        const name = document.createElement("dt"), text = document.createElement("dd");
        name.textContent = key;
        text.textContent = typeof value === "string" ? value : JSON.stringify(value);
        return [name, text];
      }));
    image = null;
    if (example.image) {
      const picture = new Image();
      picture.src = `/image?${query}`;
      await picture.decode();
      if (turn !== wanted) return;
      image = picture;
      const scale = Math.max(1, Math.round(512 / Math.max(image.naturalWidth, image.naturalHeight)));
      $("canvas").width = image.naturalWidth * scale;
      $("canvas").height = image.naturalHeight * scale;
      $("canvas").setAttribute("aria-label", `the image of example ${example.key}`);
    }
    draw(null);
    await loadMaps(turn);
    if (turn === wanted) $("status").textContent = `${example.words.length} words, ${maps.status.filter((s) => s === 0).length} with a map`;
  } catch (error) {
    if (turn === wanted) $("status").textContent = error.message;
  }
};
const step = (by) => { $("index").value = Number($("index").value) + by; load(); };

(async () => {
  about = await get("/about");
  $("data").textContent = about.data;
  $("split").replaceChildren(...Object.keys(about.splits).map((name) => new Option(name)));
  const [split, index] = decodeURIComponent(location.hash.slice(1)).split("/");
  if (split in about.splits) { $("split").value = split; $("index").value = Number(index) || 0; }
  $("split").addEventListener("change", () => { $("index").value = 0; load(); });
  $("index").addEventListener("change", load);
  $("maps").addEventListener("change", () => loadMaps(wanted).catch((error) => { $("status").textContent = error.message; }));
  $("strength").addEventListener("input", () => draw(chosen));
  $("back").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  load();
})().catch((error) => { $("status").textContent = error.message; });
