"""HTML, style and script of the page. The script is for comfort only: it sorts tables by a column."""

PAGE = """\
{%- macro block(one) %}
{% if one.kind == "text" %}
<p>{{ one.text }}{% if one.command %} <code class="command">{{ one.command }}</code>{% endif %}</p>
{% elif one.kind == "small" %}
<p class="caption">{{ one.text }}</p>
{% elif one.kind == "heading" %}
<h3>{{ one.text }}</h3>
{% elif one.kind == "table" %}
{% if one.caption %}
<p class="caption">{{ one.caption }}</p>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ one.caption or 'table' }}">
<table>
<thead><tr>
{% for name in one.header %}
<th scope="col"{% if loop.index0 in one.numbers %} class="number"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in one.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index0 in one.numbers %} class="number"{% endif %}>{{ cell | breakable }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% elif one.kind == "pictures" %}
<div class="pictures">
{% for picture in one.pictures %}
<figure id="{{ picture.name }}" style="max-width: {{ picture.most_width }}px">
<figcaption>{{ picture.caption }}</figcaption>
<div class="scroll" tabindex="0" role="region" aria-label="picture">
<div style="min-width: {{ picture.least_width }}px">{{ picture.svg | safe }}</div>
</div>
</figure>
{% endfor %}
</div>
{% elif one.kind == "folded" %}
<details>
<summary>{{ one.title }}</summary>
{% for inner in one.blocks %}
{{ block(inner) }}
{% endfor %}
</details>
{% endif %}
{% endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<p class="brand">prunegym</p>
<h1>{{ page.title }}</h1>
<p class="subtitle">{{ page.subtitle }}</p>
</header>
<main>
{% for headline in page.headlines %}
<section class="headline" aria-label="{{ headline.title }}">
<h2>{{ headline.title }}</h2>
<div class="cards">
{% for card in headline.cards %}
<div class="card {{ card.tone }}">
<p class="label">{{ card.label }}</p>
<p class="value">{{ card.value }}</p>
<p class="detail">{{ card.detail }}</p>
</div>
{% endfor %}
</div>
</section>
{% endfor %}
{% if grouped %}
<section id="verdict" class="verdict">
<h2>In plain words</h2>
{% for about, sentences in grouped.items() %}
<div class="about">
<h3>{{ about }}</h3>
<ul>
{% for sentence in sentences %}
<li class="{{ sentence.tone }}">
<span class="tone">{{ tones[sentence.tone] }}</span>
<span>{{ sentence.text }}</span>
</li>
{% endfor %}
</ul>
</div>
{% endfor %}
</section>
{% endif %}
<nav aria-label="Contents">
<h2>Contents</h2>
<ol>
{% for section in page.sections %}
<li><a href="#{{ section.name }}">{{ section.title }}</a></li>
{% endfor %}
</ol>
</nav>
{% for section in page.sections %}
<section id="{{ section.name }}" class="part">
<h2>{{ section.title }}</h2>
{% if section.introduction %}
<p class="introduction">{{ section.introduction }}</p>
{% endif %}
{% for one in section.blocks %}
{{ block(one) }}
{% endfor %}
</section>
{% endfor %}
</main>
<footer><p>{{ page.footer }}</p></footer>
<script>{{ script | safe }}</script>
</body>
</html>
"""

