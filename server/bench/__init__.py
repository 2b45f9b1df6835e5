"""`dvt bench`: an open-loop load on a running server, and a report. Nothing of this is imported by `dvt serve`.

One measurement, module by module: `workload` (what is asked) and `arrivals` (when) make `orders`; `senders` carries
them out in processes of their own, each as `sending` says; `figures` makes numbers of their logs, `page` draws them.
`ceiling` asks the same driver how fast it would be if the server took no time at all.
"""
