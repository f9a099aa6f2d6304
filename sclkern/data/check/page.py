"""A page of samples with their captions, in one file, that a person can look through without a network."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from sclkern.data.check.report import Report, Sample
from sclkern.data.text import one_line
from sclkern.io import write_atomically

# Findings of a kind that the page lists; --json FILE has all of them.
_LISTED = 500
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c33; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { opacity: .7; }
dd { margin: 0; overflow-wrap: anywhere; }
.state { border-left: .3rem solid #393; padding: .3rem .8rem; } .state.bad { border-color: var(--bad); }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; font-weight: 600; } details ul { padding-left: 1.1rem; } li { overflow-wrap: anywhere; }
.reason { opacity: .75; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
figure { border: 1px solid var(--line); border-radius: .4rem; margin: 0; overflow: hidden; }
.frame { align-items: center; background: #8882; display: flex; height: 12.5rem; justify-content: center; }
img { max-height: 100%; max-width: 100%; }
figcaption { font-size: .85rem; padding: .5rem .7rem .7rem; overflow-wrap: anywhere; }
figcaption p { margin: 0 0 .35rem; } figcaption small { opacity: .65; display: block; }
"""


def write_page(report: Report, path: str | Path) -> None:
    """Write the page. It has no scripts and loads nothing, and every text of the data is shown, never obeyed.

    Args:
        report: of ``examine``, with samples.
        path: the .html file; it appears whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    content = page(report)
    write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def page(report: Report) -> str:
    """The page as HTML.

    Args:
        report: of ``examine``, with samples.

    Returns:
        A whole document.
    """
    title = f"Data of {_text(report.root, 200)}"
    facts = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.facts())
    figures = "\n".join(_figure(sample) for sample in report.samples)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_defects(report)}
<h2>Counts</h2>
<dl>
{facts}
</dl>
<h2>{len(report.samples):,} of {report.images:,} images</h2>
<div class="grid">
{figures}
</div>
</body>
</html>
"""


def _defects(report: Report) -> str:
    if not report.defects:
        return '<p class="state">No defects.</p>'
    count = len(report.defects)
    parts = [f'<p class="state bad"><strong>{count:,} defect{"" if count == 1 else "s"}.</strong></p>']
    for kind, findings in report.by_kind().items():
        items = "\n".join(
            f'<li>{_text(finding.name, 200)} <span class="reason">{_text(finding.reason, 500)}</span></li>'
            for finding in findings[:_LISTED]
        )
        more = f"<p>And {len(findings) - _LISTED:,} more.</p>" if len(findings) > _LISTED else ""
        parts.append(
            f"<details open><summary>{escape(kind)}: {len(findings):,}</summary>\n<ul>\n{items}\n</ul>{more}</details>"
        )
    return "\n".join(parts)


def _figure(sample: Sample) -> str:
    data = base64.b64encode(sample.thumbnail).decode()
    captions = "".join(f'<p dir="auto">{_text(caption, 300)}</p>' for caption in sample.captions)
    more = sample.num_captions - len(sample.captions)
    captions += f"<p>and {more:,} more</p>" if more else ""
    split = f" · {_text(sample.split, 60)}" if sample.split is not None else ""
    name, (width, height) = _text(sample.name, 200), sample.size
    return (
        f'<figure><div class="frame"><img alt="{name}" src="data:image/jpeg;base64,{data}"></div>'
        f"<figcaption>{captions}<small>{name}</small><small>{width} x {height} px{split}</small></figcaption></figure>"
    )


def _text(text: str, limit: int) -> str:
    return escape(one_line(text, limit))
