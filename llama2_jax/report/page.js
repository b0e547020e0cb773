// What the lines say where the pointer is.
for (const figure of document.querySelectorAll('figure[data-chart]')) {
  const chart = JSON.parse(figure.dataset.chart), svg = figure.querySelector('svg');
  const left = 52, right = 408, top = 12, bottom = 206;
  let tip, cursor;
  const hide = () => { tip?.remove(); cursor?.remove(); tip = cursor = null; };
  const show = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * 420;
    if (at < left || at > right) return hide();
    const x = chart.from + (at - left) / (right - left) * (chart.to - chart.from);
    const nearest = points => points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
    const found = chart.series.map(series => [series.name, nearest(series.points)]);
    if (!tip) {
      tip = figure.appendChild(document.createElement('div'));
      tip.className = 'tip';
      cursor = svg.appendChild(document.createElementNS('http://www.w3.org/2000/svg', 'line'));
      cursor.setAttribute('class', 'cursor');
    }
    const format = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString('en') : +value.toPrecision(4);
    const lines = [`${chart.x} ${format(found[0][1][0])}`, ...found.map(([name, point]) => `${name}: ${format(point[1])}`)];
    tip.replaceChildren(...lines.flatMap(line => [document.createTextNode(line), document.createElement('br')]));
    const where = left + (found[0][1][0] - chart.from) / (chart.to - chart.from) * (right - left);
    for (const [name, value] of Object.entries({x1: where, x2: where, y1: top, y2: bottom})) cursor.setAttribute(name, value);
    const pixel = where / 420 * box.width;
    tip.style.top = '30px';
    tip.style.left = pixel > box.width / 2 ? `${pixel - tip.offsetWidth - 10}px` : `${pixel + 10}px`;
  };
  svg.addEventListener('pointermove', show);
  svg.addEventListener('pointerdown', show);
  svg.addEventListener('pointerleave', hide);
}
