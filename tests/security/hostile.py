"""Texts that attack whatever treats them as more than texts: shells, formatters, pages, paths, tables."""

from __future__ import annotations

PWNED = "pwned"
"""Name of the file that a shell makes if it runs what it should only pass on."""

SHELL = [
    "two  words",
    "it's",
    'say "no"',
    f"$(touch {PWNED})",
    f"`touch {PWNED}`",
    f"a; touch {PWNED}",
    f"a | touch {PWNED} & touch {PWNED}",
    f"'; touch {PWNED}; '",
    f'"; touch {PWNED}; "',
    "$HOME $PATH $0 !! #",
    "100% %s %n %(run)s",
    "back\\slash \\n \\",
    "*?",
    "[1-9]",
    "~root",
    "~",
    "\u202egnp.exe",
    "é 漢字 🎨",
    "(a) & [b] = c, d",
]
"""Fine as parts of file names, and dangerous where a shell or a formatter reads them."""

FORMATS = [
    "{wildcards}",
    "{0}",
    "{input}",
    "{run}",
    "{{}}",
    "{",
    "<results>",
    "a\nb",
    "a\x00b",
    "\ud800",
]
"""What Snakemake formats again, or what no command line can hold: refused by key and by name."""

SCRIPT = "<script>document.title='" + PWNED + "'</script>"
IMAGE = f"<img src=x onerror=\"document.title='{PWNED}'\">"

PAGE = [
    SCRIPT,
    IMAGE,
    f"\"><svg onload=document.title='{PWNED}'>",
    "</pre></code></td></table></body><h1>no</h1>",
    "<!-- comment --> --> ]]> &lt;b&gt; &amp; &#x41;",
    "{{ 7 * 7 }} {% raw %} ${7*7} #{7*7}",
    "javascript:alert(1)",
]
"""Markup where text is expected."""

MARKDOWN = [
    "| a | b |\n| --- | --- |",
    "[click](javascript:alert(1)) ![x](http://127.0.0.1/x.png)",
    "```\nrm -rf /\n```",
    "# heading\n* list\n---\nlicense: mine",
    "<!-- written by SAIL; an export may replace this folder -->",
]

UNICODE = [
    "NUL \x00 inside",
    "bell \x07, escape \x1b[31mred\x1b[0m, delete \x7f",
    "right to left \u202e override \u2066 isolate \u2069",
    "zero\u200bwidth \ufeff mark, combining e\u0301\u0323, Zalgo Z̴̡͎͝",
    "two\nlines",
    "carriage\rreturn and\r\nboth",
    "tab\tand\u2028line\u2029separators",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0010ffff",
    "ﬁ ＡＢＣ İı ß",
    "x" * 9_000,
]

PROMPTS = [
    *SHELL,
    *(text for text in FORMATS if text not in ("a\nb", "a\x00b", "\ud800")),
    *PAGE,
    *MARKDOWN,
    *UNICODE,
    "'; DROP TABLE prompts; --",
    "=cmd|' /C calc'!A0",
    "../../../../etc/passwd",
    "__import__('os').system('touch pwned')",
    "null",
    "NaN",
    "-1",
    "--output=/tmp/pwned",
]
"""Prompts and captions, all different after normalisation, that must come through letter by letter."""
