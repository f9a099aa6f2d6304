"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
const colours = bytes(data.colours);
for (const kind of data.kinds) {
  for (const name of ["to_image", "from_image", "from_frames"]) kind[name] = floats(kind[name]);
}

const { words, frames, grid, opacity } = data;
const patches = grid * grid;
const find = (selector) => [...document.querySelectorAll(selector)];
const wordButtons = find("[data-word]"), clsButtons = find("[data-cls]"), canvases = find("canvas");
const output = document.querySelector("output");
const small = new OffscreenCanvas(grid, grid);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const number = (value) => (value ? value.toPrecision(4) : "0");
const place = (frame, patch) =>
  `row ${Math.floor(patch / grid) + 1}, column ${(patch % grid) + 1}${frames > 1 ? ` of frame ${frame + 1}` : ""}`;

// What is shown: a word over the pictures, or a patch or the CLS of a frame over the words. What the pointer is at goes
// before what was clicked.
let pinned = { word: 0 };
let hovered = null;

function drawFrame(frame, values, peak, outlined) {
  const canvas = canvases[frame], box = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(box.width));
  canvas.height = Math.max(1, Math.round(box.height));
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (values) {
    const drawn = new ImageData(grid, grid);
    for (let patch = 0; patch < patches; patch++) {
      const level = peak > 0 ? Math.min(1, values[patch] / peak) : 0;
      const colour = 3 * Math.round(255 * level);
      drawn.data.set([...colours.subarray(colour, colour + 3), 255 * opacity * level], 4 * patch);
    }
    small.getContext("2d").putImageData(drawn, 0, 0);
    context.imageSmoothingEnabled = true;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }
  if (outlined !== null) {
    const width = canvas.width / grid, height = canvas.height / grid;
    context.lineWidth = 2;
    context.strokeStyle = "#fff";
    context.strokeRect((outlined % grid) * width, Math.floor(outlined / grid) * height, width, height);
    context.setLineDash([3, 3]);
    context.strokeStyle = "#000";
    context.strokeRect((outlined % grid) * width, Math.floor(outlined / grid) * height, width, height);
  }
}

function shadeWords(values) {
  const peak = values ? Math.max(...values) : 0;
  wordButtons.forEach((button, word) => {
    const level = peak > 0 ? values[word] / peak : 0;
    const colour = colours.subarray(3 * Math.round(255 * level), 3 * Math.round(255 * level) + 3);
    button.style.background = level ? `rgba(${colour.join()}, ${opacity * level})` : "";
    button.title = values ? number(values[word]) : "";
  });
}

function show() {
  const kind = data.kinds[chosen("kind")], back = chosen("direction") === "back";
  const at = hovered || pinned;
  wordButtons.forEach((button, word) => {
    button.classList.toggle("shown", at.word === word);
    button.classList.toggle("pinned", pinned.word === word);
  });
  clsButtons.forEach((button, frame) => {
    button.classList.toggle("shown", at.cls === frame);
    button.classList.toggle("pinned", pinned.cls === frame);
  });
  if (at.word !== undefined) {
    const start = at.word * frames * patches;
    const values = (back ? kind.from_image : kind.to_image).subarray(start, start + frames * patches);
    let top = 0;
    values.forEach((value, index) => { if (value > values[top]) top = index; });
    for (let frame = 0; frame < frames; frame++) {
      drawFrame(frame, values.subarray(frame * patches, (frame + 1) * patches), values[top], null);
    }
    shadeWords(null);
    const where = place(Math.floor(top / patches), top % patches);
    output.textContent = values[top] > 0
      ? `${words[at.word]}: largest ${number(values[top])}, ${back ? "from" : "at"} ${where}`
      : `${words[at.word]}: 0 everywhere`;
    return;
  }
  const frame = at.cls === undefined ? at.frame : at.cls;
  for (let other = 0; other < frames; other++) {
    drawFrame(other, null, 0, at.cls === undefined && other === frame ? at.patch : null);
  }
  // A patch and a word have one number for each direction; the CLS of a frame looks at words only.
  const values = words.map((_, word) => {
    if (at.cls !== undefined) return kind.from_frames[word * frames + frame];
    return (back ? kind.from_image : kind.to_image)[(word * frames + frame) * patches + at.patch];
  });
  shadeWords(values);
  let top = 0;
  values.forEach((value, word) => { if (value > values[top]) top = word; });
  const name = at.cls === undefined ? place(frame, at.patch) : clsButtons[frame].textContent;
  output.textContent = `${name}: largest ${number(values[top])}, ` +
    `${back || at.cls !== undefined ? "to" : "from"} ${words[top]}`;
}

function react(element, what) {
  element.addEventListener("pointerenter", (event) => { hovered = what(event); show(); });
  element.addEventListener("focus", (event) => { hovered = what(event); show(); });
  for (const left of ["pointerleave", "blur"]) element.addEventListener(left, () => { hovered = null; show(); });
  element.addEventListener("click", (event) => { pinned = what(event); show(); });
}

wordButtons.forEach((button, word) => react(button, () => ({ word })));
clsButtons.forEach((button, cls) => react(button, () => ({ cls })));
canvases.forEach((canvas, frame) => {
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const cell = (offset, size) => Math.min(grid - 1, Math.max(0, Math.floor((offset * grid) / size)));
    const row = cell(event.clientY - box.top, box.height), column = cell(event.clientX - box.left, box.width);
    return { frame, patch: row * grid + column };
  };
  react(canvas, at);
  canvas.addEventListener("pointermove", (event) => { hovered = at(event); show(); });
});
find("input").forEach((input) => input.addEventListener("change", show));
addEventListener("resize", show);
addEventListener("load", show);