STYLE = """
:root {
  --ink: #1f2328; --muted: #59636e; --line: #d1d9e0; --surface: #ffffff; --ground: #f6f8fa; --accent: #0969da;
  --good: #1a7f37; --even: #9a6700; --bad: #cf222e; --note: #59636e; --shade: #1f232833;
  --series-0: #0072b2; --series-1: #d98e00; --series-2: #009e73; --series-3: #c2669a; --series-4: #3f9fd4;
  --series-5: #d55e00;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6edf3; --muted: #9aa5b1; --line: #3d444d; --surface: #151b23; --ground: #0d1117; --accent: #6cb2ff;
    --good: #4ac26b; --even: #d4a72c; --bad: #ff7b72; --note: #9aa5b1; --shade: #00000088;
    --series-0: #4aa8e0; --series-1: #eeb13c; --series-2: #2fc79a; --series-3: #e290bf; --series-4: #8ccdf2;
    --series-5: #f08a4b;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 var(--sans);
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
.brand { margin: 0; color: var(--accent); font-weight: 700; letter-spacing: 0.02em; }
h1 { margin: 2px 0 6px; font-size: 34px; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 22px; line-height: 1.3; overflow-wrap: anywhere; }
h3 { margin: 28px 0 10px; font-size: 16px; line-height: 1.4; overflow-wrap: anywhere; }
.subtitle, .introduction { margin: 0 0 20px; color: var(--muted); max-width: 76ch; overflow-wrap: anywhere; }
p { max-width: 76ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
section, nav {
  margin: 0 0 20px; padding: 22px 24px; background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
}
section.headline { padding: 0; background: none; border: 0; }
section.headline h2 { font-size: 17px; margin-bottom: 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; }
.card {
  padding: 14px 16px; background: var(--surface); border: 1px solid var(--line); border-top: 3px solid var(--note);
  border-radius: 10px;
}
.card p { margin: 0; }
.card .label { color: var(--muted); font-size: 13px; line-height: 1.4; }
.card .value {
  font-size: 28px; font-weight: 650; line-height: 1.3; letter-spacing: -0.01em; font-variant-numeric: tabular-nums;
}
.card .detail { color: var(--muted); font-size: 13px; line-height: 1.4; }
.card.good { border-top-color: var(--good); }
.card.even { border-top-color: var(--even); }
.card.bad { border-top-color: var(--bad); }
.verdict .about + .about { margin-top: 18px; }
.verdict h3 { margin: 0 0 6px; font-size: 14px; font-weight: 600; color: var(--muted); }
.verdict ul { margin: 0; padding: 0; list-style: none; }
.verdict li { display: flex; gap: 12px; padding: 5px 0; align-items: baseline; overflow-wrap: anywhere; }
.tone {
  flex: 0 0 62px; padding: 1px 0; border: 1px solid currentColor; border-radius: 999px; text-align: center;
  font-size: 12px; font-weight: 600; line-height: 1.5; color: var(--note);
}
.good > .tone { color: var(--good); }
.even > .tone { color: var(--even); }
.bad > .tone { color: var(--bad); }
nav ol { margin: 0; padding: 0 0 0 22px; columns: 3 220px; }
nav li { padding: 2px 0; }
/* a shade at the edge behind which there is more: the covers move with the content, the shades do not */
.scroll {
  overflow-x: auto; max-width: 100%;
  background:
    linear-gradient(to right, var(--surface) 40%, transparent) left / 40px 100% no-repeat local,
    linear-gradient(to left, var(--surface) 40%, transparent) right / 40px 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 12px 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 12px 100% no-repeat scroll;
}
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.45; }
.caption { margin: 14px 0 4px; color: var(--muted); font-size: 14px; line-height: 1.45; }
th, td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
th.sortable { cursor: pointer; }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
td { min-width: 6ch; max-width: 52ch; overflow-wrap: break-word; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
code.command {
  display: block; margin-top: 6px; padding: 10px 12px; background: var(--ground); border: 1px solid var(--line);
  border-radius: 6px; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.pictures { display: flex; flex-wrap: wrap; gap: 24px 32px; align-items: flex-start; margin: 14px 0 20px; }
figure { margin: 0; flex: 1 1 min(100%, 440px); min-width: 0; }
figcaption { margin: 0 0 8px; font-size: 14px; line-height: 1.45; color: var(--muted); overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: var(--sans); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
details { margin: 14px 0; border-top: 1px solid var(--line); padding-top: 10px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; overflow-wrap: anywhere; }
details > :nth-child(2) { margin-top: 12px; }
footer { padding-bottom: 40px; color: var(--muted); font-size: 13px; }
@media (max-width: 640px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  header { padding-top: 20px; }
  h1 { font-size: 26px; }
  section, nav { padding: 16px 12px; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .card { padding: 10px 12px; }
  .card .value { font-size: 23px; }
  .verdict li { flex-direction: column; gap: 3px; }
  .tone { flex-basis: auto; width: 62px; }
}
@media print {
  body { background: #ffffff; }
  section, nav { break-inside: avoid; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  if (table.tBodies[0].rows.length < 3) continue;
  heads.forEach((head, column) => {
    head.classList.add("sortable");
    head.title = "sort by this column";
    head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const value = (row) => row.cells[column].textContent.replace(/[,×\\u202f]/g, "");
      const rows = [...table.tBodies[0].rows].sort((one, other) => {
        const [a, b] = [value(one), value(other)];
        const order = isNaN(parseFloat(a)) || isNaN(parseFloat(b)) ? a.localeCompare(b) : parseFloat(a) - parseFloat(b);
        return up ? order : -order;
      });
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}
"""
