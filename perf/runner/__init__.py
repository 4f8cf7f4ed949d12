"""The runner of the benchmarks: `perf/run`. See perf/METHOD.md for what is measured and how.

Layers, each knows only those above it:
    failures, stats           what can go wrong; figures
    process, qmp, machine     a child process, its control socket, facts about this machine
    agent, peers, colo, fio   what is measured, and against what
    load, data, nbd           who makes the load, and of what bytes
    bench                     a benchmark, its pairs, its row
    paths, epochs, scale, curves   the benchmarks
    report, plot, profile     what a person sees
"""
