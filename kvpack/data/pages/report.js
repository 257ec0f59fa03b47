const pictures = PICTURES, starts = STARTS;
for (const name in drawings) Plotly.newPlot(name, ...drawings[name]); // once all columns have their widths
for (const figure of document.querySelectorAll(".figure")) {
  const trace = figure.dataset.trace;
  figure.on("plotly_hover", event => {
    const when = event.points[0].x;
    let chunk = 0;
    while (chunk + 1 < starts[trace].length && starts[trace][chunk + 1] <= when) chunk++;
    document.getElementById("when-" + trace).textContent = "chunk " + chunk + ", second " + starts[trace][chunk];
    const picture = pictures[trace][chunk], image = document.getElementById("frame-" + trace);
    if (picture) image.src = picture; else image.removeAttribute("src");
  });
}
