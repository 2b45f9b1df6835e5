"""From bytes to pixels to answer: the socket, the routes, bodies and images. Nothing is scheduled or budgeted here, and
nothing below this room knows HTTP."""
