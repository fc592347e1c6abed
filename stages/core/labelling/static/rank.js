// Several images are put in an order: each number names the next one, and the whole order is one answer.
"use strict";

const ORDINALS = ["1st", "2nd", "3rd", "4th"];
let groups = []; // numbers of the images that have a place, the best first; those in one list are equal
let isJoining = false; // the next number is equal to the last one

const sides = () => [...desk.querySelectorAll("[data-ranked] .side")];
const isRanking = () => sides().length > 0;
const without = () => sides().map((_, at) => at + 1).filter((number) => !groups.flat().includes(number));
const rankOf = (number) => groups.findIndex((group) => group.includes(number)) + 1;

function startRanking() {
  groups = [];
  isJoining = false;
  drawRanks();
}

function place(number) {
  if (!isReady || !without().includes(number)) return;
  if (isJoining) groups.at(-1).push(number);
  else groups.push([number]);
  isJoining = false;
  if (without().length === 1) endRanking();
  else drawRanks();
}

function endRanking() {
  if (!isReady) return;
  if (without().length) groups.push(without());
  drawRanks();
  const pair = desk.querySelector(".pair");
  ask("/answer", { pair: pair.dataset.pair, answer: "ranked", ranks: sides().map((_, at) => rankOf(at + 1)) });
}

function join() {
  if (groups.length) isJoining = !isJoining;
  drawRanks();
}

function takeBackPlace() {
  if (!isRanking() || !groups.length) return false;
  if (!isJoining) groups.at(-1).pop();
  if (!groups.at(-1).length) groups.pop();
  isJoining = false;
  drawRanks();
  return true;
}

function drawRanks() {
  if (!isRanking()) return;
  sides().forEach((side, at) => {
    const rank = rankOf(at + 1);
    const badge = side.querySelector(".rank");
    badge.textContent = rank ? ORDINALS[rank - 1] : "";
    badge.hidden = !rank;
  });
  const last = groups.at(-1)?.at(-1);
  document.getElementById("asked").textContent = isJoining
    ? `Which is as good as image ${last}?`
    : groups.length ? `Image ${last} is ${ORDINALS[groups.length - 1]}. Which comes next?` : "Which is the best?";
  desk.querySelector("[data-equal]").setAttribute("aria-pressed", String(isJoining));
  const undo = desk.querySelector("[data-undo]");
  undo.dataset.could ??= String(!undo.disabled);
  undo.disabled = undo.dataset.could === "false" && !groups.length;
}

// Whether the key was one of a ranking's own.
function takeRankingKey(key, target) {
  if (key >= "1" && key <= "9") place(Number(key));
  else if (key === "=" || key === "ArrowDown") join();
  else if (key === "Enter" && target.closest("button, a, summary")) return false;
  else if (key === "Enter" || key === "ArrowRight") endRanking();
  else if (key === "0" || key === "ArrowUp") answer("all_bad");
  else if (key === "s") answer("skip");
  else return key === "ArrowLeft"; // it answers a pair, and would mislead here
  return true;
}
