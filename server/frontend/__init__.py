"""From bytes to pixels to answer: the socket, the routes, bodies and images. Nothing is scheduled or budgeted here, and
HTTP ends here, but for the status that an error carries."""
