"""Front ends in processes of their own: HTTP and decoding there, the cascade here. `docs/frontends.md` tells the whole.

`records` is what goes over the socket between the two, `memory` and `counts` what lies in the memory that they share;
`link` is the engine's end of one, `engine_link` the front end's; `fleet` starts, watches and replaces the processes.
"""
