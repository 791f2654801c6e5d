"""The report of a run, report.html and report.md: from the files of its directory to sections, and these to a page.

    page       report.html and report.md of one run          compare    of several; paired, seeds
    run_files  what a run directory holds, as it was read    outcomes   each tested clip, and what it is taken for
    verdict    what came out, in words                       facts      what was run, on what, what happened
    curves     loss, scores, speed over steps and seconds    scores     views, sweeps
    classes    each class, confusions                        clips      pictures of clips that are right and wrong
    paper_row  a run as a row of the paper's tables      energy     what its GPUs took
    apart      pictures made in a process of their own
    document   what a page consists of                       to_html, to_markdown, svg, png, style: how it is drawn

Start with `page`.
"""
