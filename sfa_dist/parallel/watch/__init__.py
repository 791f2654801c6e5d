"""Who is alive: a hub on one rank, a process beside each rank, and the verdict on who is lost.

    guard          the rank's side            hub      the listening side
    watch_process  a process beside a rank    verdict  who is lost, by rule
    lines          messages of the two

Start with `guard`.
"""
