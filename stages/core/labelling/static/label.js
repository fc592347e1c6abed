// One key, one answer: sends it, waits until the server has it on disk, and shows the pair that it sends back.
// Where several images are ranked, rank.js makes one answer of several keys.
"use strict";

const desk = document.getElementById("desk");
const trouble = document.getElementById("trouble");
const KEYS = {
  ArrowLeft: "left", 1: "left",
  ArrowRight: "right", 2: "right",
  ArrowDown: "tie", 3: "tie",
  ArrowUp: "both_bad", 0: "both_bad",
  s: "skip",
};
const UNDO = ["u", "Backspace"];
let isReady = false; // no answer is taken before both images are seen

async function settle() {
  const images = [...desk.querySelectorAll(".pair img")];
  await Promise.allSettled(images.map((image) => image.decode()));
  startRanking();
  isReady = true;
  desk.dataset.ready = desk.querySelector(".pair")?.dataset.pair ?? "none";
  const next = desk.querySelector(".pair")?.dataset.preload ?? "";
  for (const digest of next.split(" ").filter(Boolean)) new Image().src = `/image/${digest}`;
}

async function ask(address, more) {
  if (!isReady) return;
  isReady = false;
  delete desk.dataset.ready;
  const areNumbersOpen = document.getElementById("numbers")?.open;
  try {
    const answer = await fetch(address, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ labeller: desk.dataset.labeller, ...more }),
    });
    if (!answer.ok) throw new Error(await answer.text());
    desk.innerHTML = await answer.text();
    if (areNumbersOpen) document.getElementById("numbers").open = true;
    trouble.hidden = true;
    desk.focus({ preventScroll: true });
  } catch (error) {
    trouble.textContent = error instanceof TypeError
      ? "The server does not answer. This key may not be saved; everything before it is. Start the server again, open its new address, and go on."
      : error.message;
    trouble.hidden = false;
  }
  await settle();
}

function answer(choice) {
  const pair = desk.querySelector(".pair");
  if (pair) ask("/answer", { pair: pair.dataset.pair, answer: choice });
}

// Whether the key was the one that opens and closes the numbers.
function showNumbers(key) {
  const numbers = document.getElementById("numbers");
  if (key !== "n" || !numbers) return false;
  numbers.open = !numbers.open;
  return true;
}

function undo() {
  if (!takeBackPlace()) ask("/undo", {});
}

desk.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if ("undo" in button.dataset) undo();
  else if ("place" in button.dataset) place(Number(button.dataset.place));
  else if ("equal" in button.dataset) join();
  else if ("rest" in button.dataset) endRanking();
  else answer(button.dataset.answer);
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target.closest("input, textarea, select")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (UNDO.includes(key)) undo();
  else if (isRanking()) {
    if (!takeRankingKey(key, event.target) && !showNumbers(key)) return;
  } else if (key in KEYS) answer(KEYS[key]);
  else if (!showNumbers(key)) return;
  event.preventDefault();
});

settle();
