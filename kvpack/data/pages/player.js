const find = name => element.querySelector(name);
let name = null, fps = 16, tracks = [], at = 0, playing = true, last = null, ended = false;

function begin(value) {
  // A fork goes on in the same showing: the video beside it is kept.
  tracks = name === value.name ? tracks : [];
  if (name !== value.name) { at = value.videos.length ? value.videos[0].first : 0; playing = true; }
  name = value.name;
  const stage = find(".kvp-stage");
  stage.replaceChildren();
  value.videos.forEach((video, index) => {
    const figure = document.createElement("figure"), label = document.createElement("figcaption");
    const canvas = document.createElement("canvas");
    label.textContent = video.label;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "the video of " + video.label);
    figure.append(label, canvas);
    stage.append(figure);
    // A fork has the frames of before from the video that it was made of.
    const before = index && tracks[0] ? tracks[0].frames.slice(0, video.first) : [];
    const first = before.length ? tracks[0].first : video.first;
    tracks[index] = { ...(tracks[index] || { frames: before, first }), canvas, shown: -1 };
  });
}

function take(value) {
  if (!value || !value.videos) return;
  if (name !== value.name || tracks.length !== value.videos.length) begin(value);
  fps = value.fps || 16;
  ended = value.ended;
  value.videos.forEach((video, index) => {
    const track = tracks[index];
    track.prompts = video.prompts;
    for (const [first, pictures] of Object.entries(video.pictures)) {
      if (track.frames[Number(first)]) continue;
      pictures.forEach((source, offset) => {
        const image = new Image();
        image.src = source;
        track.frames[Number(first) + offset] = image;
      });
    }
  });
}

function limits() {
  if (!tracks.length) return [0, 0];
  const low = Math.max(...tracks.map(each => each.first));
  return [low, Math.max(low, Math.min(...tracks.map(each => each.frames.length)) - 1)];
}

function draw() {
  const index = Math.floor(at);
  for (const track of tracks) {
    const image = track.frames[index];
    if (!image || !image.complete || !image.naturalWidth || track.shown === index) continue;
    if (track.canvas.width !== image.naturalWidth) {
      track.canvas.width = image.naturalWidth;
      track.canvas.height = image.naturalHeight;
    }
    track.canvas.getContext("2d").drawImage(image, 0, 0);
    track.shown = index;
    track.canvas.dataset.frame = index;
  }
}

function tick(now) {
  if (!element.isConnected) return;
  const [low, high] = limits();
  if (playing && last !== null && at < high) at = Math.min(high, at + fps * (now - last) / 1000);
  last = now;
  at = Math.max(low, Math.min(at, high));
  draw();
  const seek = find(".kvp-seek"), when = find(".kvp-when");
  seek.min = low; seek.max = high;
  if (document.activeElement !== seek || playing) seek.value = Math.floor(at);
  const made = (high + 1) / fps;
  const told = (at / fps).toFixed(1) + " of " + made.toFixed(1) + " s" + (ended ? "" : " so far");
  when.value = high > low ? told : "nothing yet";
  const button = find(".kvp-play"), shape = button.querySelector("path");
  if (shape.dataset.playing !== String(playing)) {
    shape.dataset.playing = playing;
    shape.setAttribute("d", playing ? "M1 0h3v10H1zM6 0h3v10H6z" : "M1 0l9 5-9 5z");
    button.setAttribute("aria-label", playing ? "stop watching" : "watch");
  }
  const said = tracks.length ? (tracks[0].prompts || []).filter(each => each[0] * fps <= at + 1) : [];
  const text = said.length ? said[said.length - 1][1] : "";
  if (find(".kvp-prompt").textContent !== text) find(".kvp-prompt").textContent = text;
  requestAnimationFrame(tick);
}

element.addEventListener("click", event => {
  if (!event.target.closest(".kvp-play")) return;
  const [low, high] = limits();
  if (!playing && at >= high) at = low;
  playing = !playing;
});
element.addEventListener("input", event => {
  if (!event.target.matches(".kvp-seek")) return;
  playing = false;
  at = Number(event.target.value);
});
watch("value", () => take(props.value));
take(props.value);
requestAnimationFrame(tick);
