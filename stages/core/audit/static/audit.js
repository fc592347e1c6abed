"use strict";
/* Keys of the audit: fetch the next item, swap a pair in place, say what a person decided. The page keeps no
   state of its own: each decision is on the disk before the next item comes. */

const main = document.getElementById("item");
const said = document.getElementById("said");
let isBusy = false;

const shown = () => document.getElementById("shown");

function say(text, isError) {
  if (isError) document.getElementById("large")?.close();
  said.textContent = text;
  said.classList.toggle("error", Boolean(isError));
}

async function ask(address, options) {
  if (isBusy) return;
  isBusy = true;
  try {
    const answer = await fetch(address, options);
    const text = await answer.text();
    if (answer.ok) put(text);
    else say(text, true);
  } catch {
    say("The server does not answer. Nothing that you see as kept is lost: start it again, and open the address that it prints.", true);
  } finally {
    isBusy = false;
  }
}

function put(html) {
  const before = shown().dataset.place;
  const isLarge = document.getElementById("large")?.open;
  main.innerHTML = html;
  const { query, place, said: words } = shown().dataset;
  if (place !== before) {
    location.assign("/?" + query);
    return;
  }
  history.replaceState(null, "", "/?" + query);
  say(words, false);
  main.focus({ preventScroll: true });
  scrollTo(0, 0);
  if (isLarge) document.getElementById("large")?.showModal();
  ready();
}

/* Small pictures keep their pixels; those of the next item are fetched while this one is looked at. */
function ready() {
  for (const image of main.querySelectorAll("img")) {
    const mark = () => image.classList.toggle("pixels", image.naturalWidth > 0 && image.naturalWidth <= 128);
    if (image.complete) mark();
    image.addEventListener("load", mark);
  }
  const next = shown().dataset.following;
  if (next) fetch("/item?" + next).then(answer => answer.ok ? answer.text() : "").then(html => {
    for (const image of new DOMParser().parseFromString(html, "text/html").images) new Image().src = image.getAttribute("src");
  }).catch(() => {});
}

function go(query) {
  if (query) ask("/item?" + query);
  else say("There is none further.", false);
}

function send(address, more) {
  const body = new URLSearchParams(shown().dataset.query);
  for (const [name, value] of Object.entries(more)) body.set(name, value);
  ask(address, { method: "POST", body });
}

function decide(kind, more = {}) {
  const { winner, loser } = shown().dataset;
  if (!winner) say("There is no pair here to decide about.", true);
  else send("/decide", { kind, winner, loser, ...more });
}

function enlarge() {
  const large = document.getElementById("large");
  if (!large) return say("There is no pair here to enlarge.", true);
  if (!large.open) return large.showModal();
  for (const figure of large.querySelectorAll("figure")) figure.hidden = !figure.hidden;
}

const keys = {
  a: () => decide("accept"), f: () => decide("flip"), v: () => decide("veto"), u: () => send("/undo", {}),
  n: () => document.getElementById("words")?.focus(), s: enlarge,
  j: () => go(shown().dataset.following), k: () => go(shown().dataset.previous),
};
keys.ArrowRight = keys.j;
keys.ArrowLeft = keys.k;

function press(name) {
  const isOffered = document.querySelector(`footer [data-key="${name}"]`) || name.startsWith("Arrow");
  if (isOffered) keys[name]();
}

document.addEventListener("keydown", event => {
  const field = event.target.closest("input, select, textarea");
  if (field) {
    if (event.key === "Escape") field.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  press(event.key);
});
document.addEventListener("click", event => {
  const button = event.target.closest("[data-key]");
  if (button) press(button.dataset.key);
  else if (event.target.closest(".close")) document.getElementById("large").close();
  else if (event.target.closest("#large")) enlarge();
});
document.addEventListener("submit", event => {
  if (event.target.id !== "note") return;
  event.preventDefault();
  document.getElementById("words").blur();
  decide("note", { note: document.getElementById("words").value });
});
document.getElementById("filter").addEventListener("change", event => event.target.form.requestSubmit());
ready();
